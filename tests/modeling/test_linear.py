"""The linear layers are torch's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMLP

from equipoise import MoEConfig
from equipoise.modeling.linear import MoELinear, MoEMLP


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    turned=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_a_linear_layer(
    shape: list[int], widths: tuple[int, int], bias: bool, dtype: torch.dtype, turned: bool
) -> None:
    torch.manual_seed(0)
    mine, stock = (kind(*widths, bias=bias, dtype=dtype) for kind in (MoELinear, nn.Linear))
    stock.load_state_dict(mine.state_dict())
    inputs = torch.randn(*shape, widths[0], dtype=dtype)
    if turned and len(shape) > 1:
        inputs = inputs.transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for layer in (mine, stock):
        leaf = inputs.clone().requires_grad_()
        output = layer(leaf)
        gradients = torch.autograd.grad(output, [leaf, *layer.parameters()], torch.ones_like(output) / 3)
        results.append([output.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            found,
            expected,
            atol=1e-5 if dtype == torch.float32 else None,
            rtol=None if dtype != torch.float32 else 1e-5,
        )


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    layer = MoELinear(8, 4, bias=False)
    layer.weight.requires_grad_(frozen != "weight")
    inputs = torch.randn(20, 8, requires_grad=frozen != "input")
    layer(inputs).sum().backward()
    assert (layer.weight.grad is None) == (frozen == "weight")
    assert (inputs.grad is None) == (frozen == "input")


def test_autocast_is_obeyed() -> None:
    layer, inputs = MoELinear(8, 4), torch.randn(20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16


def test_the_mlp_is_the_stock_one() -> None:
    config = MoEConfig(hidden_size=16, num_attention_heads=2, intermediate_size=24, hidden_act="gelu")
    for width in (None, 40):
        mine, stock = MoEMLP(config, width), Glm4MoeMLP(config, width)
        stock.load_state_dict(mine.state_dict())
        inputs = torch.randn(3, 20, 16)
        torch.testing.assert_close(mine(inputs), stock(inputs), rtol=1e-5, atol=1e-6)
