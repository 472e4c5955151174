"""The order of draws: quotas, closed forms against going there draw by draw, and every block once per epoch."""

import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.order import BlockOrder, DomainOrder, generator, quotas

weights_of = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=8), draws=st.integers(8, 500))
def test_quotas_are_within_one_of_the_shares(weights: list[int], draws: int) -> None:
    found = quotas(weights, draws)
    assert found.sum() == draws
    assert found.min() >= 1
    shares = [Fraction(weight * draws, sum(weights)) for weight in weights]
    if min(shares) >= 1:
        assert all(abs(quota - share) < 1 for quota, share in zip(found, shares, strict=True))
    # A larger weight never has a smaller quota.
    assert all(found[i] <= found[j] for i in range(len(found)) for j in range(len(found)) if weights[i] < weights[j])


def test_a_tiny_weight_is_drawn_once_a_round() -> None:
    assert quotas([1e-9, 1.0, 1e-9], 100).tolist() == [1, 98, 1]
    assert quotas([5, 3, 2], 10).tolist() == [5, 3, 2]


@settings(max_examples=25)
@given(weights=weights_of, seed=st.integers(0, 3), start=st.integers(0, 40_000))
def test_the_number_drawn_before_is_what_was_drawn(weights: list[float], seed: int, start: int) -> None:
    order = DomainOrder(weights, seed=seed)
    counts = order.drawn_before(start)
    assert counts.sum() == start
    for position in range(start, start + 200):
        domain, earlier = (
            DomainOrder(weights, seed=seed).draw(position) if position % 97 == 0 else order.draw(position)
        )
        assert earlier == counts[domain]
        counts[domain] += 1
    assert np.array_equal(counts, order.drawn_before(start + 200))


def test_shares_are_the_weights() -> None:
    order = DomainOrder([6, 3, 1], seed=0)
    drawn = order.drawn_before(10 * 16_384)
    assert np.allclose(drawn / drawn.sum(), [0.6, 0.3, 0.1], atol=1 / 16_384)
    first = Counter(order.draw(position)[0] for position in range(1000))
    assert first[0] == pytest.approx(600, abs=60), "a round begins as it goes on"


def test_exact_weights_are_a_round() -> None:
    order = DomainOrder([3, 5], seed=0, exact=True)
    for round_number in range(3):
        drawn = [order.draw(8 * round_number + place) for place in range(8)]
        expected = {(0, 3 * round_number + k) for k in range(3)} | {(1, 5 * round_number + k) for k in range(5)}
        assert set(drawn) == expected


def test_rounds_and_seeds_differ() -> None:
    def draws(seed: int, round_number: int) -> list[int]:
        order = DomainOrder([20, 20], seed=seed, exact=True)
        return [order.draw(40 * round_number + place)[0] for place in range(40)]

    assert draws(0, 0) == draws(0, 0)
    assert len({tuple(draws(seed, number)) for seed in range(3) for number in range(3)}) == 9


def test_far_away_is_as_near_as_the_beginning() -> None:
    order = DomainOrder([1, 2, 3], seed=0)
    begin = time.perf_counter()
    order.draw(10**13)
    order.drawn_before(10**13)
    assert time.perf_counter() - begin < 5


@given(num_blocks=st.integers(1, 30), seed=st.integers(0, 3), domain=st.integers(0, 3))
def test_an_epoch_holds_each_block_once(num_blocks: int, seed: int, domain: int) -> None:
    order = BlockOrder(num_blocks, seed=seed, domain=domain)
    for epoch in (0, 1, 10**6):
        taken = [order[epoch * num_blocks + place] for place in range(num_blocks)]
        assert sorted(taken) == list(range(num_blocks))


def test_epochs_domains_and_seeds_shuffle_differently() -> None:
    def epoch(seed: int, domain: int, number: int) -> tuple[int, ...]:
        order = BlockOrder(40, seed=seed, domain=domain)
        return tuple(order[40 * number + place] for place in range(40))

    assert len({epoch(*place) for place in np.ndindex(3, 3, 3)}) == 27


def test_no_two_purposes_share_a_generator() -> None:
    # NumPy takes seeds that differ in trailing zeros for one.
    places = [(seed, purpose, *place) for seed in range(3) for purpose in (1, 2, 3) for place in ((), (0, 1), (1,))]
    assert len({tuple(generator(*place).integers(0, 1 << 60, 4)) for place in places}) == len(places)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_impossible_weights_are_named(weight: float) -> None:
    with pytest.raises(ValueError, match=f"weight must be above 0 and finite; got {weight}"):
        DomainOrder([1, weight], seed=0)


def test_exact_weights_of_many_blocks_are_shares() -> None:
    order = DomainOrder([90_000, 30_000], seed=0, exact=True)
    assert order.quotas.tolist() == [12_288, 4_096]
