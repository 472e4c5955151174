"""Pairs of experts against plain counting."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.analysis.coactivation import CoActivation
from equipoise.analysis.routing_trace import RoutedBatch


def observed(selected: torch.Tensor, mask: torch.Tensor, experts: int) -> CoActivation:
    """`selected` [L, B*T, K] and `mask` [B, T]."""
    pairs = CoActivation(num_layers=len(selected), num_experts=experts)
    batch = RoutedBatch(
        rows=torch.arange(len(mask)), input_ids=torch.zeros_like(mask).long(), mask=mask, router_logits=(),
        selected_experts=tuple(selected), scoring_func="softmax",
    )  # fmt: skip
    pairs.observe(batch)
    pairs.observe(batch)
    return pairs


@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(1, 4))
def test_counts_and_shares_match_plain_counting(seed: int, experts: int, chosen: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = min(chosen, experts)
    mask = torch.rand(3, 6, generator=generator) < 0.7
    scores = torch.rand(2, 18, experts, generator=generator)
    selected = scores.topk(chosen).indices
    pairs = observed(selected, mask, experts)
    tokens = [token for token, real in enumerate(mask.flatten().tolist()) if real] * 2
    for layer in range(2):
        together = [[0] * experts for _ in range(experts)]
        for token in tokens:
            for one in selected[layer, token].tolist():
                for other in selected[layer, token].tolist():
                    together[one][other] += 1
        assert pairs.count[layer].tolist() == together
        for one in range(experts):
            load = together[one][one]
            shares = pairs.conditional()[layer, one]
            for other in range(experts):
                expected = together[one][other] / load if load and other != one else 0
                assert abs(float(shares[other]) - expected) < 1e-12
            if load:
                assert abs(float(shares.sum()) - (chosen - 1)) < 1e-12


def test_lift_is_one_where_partners_are_taken_as_they_are_loaded() -> None:
    # Every pair of four experts equally often.
    pairs = torch.tensor([[[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]])
    lift = observed(pairs, torch.ones(2, 3, dtype=torch.bool), 5).lift()[0]
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(lift[:4, :4][off_diagonal], torch.ones(12, dtype=torch.float64))
    assert bool(lift[4].isnan().all())  # a dead expert
    assert bool(lift.diagonal().isnan().all())


def test_lift_of_couples() -> None:
    # Two couples that keep to themselves: three possible partners, one taken.
    pairs = torch.tensor([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    lift = observed(pairs, torch.ones(2, 2, dtype=torch.bool), 4).lift()[0]
    assert lift[0, 1] == lift[3, 2] == 3
    assert lift[0, 2] == lift[1, 3] == 0


def test_one_expert_a_token_has_no_partner() -> None:
    pairs = observed(torch.zeros(1, 4, 1, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool), 3)
    assert pairs.conditional().sum() == 0
    assert bool(pairs.lift().isnan().all())
