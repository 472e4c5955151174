"""The order of domains and experts: what is alike stands together, whatever order it came in."""

import random
from itertools import pairwise

import pytest
import torch

from equipoise.analysis.ordering import domain_order, expert_order


@pytest.mark.parametrize("seed", range(5))
def test_domains_that_use_the_experts_alike_are_neighbours(seed: int) -> None:
    # Three families of domains, each with experts of its own, dealt out in any order.
    family = [0, 0, 0, 1, 1, 2, 2, 2]
    random.Random(seed).shuffle(family)
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(len(family), 2, 9, dtype=torch.float64, generator=generator) * 0.1
    for domain, of in enumerate(family):
        shares[domain, :, 3 * of : 3 * of + 3] += 1
    shares = shares / shares.sum(-1, keepdim=True)
    order = domain_order([shares, shares])
    assert sorted(order) == list(range(8))
    changes = sum(family[one] != family[other] for one, other in pairwise(order))
    assert changes == 2


def test_the_order_has_one_direction() -> None:
    shares = torch.rand(6, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = domain_order([shares / shares.sum(-1, keepdim=True)])
    assert order.index(0) < 3


@pytest.mark.parametrize("domains", [1, 2])
def test_one_or_two_domains_stay_as_they_are(domains: int) -> None:
    assert domain_order([torch.full((domains, 1, 4), 0.25, dtype=torch.float64)]) == list(range(domains))


def test_experts_are_ordered_by_their_domain_and_unused_ones_come_last() -> None:
    shares = torch.tensor([[0.0, 0.1, 0.2, 0.7, 0.0], [0.0, 0.5, 0.1, 0.1, 0.3]])
    assert expert_order(shares).tolist() == [3, 2, 1, 4, 0]
