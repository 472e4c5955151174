"""Measures of imbalance in closed form, and the Balancer's metrics against one process that sees everything."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import (
    Balancer,
    dead_experts,
    expert_gradient_norms,
    expert_parallel_slowdown,
    load_cv,
    load_entropy,
    max_vio,
)


@pytest.mark.parametrize(
    ("load", "vio", "entropy", "cv", "dead"),
    [
        ([4, 4, 4, 4], 0.0, 1.0, 0.0, 0),
        ([16, 0, 0, 0], 3.0, 0.0, math.sqrt(3), 3),
        ([2, 1, 1, 0], 1.0, (0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4), math.sqrt(0.5), 1),
        ([0, 0, 0, 0], 0.0, 0.0, 0.0, 4),
    ],
)
def test_measures_in_closed_form(load: list[int], vio: float, entropy: float, cv: float, dead: int) -> None:
    counted = torch.tensor([load, load])
    assert max_vio(counted).tolist() == pytest.approx([vio, vio])
    assert load_entropy(counted).tolist() == pytest.approx([entropy, entropy])
    assert load_cv(counted).tolist() == pytest.approx([cv, cv])
    assert dead_experts(counted).tolist() == [dead, dead]


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_slowdown_is_the_slowest_rank(group_size: int, experts_per_rank: int, data: st.DataObject) -> None:
    experts = group_size * experts_per_rank
    load = data.draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    ranks = [sum(load[rank * experts_per_rank :][:experts_per_rank]) for rank in range(group_size)]
    expected = max(ranks) / (sum(ranks) / group_size) if sum(ranks) else 1.0
    assert expert_parallel_slowdown(torch.tensor(load), group_size).item() == pytest.approx(expected, rel=1e-5)


def test_slowdown_wants_a_divisor() -> None:
    with pytest.raises(ValueError, match=r"group_size must divide the number of experts \(6\); got 4"):
        expert_parallel_slowdown(torch.ones(6), 4)


def test_gradient_norms_of_each_expert(tiny_config: Callable[..., MoEConfig]) -> None:
    gradients = torch.randn(3, 4, 2), torch.randn(3, 5)
    expected = [math.sqrt(sum(float(g[expert].square().sum()) for g in gradients)) for expert in range(3)]
    assert expert_gradient_norms(*gradients).tolist() == pytest.approx(expected, rel=1e-5)

    model = MoEForCausalLM(tiny_config())
    assert model.expert_gradient_norms() is None
    ids = torch.randint(2, 64, (1, 3))
    outputs = model(ids, labels=ids, output_router_logits=True)
    outputs.loss.backward()
    norms = model.expert_gradient_norms()
    for layer, experts in enumerate(outputs.selected_experts):
        selected = torch.zeros(8).scatter_(0, experts.flatten(), 1.0).bool()
        assert torch.equal(norms[layer] > 0, selected), "an expert has a gradient if a token went to it"


def observe(balancer: Balancer, seed: int, tokens: int, favour: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, tokens, 8, generator=generator) + favour * torch.arange(8.0)
    experts = logits.topk(2).indices
    balancer.observe(list(logits), list(experts), batch_size=1)
    return logits, experts


@pytest.mark.parametrize("mode", ["none", "loss_free"])
def test_metrics_are_those_of_the_whole_batch(mode: Any) -> None:
    biases = [torch.zeros(8) for _ in range(2)]
    balancer = Balancer(mode, num_experts=8, biases=lambda: biases, expert_parallel_sizes=(2, 4))
    parts = [observe(balancer, seed, tokens, 0.3) for seed, tokens in ((0, 11), (1, 40), (2, 5))]
    assert balancer.metrics() == {}
    balancer.after_optimizer_step()
    metrics = balancer.metrics()

    loads = torch.stack([torch.nn.functional.one_hot(experts, 8).sum((1, 2)) for _, experts in parts])
    load = loads.sum(0)
    fraction = load / load.sum(-1, keepdim=True)
    mean_score = torch.cat([logits for logits, _ in parts], dim=1).softmax(-1).mean(1)
    assert torch.equal(metrics["load"], load)
    assert metrics["tokens"].item() == 56
    torch.testing.assert_close(
        metrics["load_balancing_loss_batch"], 8 * (fraction * mean_score).sum(-1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(metrics["max_vio_batch"], load.amax(-1) / (56 * 2 / 8) - 1)
    torch.testing.assert_close(metrics["max_vio_micro"], max_vio(loads).mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(metrics["largest_share"], fraction.amax(-1))
    torch.testing.assert_close(metrics["smallest_share"], fraction.amin(-1))
    for size in (2, 4):
        expected = torch.stack([expert_parallel_slowdown(part, size) for part in loads]).mean()
        torch.testing.assert_close(metrics[f"expert_parallel_slowdown_{size}"], expected, atol=1e-5, rtol=0)
    assert ("bias_range" in metrics) == (mode == "loss_free")


def test_a_loss_below_one_while_max_vio_grows_is_flagged() -> None:
    # Reported by OLMo-core: LBL 0.08 with 48 of 64 experts dead. Scores high where selections are few: here the bias
    # selects the experts that the scores speak against.
    balancer = Balancer("global_batch", num_experts=4)

    def batch(favoured: int, scored: int = 3) -> dict[str, torch.Tensor]:
        logits = torch.zeros(1, 64, 4)
        logits[..., scored] = 2.0  # the fourth, never selected, unless said otherwise
        experts = torch.arange(64)[:, None] % 3
        experts[:favoured] = 0
        balancer.loss(balancer.observe(list(logits), [experts], batch_size=1))
        balancer.after_optimizer_step()
        return balancer.metrics()

    for _ in range(20):
        metrics = batch(favoured=0)
    assert metrics["load_balancing_loss_batch"].item() < 0.99
    assert not metrics["token_gerrymandering"].any(), "MaxVio has not grown"
    for _ in range(10):
        metrics = batch(favoured=60)
    assert metrics["token_gerrymandering"].all()
    for _ in range(10):
        metrics = batch(favoured=64, scored=0)
    assert metrics["load_balancing_loss_batch"].item() > 1
    assert not metrics["token_gerrymandering"].any(), "LBL grows too: it says what there is to say"


def test_a_batch_without_tokens_is_no_balance_to_fall_from() -> None:
    balancer = Balancer("none", num_experts=4)
    logits = torch.zeros(1, 8, 4)
    logits[..., 3] = 2.0
    for tokens in (False, True, True, False, True):
        mask = torch.full((1, 8), tokens)
        balancer.observe(list(logits), [torch.zeros(8, 1, dtype=torch.long)], batch_size=1, mask=mask)
        balancer.after_optimizer_step()
        assert not balancer.metrics()["token_gerrymandering"].any(), "MaxVio is the same whenever there are tokens"
