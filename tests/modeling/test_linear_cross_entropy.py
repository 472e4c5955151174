"""The loss without logits, against the one with them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equipoise.modeling.linear_cross_entropy import CHUNK, linear_cross_entropy, plain_weight


def problem(tokens: int, width: int, vocabulary: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets in float64, of which a share bears loss."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=random, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=random, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=random)
    return hidden, weight, targets.masked_fill(torch.rand(tokens, generator=random) >= share, -100)


def materialised(
    hidden: Tensor, weight: Tensor, targets: Tensor, num_items: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    of_denominators = logits.logsumexp(-1).square() * targets.ne(-100)
    return (losses.sum() + z_loss * of_denominators.sum()) / num_items, losses


def gradients(function: Any, inputs: tuple[Tensor, Tensor], targets: Tensor, *arguments: Any) -> list[Tensor]:
    """Loss, token losses, gradients of thrice the loss."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    loss, losses = function(*leaves, targets, *arguments)
    return [loss.detach(), losses.detach(), *torch.autograd.grad(3 * loss, leaves)]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, num_items: float, z_loss: float) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(hidden, weight, targets, num_items=torch.tensor(num_items), z_loss=z_loss)


@given(
    tokens=st.sampled_from([1, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5]),
    width=st.integers(1, 24),
    vocabulary=st.integers(1, 90),
    share=st.sampled_from([0.0, 0.1, 0.8, 1.0]),
    num_items=st.sampled_from([1, 123]),
    z_loss=st.sampled_from([0.0, 0.01]),
    seed=st.integers(0, 100),
)
def test_it_is_the_loss_of_all_logits(
    tokens: int, width: int, vocabulary: int, share: float, num_items: int, z_loss: float, seed: int
) -> None:
    hidden, weight, targets = problem(tokens, width, vocabulary, share, seed)
    expected = gradients(materialised, (hidden, weight), targets, num_items, z_loss)
    found = gradients(ours, (hidden, weight), targets, num_items, z_loss)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12 * (1 + theirs.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_as_near_to_the_truth_as_all_logits_in_a_type_are(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(700, 64, 600, 0.9, 0)
    weight = weight / 8
    truth = gradients(materialised, (hidden, weight), targets, 630.0, 0.0)
    rounded = hidden.to(dtype), weight.to(dtype)
    theirs = gradients(materialised, rounded, targets, 630.0, 0.0)
    mine = gradients(ours, rounded, targets, 630.0, 0.0)
    for found, other, exact in zip(mine, theirs, truth, strict=True):
        error, allowed = ((tensor.double() - exact).norm() / exact.norm() for tensor in (found, other))
        assert error <= 1.5 * allowed + 1e-6
    assert mine[0].dtype == mine[1].dtype == torch.float32


def test_autocast_makes_products_in_its_type_and_gradients_in_the_weights() -> None:
    hidden, weight, targets = (
        tensor.float() if tensor.is_floating_point() else tensor for tensor in problem(300, 32, 80, 0.9, 1)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(ours, (hidden, weight), targets, 270.0, 0.0)
    rounded = gradients(ours, (hidden.bfloat16(), weight.bfloat16()), targets, 270.0, 0.0)
    assert found[2].dtype == found[3].dtype == torch.float32
    torch.testing.assert_close(found[0], rounded[0])
    torch.testing.assert_close(found[3], rounded[3].float(), rtol=1e-2, atol=1e-5)
    in_double = [tensor.double() for tensor in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):  # which leaves doubles alone
        exact = gradients(ours, (in_double[0], in_double[1]), targets, 270.0, 0.0)
    torch.testing.assert_close(exact[0], materialised(*in_double, targets, 270.0, 0.0)[0], rtol=1e-12, atol=0)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]])
    weight, targets = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([0, 0])
    loss, losses = linear_cross_entropy(hidden, weight, targets)
    assert losses.tolist() == [0, 2e4]
    assert loss.item() == 2e4


def test_without_tokens_that_bear_loss_it_is_zero() -> None:
    hidden, weight, _ = problem(5, 4, 6, 1.0, 0)
    loss, losses, of_hidden, of_weight = gradients(ours, (hidden, weight), torch.full((5,), -100), 1.0, 0.1)
    assert loss == 0
    assert not losses.any()
    assert not of_hidden.any()
    assert not of_weight.any()


class Largest(TorchDispatchMode):
    """The largest tensor that anything makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [
            tensor.untyped_storage().nbytes() // tensor.itemsize
            for tensor in tree_leaves(result)
            if isinstance(tensor, Tensor)
        ]
        self.elements = max([self.elements, *made])
        return result


def test_no_more_than_a_chunk_of_logits_is_ever_there() -> None:
    hidden, weight, targets = problem(8 * CHUNK, 16, 1000, 1.0, 0)
    with Largest() as largest:
        loss, _ = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
        loss.backward()
    assert largest.elements == CHUNK * 1000


@pytest.mark.parametrize("frozen", ["hidden states", "weight", "both"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen: str) -> None:
    hidden, weight, targets = problem(50, 8, 30, 1.0, 0)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden states")
    products: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.ops.aten.mm.default, torch.ops.mkldnn._linear_pointwise.default):
                products.append(str(function))
            return function(*args, **(kwargs or {}))

    with Products():
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert len(products) == (1 if frozen == "both" else 2)
    if frozen != "both":
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden states")
        assert (weight.grad is None) == (frozen == "weight")


def test_the_backward_pass_may_be_made_twice() -> None:
    """Gradients that are scaled in place would be scaled twice."""
    hidden, weight, targets = problem(50, 8, 30, 1.0, 0)
    loss, _ = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    once = torch.autograd.grad(2 * loss, hidden, retain_graph=True)[0].clone()
    twice = torch.autograd.grad(2 * loss, hidden, retain_graph=True)[0].clone()
    loss.backward()
    assert torch.equal(once, twice)
    assert hidden.grad is not None
    torch.testing.assert_close(2 * hidden.grad, once)


def test_logits_of_other_heads_are_made() -> None:
    head = nn.Linear(4, 6, bias=False)
    assert plain_weight(head) is head.weight
    assert plain_weight(nn.Linear(4, 6)) is None  # a bias
    assert plain_weight(nn.Sequential(head)) is None  # a wrapper
    assert plain_weight(type("Quantized", (nn.Linear,), {})(4, 6, bias=False)) is None
    assert plain_weight(head.to("meta")) is None  # offloaded
    split = nn.Linear(4, 6, bias=False)
    split.weight = nn.Parameter(torch.zeros(3, 4))  # a rank's rows; DeepSpeed's placeholder
    assert plain_weight(split) is None
    hooked = nn.Linear(4, 6, bias=False)
    hooked.forward = lambda states: states  # type: ignore[method-assign]  # as Accelerate's offloading does
    assert plain_weight(hooked) is None


def test_a_uniform_head_costs_the_logarithm_of_the_vocabulary() -> None:
    loss, _ = linear_cross_entropy(torch.randn(9, 4), torch.zeros(32, 4), torch.arange(9), num_items=9)
    assert loss.item() == pytest.approx(math.log(32), rel=1e-6)
