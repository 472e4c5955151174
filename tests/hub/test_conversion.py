"""Conversion against the stock models themselves."""

import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stock_models import (
    CONFIGS,
    assert_same_logits,
    assert_same_tensors,
    load,
    randomise,
    saved_tensors,
    stock_config,
    stock_model,
)
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.hub import convert

ROOT = Path(__file__).parents[2]
MOE = ["qwen3_moe", "mixtral", "glm4_moe"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {}),
    ("qwen3_moe", {"tie_word_embeddings": True, "norm_topk_prob": False, "attention_bias": False, "head_dim": 4}),
    ("qwen3_moe", {"mlp_only_layers": [], "hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    ("qwen3_moe", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    ("mixtral", {}),
    (
        "mixtral",
        {"tie_word_embeddings": True, "head_dim": 6, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    ("mixtral", {"sliding_window": 64, "router_jitter_noise": 0.1}),
    ("glm4_moe", {}),
    ("glm4_moe", {"tie_word_embeddings": True, "use_qk_norm": False, "attention_bias": False, "n_shared_experts": 1}),
    ("glm4_moe", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 0}),
    ("glm4_moe", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}, "n_shared_experts": 0}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_logits_equal_the_stock_models(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    stock = stock_model(model_type, **changes)
    stock.save_pretrained(tmp_path / "stock", max_shard_size="10KB")
    convert(tmp_path / "stock", tmp_path / "ours", max_shard_size="8KB")
    ours = load(tmp_path / "ours")
    assert isinstance(ours, MoEForCausalLM)
    assert_same_logits(ours, stock)

    # What it wrote is what the model itself writes.
    ours.save_pretrained(tmp_path / "resaved")
    assert_same_tensors(tmp_path / "ours", tmp_path / "resaved")
    assert_same_config(tmp_path / "ours", tmp_path / "resaved")

    if model_type == "mixtral":
        return
    convert(tmp_path / "ours", tmp_path / "back", to=model_type)  # type: ignore[arg-type]
    assert_same_tensors(tmp_path / "back", tmp_path / "stock")
    assert_same_config(tmp_path / "back", tmp_path / "stock", differing={"num_nextn_predict_layers"})
    back = load(tmp_path / "back")
    assert_same_logits(back, stock)
    # It holds no such layer, and must not promise one to `generate(use_mtp=True)` or an engine.
    assert getattr(back.config, "num_nextn_predict_layers", 0) == 0


def assert_same_config(one: Path, other: Path, differing: Collection[str] = ()) -> None:
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (one, other))
    names = (mine.keys() | theirs.keys()) - set(differing)
    assert {name: mine.get(name) for name in names} == {name: theirs.get(name) for name in names}


@st.composite
def shapes(draw: st.DrawFn, model_type: str) -> dict[str, Any]:
    """Sizes that have nothing to do with each other, as far as the class lets them."""
    key_values = draw(st.sampled_from([1, 2]))
    experts = 2 * draw(st.integers(2, 5))
    layers = draw(st.integers(1, 3))
    changes: dict[str, Any] = {
        "num_key_value_heads": key_values,
        "num_attention_heads": key_values * draw(st.sampled_from([1, 2, 3])),
        "head_dim": draw(st.sampled_from([4, 8, 12])),
        "hidden_size": draw(st.sampled_from([12, 20])),
        "intermediate_size": draw(st.sampled_from([4, 28])),
        "num_hidden_layers": layers,
        "num_experts_per_tok": draw(st.integers(1, 4)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if model_type == "mixtral":
        return changes | {"num_local_experts": experts}
    changes |= {
        "moe_intermediate_size": draw(st.sampled_from([4, 20])),
        "attention_bias": draw(st.booleans()),
        "norm_topk_prob": draw(st.booleans()),
    }
    dense = draw(st.integers(0, layers))
    if model_type == "qwen3_moe":
        return changes | {"num_experts": experts, "mlp_only_layers": list(range(dense))}
    groups = draw(st.sampled_from([1, 2]))
    return changes | {
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": groups,
        "n_shared_experts": draw(st.integers(0, 2)),
        "first_k_dense_replace": dense,
        "use_qk_norm": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([0.5, 2.5])),
    }


@pytest.mark.parametrize("model_type", MOE)
@given(data=st.data())
@settings(max_examples=8)
def test_logits_equal_for_any_shape(model_type: str, data: st.DataObject) -> None:
    stock = stock_model(model_type, **data.draw(shapes(model_type)))
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(f"{folder}/stock")
        convert(f"{folder}/stock", f"{folder}/ours")
        assert_same_logits(load(f"{folder}/ours"), stock)
        if model_type != "mixtral":
            convert(f"{folder}/ours", f"{folder}/back", to=model_type)
            assert_same_tensors(Path(folder, "back"), Path(folder, "stock"))


def test_configurations_as_they_were_published(tmp_path: Path) -> None:
    """Written by Transformers 4, with fields that the class of Transformers 5 does not declare."""
    stock = stock_model("qwen3_moe", rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    stock.save_pretrained(tmp_path / "stock")
    file = tmp_path / "stock" / "config.json"
    written = json.loads(file.read_text())
    for name in ("rope_parameters", "dtype", "num_local_experts"):
        del written[name]
    written |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "num_experts": 6}
    written |= {
        "torch_dtype": "float32",
        "max_window_layers": 48,
        "transformers_version": "4.51.0",
        "temperature": 0.6,
    }
    file.write_text(json.dumps(written))
    convert(tmp_path / "stock", tmp_path / "ours")
    assert_same_logits(load(tmp_path / "ours"), stock)


# --- Out: models of ours ---


@pytest.fixture(scope="module")
def leaves_to_qwen3(tiny_config: Callable[..., MoEConfig]) -> MoEForCausalLM:
    config = tiny_config(num_shared_experts=0, attention_bias=True, tie_word_embeddings=True)
    return ours_at_random(config, constant_bias=0.25)


@pytest.fixture(scope="module")
def leaves_to_glm4(tiny_config: Callable[..., MoEConfig]) -> MoEForCausalLM:
    config = tiny_config(scoring_func="sigmoid", attention_bias=True, use_qk_norm=False)
    return ours_at_random(config, output_bias=False)


@torch.no_grad()
def ours_at_random(
    config: MoEConfig, constant_bias: float | None = None, *, output_bias: bool = True
) -> MoEForCausalLM:
    model = randomise(MoEForCausalLM(config))
    model.set_experts_implementation("eager")
    for bias in model.selection_biases():
        if constant_bias is not None:
            bias.fill_(constant_bias)
    for layer in model.model.layers:
        if not output_bias:
            layer.self_attn.o_proj.bias.zero_()
    return model


@pytest.mark.parametrize("to", ["qwen3_moe", "glm4_moe"])
def test_a_model_of_ours_leaves_and_comes_back(tmp_path: Path, to: Any, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue("leaves_to_" + to.removesuffix("_moe"))
    model.save_pretrained(tmp_path / "ours", max_shard_size="10KB")
    convert(tmp_path / "ours", tmp_path / "stock", to=to, max_shard_size="10KB")
    stock = load(tmp_path / "stock")
    assert stock.config.model_type == to
    assert_same_logits(stock, model)
    # The layout that engines read: what the stock class itself writes.
    stock.save_pretrained(tmp_path / "resaved")
    assert_same_tensors(tmp_path / "stock", tmp_path / "resaved")
    assert_same_config(tmp_path / "stock", tmp_path / "resaved")
    assert not [path for path in (tmp_path / "stock").iterdir() if path.suffix == ".py"]
    assert "auto_map" not in (tmp_path / "stock" / "config.json").read_text()

    convert(tmp_path / "stock", tmp_path / "again")
    back, before = saved_tensors(tmp_path / "again"), saved_tensors(tmp_path / "ours")
    for name in before:
        if to == "qwen3_moe" and name.endswith("e_score_correction_bias"):  # constant: as good as none
            assert not back[name].any()
        else:
            assert torch.equal(back[name], before[name]), name


def test_the_stock_layout_is_spelled_out(tmp_path: Path, leaves_to_qwen3: MoEForCausalLM) -> None:
    """The names that vLLM, SGLang and llama.cpp look for, whatever the installed Transformers writes."""
    leaves_to_qwen3.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", to="qwen3_moe")
    names = saved_tensors(tmp_path / "stock").keys()
    experts = {name.removeprefix("model.layers.2.mlp.") for name in names if "layers.2.mlp" in name}
    projections = ("gate_proj", "up_proj", "down_proj")
    assert experts == {"gate.weight"} | {f"experts.{e}.{part}.weight" for e in range(8) for part in projections}
    assert "model.layers.0.mlp.gate_proj.weight" in names


def train(model: MoEForCausalLM, steps: int) -> None:
    """Steps of training with balancing, on tokens that some experts see more of than others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        ids = torch.randint(2, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(step)) // 2
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.balancer.after_optimizer_step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize(
    ("to", "changes"),
    [
        ("qwen3_moe", {"num_shared_experts": 0, "balancing_mode": "global_batch"}),
        ("glm4_moe", {"scoring_func": "sigmoid", "balancing_mode": "loss_free", "bias_update_rate": 0.05}),
    ],
)
def test_a_trained_model_leaves_with_its_logits(
    tmp_path: Path, tiny_config: Callable[..., MoEConfig], to: Any, changes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(**changes))
    model.set_experts_implementation("eager")
    train(model, steps=4)
    moved = torch.stack(model.selection_biases())
    assert bool(moved.any()) == (to == "glm4_moe")
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", to=to)
    assert_same_logits(load(tmp_path / "stock"), model)


@pytest.mark.parametrize("model_type", MOE)
def test_a_converted_model_trains_with_balancing(tmp_path: Path, model_type: str) -> None:
    stock_model(model_type).save_pretrained(tmp_path / "stock")
    overrides = {"balancing_mode": "global_batch", "router_aux_loss_coef": 0.02}
    convert(tmp_path / "stock", tmp_path / "ours", config_overrides=overrides)
    model = load(tmp_path / "ours").train()
    assert model.config.router_aux_loss_coef == 0.02
    ids = torch.randint(1, 48, (2, 8))
    outputs = model(input_ids=ids, labels=ids)
    assert outputs.aux_losses["load_balancing_loss"] > 0.5
    torch.testing.assert_close(outputs.loss, outputs.lm_loss + 0.02 * outputs.aux_losses["load_balancing_loss"])
    outputs.loss.backward()
    model.balancer.after_optimizer_step()


# --- Files ---


def test_a_checkpoint_saved_fused_is_read_too(tmp_path: Path) -> None:
    for model_type in MOE:
        stock = stock_model(model_type)
        stock.save_pretrained(tmp_path / model_type)
        stock.save_pretrained(tmp_path / f"{model_type}_fused", save_original_format=False)
        assert any("experts.gate_up_proj" in name for name in saved_tensors(tmp_path / f"{model_type}_fused"))
        convert(tmp_path / model_type, tmp_path / f"{model_type}_ours")
        convert(tmp_path / f"{model_type}_fused", tmp_path / f"{model_type}_ours_too")
        assert_same_tensors(tmp_path / f"{model_type}_ours", tmp_path / f"{model_type}_ours_too")


@pytest.mark.parametrize("model_type", ["mixtral", "glm4_moe"])
def test_types_are_kept_but_for_the_selection_bias(tmp_path: Path, model_type: str) -> None:
    stock_model(model_type).to(torch.bfloat16).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours")
    convert(tmp_path / "stock", tmp_path / "fp16", dtype="float16")
    for folder, dtype in (("ours", torch.bfloat16), ("fp16", torch.float16)):
        for name, tensor in saved_tensors(tmp_path / folder).items():
            assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else dtype), name
        assert load(tmp_path / folder).dtype == dtype
    stock, ours = saved_tensors(tmp_path / "stock"), saved_tensors(tmp_path / "fp16")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(ours[name], stock[name].to(torch.float16))


def test_shards_have_an_index_that_is_right(tmp_path: Path) -> None:
    stock_model("qwen3_moe").save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours", max_shard_size="10KB")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    tensors = saved_tensors(tmp_path / "ours")
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 5
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}


def test_companions_go_along(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = tmp_path / "stock"
    stock = stock_model("qwen3_moe", vocab_size=len(tokenizer))
    stock.generation_config.update(temperature=0.7, do_sample=True, eos_token_id=[2, 3])
    stock.save_pretrained(source)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(source)
    (source / "LICENSE").write_text("do as you please")
    expected = {path.name for path in source.iterdir()}
    left = ("training_args.bin", "optimizer.pt", ".token", "hf_token.txt", "wandb_token", "my_tokens.bin")
    for name in left:
        (source / name).write_text("no companion")
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="qwen3_moe")
    for folder in (tmp_path / "ours", tmp_path / "back"):
        loaded = AutoTokenizer.from_pretrained(folder)
        assert loaded("Où est f1?").input_ids == tokenizer("Où est f1?").input_ids
        assert loaded.chat_template == tokenizer.chat_template
        generation = GenerationConfig.from_pretrained(folder)
        assert (generation.temperature, generation.eos_token_id) == (0.7, [2, 3])
        assert (folder / "LICENSE").read_text() == "do as you please"
    assert "auto_map" in json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (tmp_path / "ours" / "modeling_moe.py").is_file()
    assert {path.name for path in (tmp_path / "back").iterdir()} == expected
    assert not {path.name for path in (tmp_path / "ours").iterdir()} & set(left)


def test_what_fails_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_model("qwen3_moe").save_pretrained(tmp_path / "stock")
    monkeypatch.setattr("equipoise.hub.conversion.write_remote_code", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(tmp_path / "stock", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """400 MB in shards of 20 MB, to us and back, in a process that has already converted a tiny model."""
    stock_model("qwen3_moe").save_pretrained(tmp_path / "tiny")
    config = stock_config(
        "qwen3_moe", hidden_size=256, num_experts=16, moe_intermediate_size=512, num_hidden_layers=33
    )
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    large.to_empty(device="cpu").save_pretrained(tmp_path / "large", max_shard_size="20MB")
    assert sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")) > 400e6
    program = """
import re
from equipoise.hub import convert
for name in ("tiny", "large"):
    convert(name, f"{name}_ours", max_shard_size="20MB")
    convert(f"{name}_ours", f"{name}_back", to="qwen3_moe", max_shard_size="20MB")
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    tiny, all_of_it = (1024 * int(line) for line in run.stdout.split())
    print(f"peak {tiny / 1e6:.0f} MB with a tiny model, {(all_of_it - tiny) / 1e6:.0f} MB more with 400 MB of weights")
    assert all_of_it - tiny < 120e6


# --- What is refused, before anything is written ---


def refused(folder: Path, match: str, **arguments: Any) -> str:
    """The reasons given; nothing has been written."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match=match) as refusal:
        convert(folder, folder.parent / "output", **arguments)
    assert sorted(folder.parent.rglob("*")) == before
    return str(refusal.value)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("model_type", "changes", "match"),
    [
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 32}, r"sliding_window must be null, .*; got 32"),
        ("mixtral", {"sliding_window": 63}, r"sliding_window must be null, or at least max_pos.* \(64\).*; got 63"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"dense layers must be the first layers.*; got \[1\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"dense layers must be the first layers.*; got \[0, 2\]"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be absent"),
        ("qwen3_moe", {"clip_qkv": 8.0}, r"clip_qkv \(8.0\) is a field unknown here"),
        ("mixtral", {"chunk_size_feed_forward": 4}, r"chunk_size_feed_forward \(4\) is a field unknown here"),
        ("mixtral", {"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config must be absent"),
        ("mixtral", {"layer_types": ["sliding_attention"] * 3}, "layer_types .* is a field unknown"),
        ("qwen3_moe", {"is_causal": False}, "is_causal must be true: .*; got False"),
        ("qwen3_moe", {"is_causal": None}, "is_causal must be true: .*; got None"),
        ("mixtral", {"scale_embeddings": False}, r"scale_embeddings \(False\) is a field unknown here"),
        ("mixtral", {"residual_multiplier": 0}, r"residual_multiplier \(0\) is a field unknown here"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1; got 0"),
        ("qwen3_moe", {"dtype": "bogus"}, "stock/config.json must be of qwen3_moe; got .*bogus"),
        ("qwen3_moe", {"hidden_size": "16"}, "stock/config.json must be of qwen3_moe; got .*'hidden_size'"),
        (
            "qwen3_moe",
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "rope_type": "linear",
                    "factor": 2.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor must be 1: qwen3_moe rotates whole heads; got 0.5",
        ),
        (
            "qwen3_moe",
            {"model_type": "qwen2_moe"},
            "type must be glm4_moe or .*; got qwen2_moe .*shared expert has",
        ),
        ("qwen3_moe", {"model_type": "olmoe"}, "got olmoe .*queries and keys over their whole width"),
        ("qwen3_moe", {"model_type": "gpt_oss"}, "got gpt_oss .*sinks"),
        ("qwen3_moe", {"model_type": "qwen3"}, r"got qwen3 \(it is dense: scripts/upcycle.py"),
        ("qwen3_moe", {"model_type": "deepseek_v3"}, "got deepseek_v3 .*keep their own class"),
    ],
)
def test_models_that_would_change_are_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], match: str
) -> None:
    stock_model(model_type).save_pretrained(tmp_path / "stock")
    edit_config(tmp_path / "stock", **changes)
    refused(tmp_path / "stock", match)


def test_a_field_of_a_later_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stock class that learns a new trick must not be converted as if it had not."""

    class LaterConfig(CONFIGS["mixtral"]):  # type: ignore[misc]
        value_residual: bool = False

    monkeypatch.setitem(CONFIG_MAPPING._modules, "mixtral", None)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "mixtral", LaterConfig)
    stock_model("mixtral").save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "at_its_default")
    edit_config(tmp_path / "stock", value_residual=True)
    refused(tmp_path / "stock", r"value_residual \(True\) is a field unknown here")


def test_a_field_known_to_the_user_is_ignored(tmp_path: Path) -> None:
    stock_model("mixtral").save_pretrained(tmp_path / "stock")
    edit_config(tmp_path / "stock", packed_by="somebody", temperature=0.5, unknown_but_empty=None, use_mrope=False)
    edit_config(tmp_path / "stock", is_causal=True)
    refused(tmp_path / "stock", r"packed_by \(somebody\) is a field unknown here: if it changes no logits, name it")
    convert(tmp_path / "stock", tmp_path / "ours", ignore_config_fields=["packed_by"])


def test_all_reasons_come_at_once(tmp_path: Path, leaves_to_glm4: MoEForCausalLM) -> None:
    leaves_to_glm4.save_pretrained(tmp_path / "ours")
    edit_config(tmp_path / "ours", routed_scaling_factor=2.0, n_group=4, topk_group=2)
    reasons = refused(tmp_path / "ours", "cannot be converted", to="qwen3_moe").splitlines()[1:]
    assert reasons == [
        "- scoring_func must be softmax for qwen3_moe; got sigmoid",
        "- use_qk_norm must be true: qwen3_moe always normalises queries and keys; got False",
        "- num_shared_experts must be 0: qwen3_moe has no shared experts; got 1",
        "- routed_scaling_factor must be 1: qwen3_moe has no such factor; got 2.0",
        "- topk_group must be n_group (4): qwen3_moe selects among all experts; got 2",
        "- model.layers.1.mlp.gate.e_score_correction_bias, model.layers.2.mlp.gate.e_score_correction_bias must be "
        "the same for all experts of a layer: qwen3_moe selects without it; got other values",
    ]


@pytest.mark.parametrize(
    ("to", "changes", "match"),
    [
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func must be sigmoid for glm4_moe; got softmax"),
        ("glm4_moe", {}, r"layers.0.self_attn.o_proj.bias, .* must be zeros: glm4_moe has none; got other values"),
        (
            "qwen3_moe",
            {"scoring_func": "softmax", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be 1: qwen3_moe rotates whole heads; got 0.5",
        ),
    ],
)
def test_models_of_ours_that_would_change_are_refused(
    tmp_path: Path, tiny_config: Callable[..., MoEConfig], to: Any, changes: dict[str, Any], match: str
) -> None:
    config = tiny_config(**{"scoring_func": "sigmoid", "attention_bias": True} | changes)
    ours_at_random(config).save_pretrained(tmp_path / "ours")
    refused(tmp_path / "ours", match, to=to)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            "the weights must hold model.norm.weight; got no such",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.mlp.experts" in name],
            r"must hold model.layers.1.mlp.experts.0.gate_proj.weight, .* and 15 more; got no such tensor",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.gate_proj.bias": torch.zeros(24)}),
            "must hold nothing that .* no place to; got model.layers.0.mlp.gate_proj.bias",
        ),
        (
            lambda tensors: tensors.update({"model.layers.3.input_layernorm.weight": torch.zeros(16)}),
            "no place to; got model.layers.3.input_layernorm.weight",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(17)}),
            r"model.norm.weight must have shape \[16\]; got \[17\]",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16, dtype=torch.float8_e4m3fn)}),
            "model.norm.weight must be one of F64, F32, BF16, F16, not quantised; got F8_E4M3",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], Any], match: str
) -> None:
    stock_model("qwen3_moe").save_pretrained(tmp_path / "stock")
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "stock" / "model.safetensors")
    refused(tmp_path / "stock", match)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    refused(folder, "the model must be a folder with a config.json; got .*stock; `hf download USER/NAME --local-dir")
    stock_model("mixtral").save_pretrained(folder, max_shard_size="10KB")
    refused(folder, "config_overrides must be of balancing .*; got num_experts", config_overrides={"num_experts": 2})
    refused(folder, "Unit '5' not supported|5 XB", max_shard_size="5 XB")
    refused(folder, "type must be equipoise_moe; got mixtral", to="qwen3_moe")
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(folder, f"{shard.name} must be a whole safetensors file")
    shard.unlink()
    refused(folder, f"{shard.name} must be a whole safetensors file")
    index, config = folder / "model.safetensors.index.json", folder / "config.json"
    for content, reason in {
        "{": r"index.json must hold JSON; got Expecting",
        "[]": r"index.json must hold a mapping; got \[\]",
        "{}": "index.json weight_map must be a mapping; got None",
        '{"weight_map": {}}': "index.json weight_map must name the shards; got none",
        '{"weight_map": {"a": 1}}': "index.json weight_map a must be text; got 1",
    }.items():
        index.write_text(content)
        refused(folder, reason)
    index.unlink()
    refused(folder, "must be a folder with model.safetensors or its shards")
    for content, reason in {
        b"": "config.json must hold JSON; got Expecting",
        b"[]": r"config.json must hold a mapping; got \[\]",
        b"\xff": "config.json must hold JSON; got 'utf-8' codec",
    }.items():
        config.write_bytes(content)
        refused(folder, reason)


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    stock_model("mixtral").save_pretrained(tmp_path / "stock")
    (tmp_path / "output").mkdir()
    convert(tmp_path / "stock", tmp_path / "output")
    before = (tmp_path / "output" / "model.safetensors").stat()
    refused(tmp_path / "stock", "the output must be a folder that is new or empty; got")
    assert (tmp_path / "output" / "model.safetensors").stat() == before


# --- What is left behind ---


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """GLM-4-MoE's checkpoints hold one behind the last layer; Transformers does not load it either."""
    stock = stock_model("glm4_moe")
    stock.save_pretrained(tmp_path / "stock")
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    tensors |= {"model.layers.3.eh_proj.weight": torch.zeros(16, 32), "model.layers.3.enorm.weight": torch.zeros(16)}
    save_file(tensors, tmp_path / "stock" / "model.safetensors")
    notes = convert(tmp_path / "stock", tmp_path / "ours")
    assert any("num_nextn_predict_layers (1)" in note for note in notes)
    assert_same_logits(load(tmp_path / "ours"), stock)
    edit_config(tmp_path / "stock", num_nextn_predict_layers=0)
    refused(tmp_path / "stock", "no place to; got model.layers.3.eh_proj.weight")


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path: Path) -> None:
    stock_model("mixtral", tie_word_embeddings=True).save_pretrained(tmp_path / "stock")
    file = tmp_path / "stock" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    convert(tmp_path / "stock", tmp_path / "ours")
    assert "lm_head.weight" not in saved_tensors(tmp_path / "ours")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    refused(tmp_path / "stock", "no place to; got lm_head.weight")


def test_notes_say_what_is_not_carried(tmp_path: Path) -> None:
    stock_model("mixtral", router_jitter_noise=0.1, router_aux_loss_coef=0.02).save_pretrained(tmp_path / "stock")
    notes = convert(tmp_path / "stock", tmp_path / "ours")
    left = {"router_aux_loss_coef (0.02)", "router_jitter_noise (0.1)"}
    assert {note.split(" is not carried")[0] for note in notes} == left
    config = MoEConfig.from_pretrained(tmp_path / "ours")
    assert (config.router_aux_loss_coef, config.balancing_mode) == (0.01, "global_batch")


# --- The script ---


def test_the_script_converts_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["convert.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / "convert.py"), run_name="__main__")

    monkeypatch.chdir(tmp_path)
    stock_model("glm4_moe", attention_bias=False).save_pretrained("stock")
    overrides = "--config_overrides={balancing_mode: loss_free, bias_update_rate: 1e-2}"
    script("--model=stock", "--output=ours", overrides, "--dtype=bfloat16", "--max_shard_size=10KB")
    printed = capsys.readouterr().out
    assert "note: num_nextn_predict_layers (1): " in printed
    assert printed.endswith("written: ours\n")
    ours = load(tmp_path / "ours")
    assert (ours.config.balancing_mode, ours.config.bias_update_rate, ours.dtype) == (
        "loss_free",
        0.01,
        torch.bfloat16,
    )

    with pytest.raises(SystemExit) as refusal:
        script("--model=ours", "--output=back", "--to=qwen3_moe")
    assert str(refusal.value.code).startswith("error: ours cannot be converted:\n- ")
    assert "- scoring_func must be softmax for qwen3_moe; got sigmoid" in str(refusal.value.code)
    assert not (tmp_path / "back").exists()
