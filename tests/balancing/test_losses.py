"""Losses against their equations, written out token by token in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.balancing import (
    load_balancing_loss,
    load_fraction,
    mean_scores,
    router_z_loss,
    routing_scores,
    sequence_load_balancing_loss,
)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(2, 8), st.integers(0, 2**31))  # B, T, E, seed
scoring = st.sampled_from(["softmax", "sigmoid"])


def draw(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits [N, E] float64, selected experts [N, K], mask [B, T]."""
    batch, length, experts, seed = shape
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch * length, experts, generator=generator, dtype=torch.float64) * 3
    per_token = int(torch.randint(1, experts + 1, (), generator=generator))
    return logits, logits.topk(per_token).indices, torch.rand(batch, length, generator=generator) < 0.7


def scores_by_hand(row: list[float], scoring_func: str) -> list[float]:
    raw = [math.exp(x) if scoring_func == "softmax" else 1 / (1 + math.exp(-x)) for x in row]
    return [x / sum(raw) for x in raw]


def lbl_by_hand(logits: Tensor, selected: Tensor, tokens: list[int], scoring_func: str) -> float:
    experts = logits.shape[-1]
    load, score = [0.0] * experts, [0.0] * experts
    for token in tokens:
        for expert in selected[token].tolist():
            load[expert] += 1
        for expert, value in enumerate(scores_by_hand(logits[token].tolist(), scoring_func)):
            score[expert] += value
    if not tokens:
        return 0.0
    return experts * sum(f / sum(load) * p / len(tokens) for f, p in zip(load, score, strict=True))


@settings(max_examples=80)
@given(shapes, scoring)
def test_micro_batch_loss(shape: tuple[int, int, int, int], scoring_func: str) -> None:
    logits, selected, mask = draw(shape)
    flat = mask.flatten()
    load = torch.zeros(shape[2], dtype=torch.long)
    for row in selected[flat].tolist():
        load[row] += 1
    loss = load_balancing_loss(
        load_fraction(load, torch.float64), mean_scores(routing_scores(logits, scoring_func), flat)
    )
    expected = lbl_by_hand(logits, selected, flat.nonzero().flatten().tolist(), scoring_func)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=80)
@given(shapes, scoring)
def test_sequence_loss(shape: tuple[int, int, int, int], scoring_func: str) -> None:
    logits, selected, mask = draw(shape)
    loss = sequence_load_balancing_loss(routing_scores(logits, scoring_func), selected, mask)
    length, sequences = shape[1], []
    for row, tokens in enumerate(mask.tolist()):
        kept = [row * length + position for position, token in enumerate(tokens) if token]
        if kept:
            sequences.append(lbl_by_hand(logits, selected, kept, scoring_func))
    assert loss.item() == pytest.approx(sum(sequences) / max(len(sequences), 1), abs=1e-12)


@settings(max_examples=40)
@given(shapes)
def test_z_loss(shape: tuple[int, int, int, int]) -> None:
    logits, _, mask = draw(shape)
    rows = [row for row, token in zip(logits.tolist(), mask.flatten().tolist(), strict=True) if token]
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / max(len(rows), 1)
    assert router_z_loss(logits, mask.flatten()).item() == pytest.approx(expected, abs=1e-12)
    every = sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist()) / len(logits)
    assert router_z_loss(logits).item() == pytest.approx(every, abs=1e-12)


@given(st.integers(2, 64), st.integers(0, 2**31))
def test_balance_is_exactly_one(experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    any_scores = torch.rand(experts, generator=generator, dtype=torch.float64)
    even = torch.full((experts,), 1 / experts, dtype=torch.float64)
    assert load_balancing_loss(even, any_scores / any_scores.sum()).item() == pytest.approx(1.0)
    assert load_balancing_loss(any_scores / any_scores.sum(), even).item() == pytest.approx(1.0)


def test_padding_that_is_not_a_number_changes_nothing() -> None:
    logits = torch.randn(4, 3)
    scores = routing_scores(logits, "softmax")
    spoilt = scores.clone()
    spoilt[2:] = float("nan")
    mask = torch.tensor([True, True, False, False])
    assert torch.equal(mean_scores(spoilt, mask), mean_scores(scores, mask))


def test_sigmoids_that_all_underflow_still_sum_to_one() -> None:
    logits = torch.full((2, 4), -200.0, requires_grad=True)
    scores = routing_scores(logits, "sigmoid")
    assert scores.sum(-1).tolist() == pytest.approx([1.0, 1.0])
    scores[:, 0].sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_no_token_gives_zero_and_zero_gradient() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    load = torch.zeros(3, dtype=torch.long)
    scores = routing_scores(logits, "softmax")
    total = (
        load_balancing_loss(load_fraction(load), mean_scores(scores, nothing.flatten()))
        + sequence_load_balancing_loss(scores, logits.topk(2).indices, nothing)
        + router_z_loss(logits, nothing.flatten())
    )
    total.backward()
    assert total.item() == 0
    assert logits.grad.abs().max().item() == 0
