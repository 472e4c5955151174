"""Sizes from the configuration alone, against the models that they make."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.configuration import ModelSize, model_size
from equipoise.modeling import MoEExperts

PRESETS = sorted(file.parent for file in (Path(__file__).parents[2] / "hub_configs").glob("*/config.json"))


def counted(config: MoEConfig) -> ModelSize:
    """The size of the model as its modules have it: of a layer's experts, a token's selection acts on it."""
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    total, active = 0, 0
    seen: set[int] = set()
    for module in model.modules():
        own = [weight for weight in module.parameters(recurse=False) if id(weight) not in seen]
        seen |= {id(weight) for weight in own}
        numel = sum(weight.numel() for weight in own)
        total += numel
        if isinstance(module, MoEExperts):
            assert all(len(weight) == config.num_experts for weight in own)
            numel = sum(weight[0].numel() for weight in own) * config.num_experts_per_tok
        active += numel
    assert total == model.num_parameters()
    ends = {id(weight): weight.numel() for weight in (model.model.embed_tokens.weight, model.lm_head.weight)}
    return ModelSize(total=total, active=active, embeddings=sum(ends.values()))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_of_presets(preset: Path) -> None:
    config = AutoConfig.from_pretrained(preset)
    assert model_size(config) == counted(config)


@given(data=st.data())
@settings(max_examples=60)
def test_of_any_configuration(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    layers, key_value_heads, experts = draw(1, 4), draw(1, 3), draw(1, 9)
    config = MoEConfig(
        vocab_size=draw(1, 50),
        hidden_size=draw(1, 40),
        intermediate_size=draw(1, 30),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(0, layers),
        num_key_value_heads=key_value_heads,
        num_attention_heads=key_value_heads * draw(1, 3),
        head_dim=2 * draw(1, 6),
        use_qk_norm=data.draw(st.booleans()),
        attention_bias=data.draw(st.booleans()),
        tie_word_embeddings=data.draw(st.booleans()),
        num_experts=experts,
        num_experts_per_tok=draw(1, experts),
        num_shared_experts=draw(0, 3),
        moe_intermediate_size=draw(1, 20),
    )
    size = model_size(config)
    assert size == counted(config)
    assert size.active_without_embeddings == size.active - size.embeddings
