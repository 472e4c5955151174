"""Stock routers: where a Transformers model routes, and what its routers put out.

Transformers says of most families which modules are the routers, in `_can_record_outputs["router_logits"]`, and most
routers put out `(logits, weights, selected experts)`. What departs from that stands in the tables below, by class.

`B` sequences, `T` positions, `N = B*T` tokens, `L` routers, `E` experts, `K` experts per token.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from ..configuration.configuration_moe import ScoringFunction

UNRECORDED = re.compile(r"Top[kK]Router$|^HunYuanMoEV1Gate$|^DbrxRouter$|^AriaTextMoELayer$")
"""Routers where a model class records no router logits: in Transformers 5.17 many do not yet."""

ROUTER_WITHIN = {
    "Ernie4_5_VLMoeMoeBlock": "text_moe.gate",  # its second router sees images alone, and other tokens
    "ExaoneMoeSparseMoEBlock": "gate",
    "Llama4TextMoe": "router",
    "JetMoeAttention": "experts.router",
}
"""Recorded class -> the router inside it: where the logits of a whole block are recorded."""

SELECTION_INPUT_OF = {"DbrxRouter": "experts", "Linear": "experts", "DogeCDMoE": "down_embed"}
"""Router class -> the module that is given the selected experts, where the router does not put them out: beside the
router, or for `DogeCDMoE` inside."""

SIGMOID_WITHOUT_BIAS = ("FlintTopKRouter", "Llama4Router")
SOFTMAX_WITH_BIAS = ("Ernie4_5_MoeTopKRouter", "Ernie4_5_VLMoeMoeTopKRouter", "LongcatFlashTopkRouter", "ZayaRouter")
"""Otherwise, and in families that are not known here, routers with a correction bias score by sigmoid, those without
by softmax."""

SCORING_FIELD = {
    "Cohere2MoeTopKRouter": "expert_selection_fn",
    "DeepseekV4TopKRouter": "scoring_func",
    "Inkling2TopKRouter": "scoring_func",
}
"""Routers whose configuration names the scoring function."""

BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
BIAS_ON_LOGITS = ("Kolibri1TopKRouter",)
"""Routers that add the bias to logits rather than to scores."""

LOGITS_INDEX = {"Llama4Router": 1, "JetMoeTopKGating": 4}
"""Router class -> which of its outputs holds the logits, where a whole block is recorded."""

NO_LOGITS = ("LongcatFlashTopkRouter", "AriaTextMoELayer")
"""Routers that, before Transformers 5.23, put out no logits, or show nobody what they selected."""


def _log(probabilities: Tensor) -> Tensor:
    """Logits whose softmax these probabilities are."""
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def _of_products(logits: Tensor) -> Tensor:
    """`[2, N, sqrt(E)]`, the logits of an expert's row and column, to `[N, E]`."""
    rows, columns = logits
    return (rows[..., :, None] + columns[..., None, :]).flatten(-2)


def _of_softplus(logits: Tensor) -> Tensor:
    """Scores `sqrt(softplus(x))` as logits of a softmax: normalised, the scores are the same."""
    softplus = torch.nn.functional.softplus(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return 0.5 * _log(softplus)


LOGITS_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "Gemma4TextRouter": _log,
    "DiffusionGemmaTextRouter": _log,
    "DogeCDMoE": _of_products,
}
"""Routers whose first output is not logits `[N, E]`."""


@dataclass
class StockRouter:
    """One router of a stock model."""

    path: str
    """From the causal language model, without whatever wraps the modules on the way."""
    kind: str
    """Name of its class."""
    index: int | None
    """Which of its outputs holds the logits; `None`: the first with one for each expert."""
    num_experts: int
    """`E`: what it selects from; the bias has one element each."""
    num_experts_per_tok: int
    """`K`."""
    scoring_func: ScoringFunction
    """What turns logits, as they are read here, into scores."""
    bias: tuple[str, str] | None
    """Path of the module that holds the correction bias, and the bias's name; `None` where there is none."""
    scores_take_bias: bool
    """Whether the selection is nothing but the `K` largest sums of score and bias, and logits are the router's own."""
    as_logits: Callable[[Tensor], Tensor] | None
    """From what the router puts out to logits `[N, E]` with the same scores; `None` where it puts out its logits."""

    def logits(self, output: Any) -> Tensor:
        """Logits `[N, E]` with their gradient, from what the router put out."""
        if not isinstance(output, tuple):
            found = output
        elif self.index is not None:
            found = output[self.index]
        else:
            floats = (each for each in output if isinstance(each, Tensor) and each.is_floating_point())
            found = next(each for each in floats if each.dim() > 1 and each.shape[-1] == self.num_experts)
        if self.as_logits is not None:
            found = self.as_logits(found)
        return found.reshape(-1, found.shape[-1])

    def selected_experts(self, output: Any) -> Tensor | None:
        """int64 `[N, K]` as the router put them out; `None` if another module's input tells."""
        if self.kind in SELECTION_INPUT_OF:
            return None
        if self.kind == "Llama4Router":
            scores = output[0]  # 0 for all but the selected
            return scores.topk(self.num_experts_per_tok, dim=-1).indices
        if self.kind == "JetMoeTopKGating":
            order, _, _, load, logits = output
            by_expert = torch.repeat_interleave(torch.tensor(load, device=order.device))
            return torch.empty_like(order).index_copy_(0, order, by_expert).view(len(logits), -1)
        experts = selection_in(output)
        if self.kind == "ZayaRouter":  # a token that skips the experts has expert 0, with weight 0
            experts = experts.masked_fill(output[1].detach() == 0, self.num_experts - 1)
        return experts

    def selection_path(self) -> str | None:
        """The module whose input holds the selected experts, where the router's output does not."""
        name = SELECTION_INPUT_OF.get(self.kind)
        if name is None:
            return None
        return f"{self.path}.{name}" if self.kind == "DogeCDMoE" else f"{self.path.rpartition('.')[0]}.{name}"


def selection_in(values: Any) -> Tensor:
    """The selected experts among a module's inputs or outputs, int64 `[N, K]`: the only integers there."""
    experts = next(
        value for value in values if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
    )
    return experts.reshape(-1, experts.shape[-1]).long()


def causal_language_model(model: nn.Module) -> PreTrainedModel:
    """The model of Transformers that is inside, whatever has wrapped it: DDP, FSDP, PEFT, `torch.compile`.

    Raises:
        ValueError: there is none.
    """
    inside: Any = model
    while not isinstance(inside, PreTrainedModel):
        if hasattr(inside, "get_base_model"):
            inside = inside.get_base_model()
            continue
        inside = next(
            (vars(inside)["_modules"][name] for name in WRAPPED if name in vars(inside).get("_modules", ())), None
        )
        if inside is None:
            raise ValueError(f"model must be a model of Transformers, or wrap one; got {type(model).__name__}")
    return inside


WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Under which name a wrapper keeps what it wraps."""

_WRAPPING = re.compile(
    r"\.(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)"
)


def resolve(root: nn.Module, path: str) -> nn.Module:
    """The module at a path that says nothing of wrappers; the last is left wrapped."""
    module: nn.Module = root
    for name in path.split("."):
        module = getattr(unwrapped(module), name)
    return module


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside the wrappers of one module: of PEFT's copies, the active one."""
    while True:
        children = module._modules
        inner = next((children[name] for name in WRAPPED[:1] + WRAPPED[2:] if name in children), None)
        if inner is None and "original_module" in children:
            copies: Any = children["modules_to_save"]
            active = [name for name in getattr(module, "active_adapters", []) if name in copies]
            disabled = getattr(module, "disable_adapters", False)
            inner = children["original_module"] if disabled or not active else copies[active[0]]
        if inner is None:
            inner = children.get("base_layer")
        if inner is None:
            return module
        module = inner


def find_routers(model: nn.Module) -> list[StockRouter]:
    """The routers of the language part of a model, in layer order.

    Args:
        model: any causal language model of Transformers, vision-language models among them; wrapped or not.

    Raises:
        ValueError: it has none, or such that nothing can be read off them; the message names its class.
    """
    causal = causal_language_model(model)
    name = type(causal).__name__
    if getattr(causal.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder alone: encoder and decoder route different tokens; got {name}")
    decoder = causal.get_decoder()
    prefix = next(path for path, module in causal.named_modules() if module is decoder)
    found: dict[str, tuple[nn.Module, int | None]] = {}
    for path, module, index in _recorded(decoder, prefix, _specifications(decoder)):
        found.setdefault(_WRAPPING.sub("", path), (unwrapped(module), index))
    if not found:
        raise ValueError(
            "model must have routers: modules of a class that its `_can_record_outputs` names under router_logits, "
            f"which put out logits and selected experts; got {name}"
        )
    routers = [_describe(causal, path, module, index) for path, (module, index) in found.items()]
    for what in ("num_experts", "num_experts_per_tok", "scoring_func"):
        kinds = {getattr(router, what) for router in routers}
        if len(kinds) > 1:
            raise ValueError(f"model must have routers alike in {what}; got {sorted(kinds)} in {name}")
    return routers


def _specifications(module: nn.Module) -> list[OutputRecorder] | None:
    """What a model class says of its routers; `None` if nothing."""
    recorded = getattr(module, "_can_record_outputs", None) or {}
    specifications = recorded.get("router_logits")
    if specifications is None:
        return None
    if not isinstance(specifications, list):
        specifications = [specifications]
    return [
        each if isinstance(each, OutputRecorder) else OutputRecorder(target_class=each, index=1)
        for each in specifications
    ]


def _recorded(
    module: nn.Module, path: str, specifications: list[OutputRecorder] | None
) -> Iterator[tuple[str, nn.Module, int | None]]:
    """(path, router, index of its logits) below a module, as Transformers looks for what it records."""
    matched: int | None = None
    if specifications is None:
        matches = UNRECORDED.search(_kind(module)) is not None
    else:
        matches = False
        for each in specifications:
            named = each.layer_name is None or f".{each.layer_name.strip('.')}." in f"{_WRAPPING.sub('', path)}."
            if named and isinstance(module, each.target_class):
                matches, matched = True, each.index
    if matches:
        inside = ROUTER_WITHIN.get(_kind(module))
        if inside is not None:
            router = resolve(module, inside)
            yield f"{path}.{inside}", router, LOGITS_INDEX.get(_kind(unwrapped(router)))
        else:
            yield path, module, matched
            return
    for name, child in module.named_children():
        below = specifications
        if isinstance(child, PreTrainedModel):
            below = _specifications(child)
        yield from _recorded(child, f"{path}.{name}" if path else name, below)


def _kind(module: nn.Module) -> str:
    """Name of a module's class, FSDP2's made-up class left aside."""
    return next(kind.__name__ for kind in type(module).__mro__ if not kind.__name__.startswith("FSDP"))


def _describe(causal: PreTrainedModel, path: str, module: Any, index: int | None) -> StockRouter:
    kind = _kind(module)
    above = path.rpartition(".")[0]
    parent: Any = unwrapped(resolve(causal, above))
    config = getattr(module, "config", getattr(parent, "config", None)) or causal.config.get_text_config(decoder=True)
    if kind in NO_LOGITS and index is None:
        raise ValueError(
            f"model must have routers that put out logits and selected experts: {kind} does so in newer versions of "
            f"Transformers; got {type(causal).__name__}"
        )
    bias = _find_bias(path, module) or _find_bias(above, parent, recurse=False)
    if bias is not None:
        num_experts = getattr(unwrapped(resolve(causal, bias[0])), bias[1]).numel()
    else:
        num_experts = _first(module, "num_experts", "num_router_classes", "out_features")
        if kind == "DogeCDMoE":
            num_experts = module.num_keys**2
        elif num_experts is None:
            num_experts = next(child.out_features for child in module.modules() if isinstance(child, nn.Linear))
    per_token = (
        _first(module, "top_k") or _first(parent, "top_k") or _first(config, "top_k_experts", "num_experts_per_tok")
    )

    named = SCORING_FIELD.get(kind)
    scoring: Any = "sigmoid" if (bias is not None) != (kind in SOFTMAX_WITH_BIAS + SIGMOID_WITHOUT_BIAS) else "softmax"
    if named is not None:
        scoring = getattr(causal.config.get_text_config(decoder=True), named)
    as_logits = LOGITS_OF.get(kind)
    if scoring == "sqrtsoftplus":
        scoring, as_logits = "softmax", _of_softplus
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"model must have routers that score by softmax or sigmoid; got {scoring} in {kind}")
    groups = _first(module, "num_group", "n_group") or 1
    return StockRouter(
        path=path,
        kind=kind,
        index=index,
        num_experts=num_experts,
        num_experts_per_tok=per_token,
        scoring_func=scoring,
        bias=bias,
        scores_take_bias=bias is not None and groups == 1 and as_logits is None and kind not in BIAS_ON_LOGITS,
        as_logits=as_logits,
    )


def _first(holder: Any, *names: str) -> Any:
    """The first of these attributes that there is."""
    return next((value for name in names if (value := getattr(holder, name, None)) is not None), None)


def _find_bias(path: str, holder: nn.Module, recurse: bool = True) -> tuple[str, str] | None:
    for name, module in holder.named_modules():
        if name and not recurse:
            break
        for bias in BIAS_NAMES:
            if isinstance(getattr(module, bias, None), Tensor):
                return _WRAPPING.sub("", f"{path}.{name}" if name else path), bias
    return None


def expert_sharing_group(model: PreTrainedModel) -> dist.ProcessGroup | None:
    """The ranks of Transformers 5.17's expert parallelism, which changes what routers put out; `None` without it."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or "ep_router" not in (model.tp_plan or {}).values():
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


@dataclass
class Routing:
    """What the routers put out in one forward pass, by layer."""

    num_layers: int
    num_experts: int
    sharing: dist.ProcessGroup | None
    """Ranks whose routers put out their own experts alone, numbered from 0: `expert_sharing_group`."""
    logits: dict[int, Tensor] = field(default_factory=dict)
    experts: dict[int, Tensor] = field(default_factory=dict)

    def layers(self, num_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """Logits `[N, E]` and selected experts `[N, K]` of each layer, in layer order.

        Raises:
            RuntimeError: a router did not run, or saw other tokens than `num_tokens`.
        """
        layers = range(self.num_layers)
        if any(layer not in self.logits or layer not in self.experts for layer in layers):
            ran = [layer for layer in layers if layer in self.logits]
            raise RuntimeError(f"each router must run in a forward pass; of {self.num_layers} these did: {ran}")
        rows = {len(self.logits[layer]) for layer in layers}
        if rows != {num_tokens}:
            raise RuntimeError(f"each router must see the {num_tokens} positions of the batch; got {sorted(rows)}")
        experts = [self.experts[layer] for layer in layers]
        if self.sharing is not None:
            experts = self._of_all_ranks(experts)
        return [self.logits[layer] for layer in layers], experts

    def _of_all_ranks(self, experts: list[Tensor]) -> list[Tensor]:
        """From a rank's own experts, with one number too many for those of other ranks, to the router's selection."""
        own = self.num_experts // dist.get_world_size(self.sharing)
        stacked = torch.stack(experts)
        summed = torch.where(stacked < own, stacked + own * dist.get_rank(self.sharing), 0)
        dist.all_reduce(summed, group=self.sharing)  # each selection is some one rank's
        return list(summed)


class RoutingRecorder:
    """Records what the routers of a stock model put out, while `routing` is there to hold it.

    Args:
        model: as for `find_routers`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = causal_language_model(model)
        self.routers = find_routers(model)
        self.routing: Routing | None = None
        """Where the forward pass under way is recorded; `None`: nowhere."""
        self._hooks = [RouterHook(self, layer) for layer in range(len(self.routers))]
        self._selection_hooks = [SelectionHook(self, layer) for layer in range(len(self.routers))]

    def blank(self) -> Routing:
        """To be put into `routing`, and filled in by a forward pass."""
        return Routing(len(self.routers), self.routers[0].num_experts, expert_sharing_group(self.model))

    def install(self) -> None:
        """Hook every router that is there now: PEFT may have put others in their place since the last call."""
        for router, hook, selection_hook in zip(self.routers, self._hooks, self._selection_hooks, strict=True):
            module = unwrapped(resolve(self.model, router.path))
            if hook not in module._forward_hooks.values():
                module.register_forward_hook(hook, prepend=True)  # before any that changes the output
            path = router.selection_path()
            if path is not None:
                module = unwrapped(resolve(self.model, path))
                if selection_hook not in module._forward_pre_hooks.values():
                    module.register_forward_pre_hook(selection_hook, prepend=True, with_kwargs=True)

    def remove(self) -> None:
        """Take all hooks away, those that PEFT copied with a router too."""
        for module in self.model.modules():
            remove_hooks(module, self._hooks + self._selection_hooks)

    @contextmanager
    def forward(self) -> Iterator[Routing]:
        """Record the forward pass inside: for looking on, in evaluation or training.

        Yields:
            What is filled in as the routers run; `layers` reads it afterwards.
        """
        self.install()
        self.routing = routing = self.blank()
        try:
            yield routing
        finally:
            self.routing = None


class RouterHook:
    """Forward hook of one router. An object, so that it can be told from others, copied and pickled."""

    def __init__(self, recorder: RoutingRecorder, layer: int) -> None:
        self.recorder = recorder
        self.layer = layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        routing = self.recorder.routing
        if routing is None:
            return
        router = self.recorder.routers[self.layer]
        routing.logits[self.layer] = router.logits(output)
        experts = router.selected_experts(output)
        if experts is not None:
            routing.experts[self.layer] = experts

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouterHook":
        return copy_with_model(self, self.recorder.model, memo)


class SelectionHook(RouterHook):
    """Pre-hook of the module that is given the selected experts."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        routing = self.recorder.routing
        if routing is not None:
            routing.experts[self.layer] = selection_in((*args, *kwargs.values()))


def copy_with_model(hook: Any, model: nn.Module, memo: dict[int, Any]) -> Any:
    """A hook's copy with the model's; where a part of the model alone is copied, as PEFT does, the hook itself."""
    if id(model) not in memo:
        return hook
    twin = object.__new__(type(hook))
    memo[id(hook)] = twin
    for name, value in vars(hook).items():
        setattr(twin, name, copy.deepcopy(value, memo))
    return twin


def remove_hooks(module: nn.Module, hooks: list[Any]) -> None:
    """Take these hooks off a module."""
    for kind in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in kind.items() if any(hook is each for each in hooks)]:
            for registry in (
                kind,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
                module._forward_pre_hooks_with_kwargs,
            ):
                registry.pop(key, None)
