"""The shape of a model, read off its modules, against the formula of ours and against the configurations of others."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_balancing import CHOSEN, EXPERTS, FAMILIES, qwen3_moe
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.analysis import Architecture
from equipoise.configuration import BalancingSettings, model_size


@settings(max_examples=15)
@given(st.data())
def test_sizes_of_ours_are_those_of_the_formula(data: st.DataObject) -> None:
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([2, 6, 8]))
    config = MoEConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=data.draw(st.sampled_from([16, 24])),
        moe_intermediate_size=data.draw(st.sampled_from([8, 12])),
        num_hidden_layers=layers,
        first_k_dense_replace=data.draw(st.integers(0, layers - 1)),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=data.draw(st.integers(1, experts)),
        num_shared_experts=data.draw(st.integers(0, 2)),
        tie_word_embeddings=data.draw(st.booleans()),
        scoring_func=data.draw(st.sampled_from(["softmax", "sigmoid"])),
        balancing_mode=data.draw(st.sampled_from(["none", "global_batch"])),
    )
    with torch.device("meta"):
        shape = Architecture.of(MoEForCausalLM(config))
    size = model_size(config)
    assert (shape.parameters, shape.active_parameters) == (size.total, size.active)
    for name in (
        "num_hidden_layers", "num_moe_layers", "num_experts", "num_experts_per_tok", "num_shared_experts",
        "moe_intermediate_size", "scoring_func", "hidden_size", "vocab_size",
    ):  # fmt: skip
        assert getattr(shape, name) == getattr(config, name), name
    assert shape.balancing == BalancingSettings.of(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    shape = Architecture.of(model)
    per_layer = 3 * 32 * 16  # of one expert: gate, up and down
    idle = shape.num_moe_layers * (EXPERTS - CHOSEN) * per_layer
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert shape.active_parameters == shape.parameters - idle
    assert (shape.num_experts, shape.num_experts_per_tok) == (EXPERTS, CHOSEN)
    assert (shape.num_hidden_layers, shape.num_moe_layers) == (3, 2 if family == "deepseek_v3" else 3)
    assert shape.num_shared_experts == (1 if family == "deepseek_v3" else 0)
    assert shape.scoring_func == ("sigmoid" if family == "deepseek_v3" else "softmax")
    assert shape.balancing is None
    model.save_pretrained(tmp_path)
    assert Architecture.read(tmp_path) == shape


def test_a_width_that_is_called_otherwise() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
    )
    with torch.device("meta"):
        shape = Architecture.of(MixtralForCausalLM(config))
    assert shape.moe_intermediate_size == 24
    assert shape.active_parameters == shape.parameters - 2 * 3 * 3 * 32 * 24


def test_adapters_are_seen_through() -> None:
    peft = pytest.importorskip("peft")
    bare = Architecture.of(qwen3_moe())
    model = peft.get_peft_model(qwen3_moe(), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    shape = Architecture.of(model)
    assert shape.parameters - bare.parameters == 3 * 2 * (32 + 32)
    assert shape.family == bare.family


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model must have routers: .* got LlamaForCausalLM"):
        Architecture.read(tmp_path)
