"""The norm is the stock one, and its gradients are the definition's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm

from equipoise.modeling.norm import MoERMSNorm


def written_out(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def norm(width: int, dtype: torch.dtype, seed: int) -> MoERMSNorm:
    torch.manual_seed(seed)
    module = MoERMSNorm(width, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.normal_()
    return module


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.sampled_from([1, 3, 16, 40]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 100),
)
def test_outputs_and_gradients_are_the_definitions(shape: list[int], width: int, scale: float, seed: int) -> None:
    module = norm(width, torch.float64, seed)
    hidden = (scale * torch.randn(*shape, width, dtype=torch.float64)).requires_grad_()
    gradient = torch.randn(*shape, width, dtype=torch.float64)
    expected = written_out(hidden, module.weight, 1e-5)
    found = module(hidden)
    torch.testing.assert_close(found, expected)
    inputs = hidden, module.weight
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_types_are_those_of_the_stock_norm(
    training: bool, grad: bool, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    module = norm(24, weight_dtype, seed=0).train(training)
    stock = Glm4MoeRMSNorm(24, eps=1e-5).to(weight_dtype)
    stock.load_state_dict(module.state_dict())
    hidden = torch.randn(2, 7, 24, dtype=hidden_dtype, requires_grad=True)
    with torch.set_grad_enabled(grad):
        found, expected = module(hidden), stock(hidden)
    assert found.dtype == expected.dtype
    coarsest = max(torch.finfo(kind).eps for kind in (hidden_dtype, weight_dtype))
    torch.testing.assert_close(found.double(), expected.double(), rtol=2 * coarsest, atol=2 * coarsest)
    if not grad:
        return
    inputs = hidden, module.weight
    mine = torch.autograd.grad(found.sum(), inputs)
    theirs = torch.autograd.grad(expected.sum(), (hidden, stock.weight))
    for my, their in zip(mine, theirs, strict=True):
        assert my.dtype == their.dtype
        torch.testing.assert_close(my.double(), their.double(), rtol=20 * coarsest, atol=20 * coarsest)


def test_autocast_changes_nothing() -> None:
    module, hidden = norm(24, torch.float32, seed=0), torch.randn(2, 7, 24, requires_grad=True)
    inputs = hidden, module.weight
    plain = module(hidden), *torch.autograd.grad(module(hidden).square().sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = module(hidden), *torch.autograd.grad(module(hidden).square().sum(), inputs)
    for one, other in zip(plain, under, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_training_computes_the_same_digits_with_and_without_gradient() -> None:
    """Reentrant checkpointing and the prepass run the forward pass without: a rounding would move tokens."""
    module, hidden = norm(24, torch.float32, seed=0), torch.randn(2, 7, 24)
    with torch.no_grad():
        without = module(hidden)
    assert torch.equal(without, module(hidden))


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    module, hidden, kept = norm(64, torch.float32, seed=0), torch.randn(100, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(hidden)
    assert sum(tensor.numel() for tensor in kept) == hidden.numel() + module.weight.numel() + 100
    assert any(tensor.data_ptr() == hidden.data_ptr() for tensor in kept)
