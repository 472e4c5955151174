"""Modes that change in the middle of training: by the schedule, and when a run resumes under another configuration."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import Balancer


def batch(balancer: Balancer, seed: int) -> set[str]:
    """One global batch of 10 tokens; returns the names of the losses that acted."""
    logits = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(seed)) + torch.arange(4.0)
    observed = balancer.observe(list(logits), list(logits.topk(1).indices), batch_size=1)
    terms = balancer.loss(observed).terms
    balancer.after_optimizer_step()
    return set(terms)


@pytest.mark.parametrize("unit", ["step", "tokens"])
def test_the_schedule_switches_mode_coefficient_and_rate(unit: str) -> None:
    scale = 1 if unit == "step" else 10
    biases = [torch.zeros(4)]
    balancer = Balancer(
        "micro_batch",
        num_experts=4,
        bias_update_rate=0.1,
        biases=lambda: biases,
        balancing_schedule=[
            {unit: 2 * scale, "balancing_mode": "global_batch", "router_aux_loss_coef": 0.5},
            {unit: 3 * scale, "balancing_mode": "loss_free"},
            {unit: 5 * scale, "bias_update_rate": 0},
        ],
    )
    seen = []
    for step in range(7):
        mode = balancer.settings.balancing_mode
        terms = batch(balancer, step)
        seen.append((mode, balancer.settings.router_aux_loss_coef, bool(terms), biases[0].clone()))
    assert [mode for mode, *_ in seen] == ["micro_batch"] * 2 + ["global_batch"] + ["loss_free"] * 4
    assert [acted for _, _, acted, _ in seen] == [True] * 3 + [False] * 4
    moved = [not torch.equal(one[-1], other[-1]) for one, other in pairwise(seen)]
    # DeepSeek-V3's late u = 0: the bias stays where it is, and stays in the selection.
    assert moved == [False, False, True, True, False, False]
    assert seen[-1][-1].abs().max() > 0


def test_a_skipped_step_does_not_count_in_the_schedule() -> None:
    balancer = Balancer("none", num_experts=4, balancing_schedule=[{"step": 1, "balancing_mode": "global_batch"}])
    logits = torch.randn(1, 10, 4)
    balancer.observe(list(logits), list(logits.topk(1).indices), batch_size=1)
    balancer.after_optimizer_step(skipped=True)
    assert (balancer.steps, balancer.settings.balancing_mode) == (0, "none")


def test_a_schedule_that_reaches_loss_free_needs_biases() -> None:
    with pytest.raises(ValueError, match="loss_free needs biases"):
        Balancer("none", num_experts=4, balancing_schedule=[{"step": 9, "balancing_mode": "loss_free"}])


def test_a_resumed_run_is_where_the_schedule_left_it() -> None:
    schedule = [{"step": 2, "balancing_mode": "global_batch"}, {"tokens": 40, "balancing_mode": "sequence"}]
    straight = Balancer("none", num_experts=4, balancing_schedule=schedule)
    for step in range(3):
        batch(straight, step)
    resumed = Balancer("none", num_experts=4, balancing_schedule=schedule)
    resumed.load_state_dict(straight.state_dict())
    for name, value in straight.metrics().items():
        assert torch.equal(resumed.metrics()[name], value), name
    for step in (3, 4):
        assert resumed.settings.balancing_mode == ("global_batch" if step == 3 else "sequence")
        assert batch(resumed, step) == batch(straight, step)
        assert torch.equal(resumed.metrics()["load"], straight.metrics()["load"])


@pytest.mark.parametrize("mode", ["none", "micro_batch", "sequence", "global_batch", "loss_free"])
@pytest.mark.parametrize("later", ["none", "micro_batch", "sequence", "global_batch", "loss_free"])
def test_any_mode_resumes_in_any_other(tiny_config: Callable[..., MoEConfig], mode: str, later: str) -> None:
    # The paper's switching experiment, by the configuration of the resumed run.
    ids = torch.randint(2, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    first = MoEForCausalLM(tiny_config(balancing_mode=mode, bias_update_rate=0.05)).train()
    for _ in range(2):
        first(ids, labels=ids).loss.backward()
        first.balancer.after_optimizer_step()
    second = MoEForCausalLM(tiny_config(balancing_mode=later, bias_update_rate=0.05)).train()
    second.load_state_dict(first.state_dict())
    second.balancer.load_state_dict(first.balancer.state_dict())
    before = torch.stack(second.selection_biases()).clone()
    assert torch.equal(before, torch.stack(first.selection_biases()))
    assert (before.abs().max() > 0) == (mode == "loss_free")
    outputs = second(ids, labels=ids)
    assert bool(outputs.aux_losses) == (later in ("micro_batch", "sequence", "global_batch"))
    second.balancer.after_optimizer_step()
    assert second.balancer.steps == 3
    assert torch.equal(before, torch.stack(second.selection_biases())) == (later != "loss_free")
