"""Saving, loading, placing and changing a model by the verbs of Transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise import MoEConfig, MoEForCausalLM
from tests.modeling.stock_twins import biased

Make = Callable[..., MoEConfig]
IDS = torch.randint(2, 64, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_config: Make) -> MoEForCausalLM:
    torch.manual_seed(0)
    return biased(MoEForCausalLM(tiny_config())).eval()


def assert_same_weights(got: MoEForCausalLM, expected: MoEForCausalLM) -> None:
    assert got.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_shards_hold_every_weight_and_bias_once(model: MoEForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    held: list[str] = []
    for shard in shards:
        with safe_open(shard, "pt") as tensors:
            held += tensors.keys()
    assert sorted(held) == sorted(model.state_dict())
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_leave_the_rest_as_it_was(tiny_config: Make, tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    model = biased(MoEForCausalLM(tiny_config(tie_word_embeddings=tied))).eval()
    logits = model(IDS).logits
    model.resize_token_embeddings(70, pad_to_multiple_of=8)
    assert model.config.vocab_size == 72
    close(model(IDS).logits[..., :64], logits)
    ids = IDS.clone()
    ids[:, -1] = 71  # a new token, also as a label
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(model(ids, labels=ids).loss, expected)
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert_same_weights(loaded, model)


def test_layers_on_disk_compute_what_they_computed(model: MoEForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": 90_000},
        offload_folder=tmp_path / "offload",
        offload_buffers=True,
    )
    assert "disk" in placed.hf_device_map.values()
    with torch.no_grad():
        close(placed(IDS).logits, model(IDS).logits)
    generated = [
        one.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
        for one in (placed, model)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_at_load(model: MoEForCausalLM, tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights in the type that was asked for, biases in fp32, bit for bit."""
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    loaded.set_experts_implementation("eager")  # grouped_mm has no double
    for name, value in loaded.state_dict().items():
        expected = model.state_dict()[name]
        wanted = expected if "correction_bias" in name else expected.to(dtype)
        assert value.dtype == wanted.dtype, name
        assert torch.equal(value, wanted), name
    assert loaded(IDS).logits.isfinite().all()
    assert loaded.config.dtype == dtype
    loaded.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").dtype == dtype


def test_logits_to_keep(model: MoEForCausalLM) -> None:
    logits = model(IDS).logits
    close(model(IDS, logits_to_keep=3).logits, logits[:, -3:])
    close(model(IDS, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])


@torch.no_grad()  # flex attention has no backward pass on CPUs
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("mask", ["none", "left", "right"])
def test_attention_backends_agree(model: MoEForCausalLM, attention: str, mask: str) -> None:
    inputs = {"input_ids": IDS}
    kept = torch.ones_like(IDS)
    if mask != "none":
        kept[0, slice(0, 4) if mask == "left" else slice(6, 10)] = 0
        inputs["attention_mask"] = kept
    model.set_attn_implementation("eager")
    expected = model(**inputs).logits
    model.set_attn_implementation(attention)
    close(model(**inputs).logits[kept.bool()], expected[kept.bool()])


def test_evaluation_compiles_to_one_graph(model: MoEForCausalLM) -> None:
    model.set_experts_implementation("grouped_mm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in (10, 7):
            close(compiled(IDS[:, :length]).logits, model(IDS[:, :length]).logits)


def test_every_weight_and_buffer_is_initialised(tiny_config: Make) -> None:
    """From a checkpoint that holds nothing of it, as in a fresh model: none is left as the memory was."""
    config = tiny_config(attention_bias=True, hidden_size=64, num_experts=32, initializer_range=0.02)
    torch.manual_seed(0)
    model = MoEForCausalLM.from_pretrained(None, config=config, state_dict={})
    fresh = MoEForCausalLM(config)
    buffers = dict(fresh.named_buffers())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        reference = dict(fresh.named_parameters()).get(name, buffers.get(name))
        assert value.isfinite().all(), name
        if reference.std() == 0 or name in buffers:
            assert torch.equal(value, reference), name
        else:
            assert value.mean().abs() < 4 * 0.02 / value.numel() ** 0.5, name
            assert value.std().item() == pytest.approx(0.02, rel=6 / value.numel() ** 0.5), name
