"""Queries and keys are rotated as in Transformers, and so are their gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

from equipoise.modeling.rotary import rotate


def inputs(
    batch: int, heads: tuple[int, int], length: int, width: int, rotated: int, angles: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Query and key as projections leave them, cosines and sines as no rotation has them: all differ."""
    torch.manual_seed(0)
    states = (torch.randn(batch, length, count, width).to(dtype).transpose(1, 2) for count in heads)
    return *(state.requires_grad_() for state in states), *torch.randn(2, angles, length, rotated).to(dtype)


def outcome(found: tuple[Tensor, Tensor], query: Tensor, key: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return [
        *found,
        *torch.autograd.grad(found, (query, key), [torch.randn(part.shape, dtype=part.dtype) for part in found]),
    ]


@given(
    batch=st.integers(1, 3),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 2)),
    length=st.integers(1, 5),
    halves=st.tuples(st.integers(1, 4), st.integers(0, 3)),
    each_its_own=st.booleans(),
)
def test_rotations_and_gradients_are_the_stock_ones(
    batch: int, heads: tuple[int, int], length: int, halves: tuple[int, int], each_its_own: bool
) -> None:
    """Stock code in float64; a part of each head may stay, and sequences may have positions of their own."""
    rotated, stays = 2 * halves[0], 2 * halves[1]
    angles = batch if each_its_own else 1
    query, key, cos, sin = inputs(batch, heads, length, rotated + stays, rotated, angles, torch.float64)
    mine = outcome(rotate(query, key, cos, sin, training=True), query, key)
    stock = outcome(apply_partial_rotary_pos_emb(query, key, cos, sin), query, key)
    for found, expected in zip(mine, stock, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("training", [True, False])
def test_types_are_the_stock_ones(dtype: torch.dtype, rotated: int, training: bool) -> None:
    query, key, cos, sin = inputs(2, (4, 2), 5, 8, rotated, 1, dtype)
    mine = outcome(rotate(query, key, cos, sin, training=training), query, key)
    stock = outcome(apply_partial_rotary_pos_emb(query, key, cos, sin), query, key)
    for found, expected in zip(mine, stock, strict=True):
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=2 * epsilon, atol=4 * epsilon)


def test_under_autocast_the_outcome_is_rounded_once() -> None:
    query, key, cos, sin = inputs(2, (4, 2), 5, 8, 8, 1, torch.float32)
    exact = rotate(query, key, cos, sin, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = rotate(query, key, cos, sin, training=True)
    for one, other in zip(rounded, exact, strict=True):
        assert torch.equal(one, other.bfloat16())
    gradients = torch.autograd.grad(rounded, (query, key), [torch.ones_like(part) for part in rounded])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_only_angles_are_kept_and_digits_do_not_depend_on_gradients() -> None:
    query, key, cos, sin = inputs(2, (4, 2), 5, 8, 8, 1, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = rotate(query, key, cos, sin, training=True)
    assert {tensor.data_ptr() for tensor in kept} == {cos.data_ptr(), sin.data_ptr()}
    with torch.no_grad():
        again = rotate(query, key, cos, sin, training=True)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
