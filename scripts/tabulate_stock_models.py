"""Tries the balancing on every MoE family of the installed Transformers, and writes the table of docs/stock_models.md.

python scripts/tabulate_stock_models.py
python scripts/tabulate_stock_models.py Qwen3MoeForCausalLM    # prints its row alone
"""

import dataclasses
import inspect
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from equipoise import balance
from equipoise.data import write_whole
from equipoise.integrations import StockRouter, find_routers
from equipoise.integrations.stock_routers import resolve, selection_in

PAGE = Path(__file__).parents[1] / "docs/stock_models.md"
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)
ROUTES = re.compile(r'"router_logits":|class \w*(?:Top[kK]Router|DbrxRouter|HunYuanMoEV1Gate|AriaTextMoELayer)\(')

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 32,
    "ffn_hidden_size": 32,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "spatial_merge_size": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "num_expert_group": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
    "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "intermediate_size_mlp": 32,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}
"""Fields of any configuration, where it has them."""
REQUIRED = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_topk",
    "top_k_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "num_key_value_heads",
    "pad_token_id",
)
"""Set even where the default is None."""
ROPE_3D = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
SPECIAL: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": {"layer_group_size": 2},
    "DbrxAttentionConfig": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense"] + ["sparse"] * 3},
    "DogeConfig": {"is_moe": True, "num_experts": 16},
    "Dots3NoteAudioConfig": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "Dots3NoteVisionConfig": {
        "mlp_layer_types": ["dense"] * 4,
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
        "adapter_merge_size": 1,
    },
    "Dots3NoteTextConfig": {"layer_types": ["indexed_attention"] * 4},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [16, 16], "rope_parameters": ROPE_3D},
    "Gemma4TextConfig": {"enable_moe_block": True, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8},
    "Glm4vMoeTextConfig": {"rope_parameters": ROPE_3D | {"partial_rotary_factor": 1.0}},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0},
    "GraniteMoeHybridConfig": {"mamba_n_heads": 8, "mamba_d_state": 8, "layer_types": ["mamba", "attention"] * 2},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "Inkling2VisionConfig": {"text_hidden_size": 32},
    "InklingAudioConfig": {"text_hidden_size": 32},
    "InklingVisionConfig": {"text_hidden_size": 32},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearConfig": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "LongcatFlashConfig": {"num_layers": 2, "num_hidden_layers": 4, "zero_expert_num": 4},
    "MiMoV2FlashConfig": {"num_key_value_heads": 2},
    "Mistral4Config": {"head_dim": 16},
    "MuseSparkAudioConfig": {"hidden_sizes": [16, 16, 16, 32], "depths": [1] * 4},
    "MuseSparkConfig": {"out_hidden_size": 32, "projector_hidden_size": 32},
    "MuseSparkTextConfig": {"moe_hidden_size": 32},
    "NemotronHConfig": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 16,
    },
    "Qwen3OmniMoeAudioEncoderConfig": {
        "encoder_attention_heads": 4,
        "encoder_layers": 1,
        "encoder_ffn_dim": 32,
        "output_dim": 32,
    },
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 1},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 16},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 94},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "Step3p7TextConfig": {"sliding_window": 16},
    "ZayaConfig": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What single configurations need besides, by class."""

FLOAT32 = ("Inkling2ForCausalLM", "Inkling2ForConditionalGeneration")
"""Whose routers multiply in fp32 whatever the model's type."""
UNPADDED = ("Glm5NextForConditionalGeneration",)
"""Whose own gradients are NaN with padding."""


def families() -> dict[str, list[str]]:
    """Every language-model class, decoder or not, of a modeling file with routers, and its model types."""
    models = Path(transformers.__file__).parent / "models"
    found: dict[str, list[str]] = {}
    for mapping in MAPPINGS:
        for model_type, names in getattr(modeling_auto, mapping).items():
            folder = models / model_type_to_module_name(model_type)
            if not any(ROUTES.search(file.read_text(encoding="utf-8")) for file in folder.glob("modeling_*.py")):
                continue
            for name in names if isinstance(names, list | tuple) else [names]:
                types = found.setdefault(name, [])
                if model_type not in types:
                    types.append(model_type)
    return dict(sorted(found.items()))


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration of any family, and of what is nested in it, made small."""
    default = config_class()
    values = default.to_dict()
    changes: dict[str, Any] = {}
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            changes[name] = tiny_config(type(part))
    for name in (field.name for field in dataclasses.fields(config_class)):
        value = values.get(default.attribute_map.get(name, name))
        if name in changes or isinstance(value, list | tuple | dict):
            continue
        if name in TINY and (value is not None or name in REQUIRED):
            changes[name] = TINY[name]
    return config_class(**changes | SPECIAL.get(config_class.__name__, {}))


def tiny_model(name: str) -> PreTrainedModel:
    """A random model of a class, in float64."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    config = tiny_config(model_class.config_class)
    # The other implementations of experts have no float64.
    model = model_class._from_config(config, attn_implementation="eager", experts_implementation="eager")
    return (model if name in FLOAT32 else model.double()).train()


@dataclasses.dataclass
class Trial:
    """What came of one family; a `str` where it did not work, which says why."""

    routers: list[StockRouter]
    counts: bool
    """Of every layer, and to the token, those that the experts were given."""
    gradient: float
    """Largest difference between the gradient of the balancing loss and the formula's, relative to the largest
    element of the formula's."""
    bias_moved: bool | None
    """By the formula; `None` without a bias."""
    untouched: bool
    """Loss and logits without labels, and in evaluation, and the loss with labels less the balancing."""
    restored: bool
    """By `detach`: attributes, hooks and the loss."""

    @property
    def works(self) -> bool:
        return (
            self.counts and self.gradient < 1e-4 and self.bias_moved is not False and self.untouched and self.restored
        )


class Watch:
    """Sees what the routers put out and what the experts are given, by other means than the package's."""

    def __init__(self, model: PreTrainedModel, routers: list[StockRouter]) -> None:
        self.num_experts = routers[0].num_experts
        self.logits: dict[int, Tensor] = {}
        self.experts: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self.handles = []
        for layer, router in enumerate(routers):
            module = resolve(model, router.path)
            parent = resolve(model, router.path.rpartition(".")[0])

            def after(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                self.see_router(layer, module, output)

            def before(module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                self.see_experts(layer, [*args, *kwargs.values()])

            self.handles.append(module.register_forward_hook(after))
            experts = getattr(parent, "experts", None)
            if isinstance(experts, nn.Module) and router.kind not in ("JetMoeTopKGating", "Llama4Router"):
                self.handles.append(experts.register_forward_pre_hook(before, with_kwargs=True))

    def see_router(self, layer: int, module: Any, output: Any) -> None:
        kind = type(module).__name__
        outputs = output if isinstance(output, tuple) else (output,)
        floats = [value for value in outputs if _is_float(value) and value.dim() > 1]
        logits = next((value for value in floats if value.shape[-1] == self.num_experts), floats[0])
        logits = logits.reshape(-1, logits.shape[-1])
        if kind == "Llama4Router":
            logits = output[1]
        elif kind in ("Gemma4TextRouter", "DiffusionGemmaTextRouter"):
            logits = logits.log()
        elif kind == "DeepseekV4TopKRouter":
            logits = nn.functional.softplus(logits).sqrt().log()
        elif kind == "DogeCDMoE":
            rows, columns = output[1].softmax(-1)
            logits = torch.einsum("nr,nc->nrc", rows, columns).flatten(1).log()
        self.logits[layer] = logits
        if kind in ("Llama4Router", "JetMoeTopKGating", "DogeCDMoE"):
            self.experts[layer] = logits.topk(module.top_k, dim=-1).indices
        if kind == "ZayaRouter":
            probabilities = logits.softmax(-1).float() + module.balancing_biases
            self.experts[layer] = probabilities.topk(module.top_k, dim=-1).indices

    def see_experts(self, layer: int, values: list[Any]) -> None:
        if layer not in self.experts:
            self.experts[layer] = selection_in(values)
            same = [value for value in values if _is_float(value) and value.shape == self.experts[layer].shape]
            if same:
                self.weights[layer] = same[-1]

    def load(self, layer: int, mask: Tensor) -> list[int]:
        counted = Counter(self.experts[layer][mask.flatten()].flatten().tolist())
        return [counted[expert] for expert in range(self.num_experts)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def scores_of(logits: Tensor, scoring_func: str) -> Tensor:
    """Scores `[N, E]` in float64."""
    logits = logits.double()
    return logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that takes part."""
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def forward(model: PreTrainedModel, **batch: Any) -> Any:
    """A forward pass whose dropout and jitter are the same every time."""
    torch.manual_seed(0)
    return model(**batch)


def attributes(model: PreTrainedModel) -> list[Any]:
    """What a balancer could have left behind."""
    return [
        (path, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    ] + [model.config.to_dict()]


def try_family(name: str) -> Trial | str:
    """Balance a tiny model of a class and compare with what the formulas say."""
    try:
        model = tiny_model(name)
        try:
            balance(model).detach()
        except ValueError as error:
            return f"refused: {error}"
        return compare(model, find_routers(model), padded=name not in UNPADDED)
    except Exception as error:  # whatever it is, the table says so
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def compare(model: PreTrainedModel, routers: list[StockRouter], padded: bool) -> Trial:
    """Each column of the table."""
    num_experts, coefficient = routers[0].num_experts, 3.0
    ids = torch.randint(2, 96, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 5:] = mask[1, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        for router in routers:
            if router.bias is not None:  # away from zero, so that a count that forgets it shows
                bias = getattr(resolve(model, router.bias[0]), router.bias[1])
                bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    asked = {"output_router_logits": True} if _has_own_loss(model) else {}
    before = attributes(model)

    watch = Watch(model, routers)
    stock = forward(model, **batch, labels=labels)
    watch.remove()
    loads = [watch.load(layer, mask.bool()) for layer in range(len(routers))]
    tokens = mask.flatten().bool()
    formula = torch.zeros((), dtype=torch.float64)
    for layer, router in enumerate(routers):
        scores = scores_of(watch.logits[layer], router.scoring_func)
        if layer in watch.weights and router.kind != "PhimoeTopKRouter":
            selected = scores.gather(-1, watch.experts[layer])[tokens]
            weights = watch.weights[layer].double()[tokens]
            if not torch.allclose(weights * selected.sum(-1, True), selected * weights.sum(-1, True), atol=1e-5):
                raise ValueError(f"scores are not by {router.scoring_func}")
        p = (scores / scores.sum(-1, keepdim=True))[tokens].mean(0)
        f = torch.tensor(loads[layer], dtype=torch.float64) / sum(loads[layer])
        formula = formula + num_experts * (f * p).sum() / len(routers)
    expected = gradients(model, coefficient * formula)
    stock_gradients = gradients(model, stock.loss)
    with torch.no_grad():
        without_labels = forward(model, **batch).logits
        evaluated = forward(model.eval(), **batch, labels=labels).loss
        model.train()

    balancer = balance(model, "micro_batch", router_aux_loss_coef=coefficient, balancing_schedule=None)
    outputs = forward(model, **batch, labels=labels, **asked)
    assert balancer.synchronizer.running is not None
    counts = balancer.synchronizer.running.load.tolist() == loads
    ours = gradients(model, outputs.loss)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    gradient = max(
        (ours[weight] - stock_gradients.get(weight, 0) - expected.get(weight, 0)).abs().max().item() / largest
        for weight in ours
    )
    bare = forward(model, **batch)
    untouched = bare.get("loss") is None and torch.equal(bare.logits, without_labels)
    untouched &= torch.allclose((outputs.loss - outputs.aux_loss).double(), stock.loss.double(), rtol=1e-5)
    untouched &= torch.allclose(outputs.aux_loss.double(), coefficient * formula, rtol=1e-5)
    with torch.no_grad():
        untouched &= torch.equal(forward(model.eval(), **batch, labels=labels, **asked).loss, evaluated)
        model.train()
    balancer.detach()
    restored = attributes(model) == before and torch.equal(forward(model, **batch, labels=labels).loss, stock.loss)
    return Trial(routers, counts, gradient, _bias_moves(model, routers, batch, labels, loads), untouched, restored)


def _has_own_loss(model: PreTrainedModel) -> bool:
    return "output_router_logits" in inspect.signature(type(model).forward).parameters


def _bias_moves(
    model: PreTrainedModel,
    routers: list[StockRouter],
    batch: dict[str, Tensor],
    labels: Tensor,
    loads: list[list[int]],
) -> bool | None:
    if routers[0].bias is None:
        return None
    held = [getattr(resolve(model, path), name) for path, name in (router.bias for router in routers if router.bias)]
    biases = [bias.detach().clone().double().flatten() for bias in held]
    balancer = balance(model, "loss_free", bias_update_rule="sign", bias_update_rate=0.01)
    forward(model, **batch, labels=labels).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    right = True
    for bias, load, moved in zip(biases, loads, balancer.selection_biases(), strict=True):
        mean = sum(load) / len(load)
        step = bias + 0.01 * torch.tensor([float((mean > n) - (mean < n)) for n in load], dtype=torch.float64)
        right &= torch.allclose(moved.double(), step - step.mean(), atol=1e-6)
    balancer.detach()
    return right


COLUMNS = ["model class", "routers", "scores", "bias", "counts", "gradient", "bias moved", "untouched", "restored"]


def row(name: str, types: list[str], trial: Trial | str) -> str:
    """One line of the table."""
    family = f"`{name}` ({', '.join(types)})"
    if isinstance(trial, str):
        return f"| {family} | {trial} |" + " |" * (len(COLUMNS) - 2)
    router = trial.routers[0]
    cells = [
        family,
        f"{len(trial.routers)} `{router.kind}`",
        router.scoring_func,
        "-" if router.bias is None else f"`{router.bias[1]}`",
        _mark(trial.counts),
        f"{trial.gradient:.0e}",
        "-" if trial.bias_moved is None else _mark(trial.bias_moved),
        _mark(trial.untouched),
        _mark(trial.restored),
    ]
    return f"| {' | '.join(cells)} |"


def _mark(right: bool) -> str:
    return "yes" if right else "**no**"


def table() -> str:
    """All families."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    found = families()
    trials = {name: try_family(name) for name in tqdm(found, desc="families")}
    lines += [row(name, types, trials[name]) for name, types in found.items()]
    types = {
        each for name, trial in trials.items() if isinstance(trial, Trial) and trial.works for each in found[name]
    }
    works = sum(isinstance(trial, Trial) and trial.works for trial in trials.values())
    lines += [
        "",
        f"Transformers {transformers.__version__}: {works} of {len(found)} classes, {len(types)} model types.",
    ]
    return "\n".join(lines)


MARKED = re.compile(r"(<!-- table: written by scripts/tabulate_stock_models.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if len(sys.argv) > 1:
        for name in sys.argv[1:]:
            print(row(name, families()[name], try_family(name)))
        return
    text = PAGE.read_text(encoding="utf-8")
    place = MARKED.search(text)
    assert place is not None, f"{PAGE} has no place for the table"
    text = f"{text[: place.end(1)]}{table()}\n{text[place.start(3) :]}"
    write_whole(PAGE, lambda file: file.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
