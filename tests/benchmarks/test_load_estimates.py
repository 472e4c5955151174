"""The benchmark of load estimates measures what the Balancer does: its loads are the synchronizer's."""

import sys
from pathlib import Path

import pytest
import torch

from equipoise.balancing import Balancer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from load_estimates import loads_under

E = 5


@pytest.mark.parametrize("estimate", ["running", "completed", "current", "exact"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_loads_are_those_of_the_balancer(estimate: str, ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randint(0, E, (7, 1), generator=generator) for _ in range(6)] for _ in range(2)]
    balancer = Balancer("global_batch", num_experts=E, load_estimate=estimate)
    for micro_batches in batches:
        # The micro-batches that several ranks would hold at once, as one of this process.
        steps = [torch.cat(micro_batches[start : start + ranks]) for start in range(0, 6, ranks)]
        if estimate == "exact":
            with balancer.prepass():
                for experts in steps:
                    balancer.observe([torch.zeros(len(experts), E)], [experts], batch_size=1)
        met = []
        for experts in steps:
            observed = balancer.observe([torch.zeros(len(experts), E)], [experts], batch_size=1)
            balancer.loss(observed)
            step = balancer._whole if estimate == "exact" else observed.counts
            met += [balancer._global_load(step).double()] * ranks
        previous = balancer.synchronizer.previous
        balancer.after_optimizer_step()
    loads = [torch.nn.functional.one_hot(experts, E).sum((0, 1))[None].float() for experts in batches[1]]
    for found, expected in zip(loads_under(estimate, loads, ranks, previous.load), met, strict=True):
        torch.testing.assert_close(found.double(), expected)
