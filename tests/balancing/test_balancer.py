"""Balancer in one process: scopes, shares of the global batch, counters and what closes a step."""

from contextlib import suppress

import pytest
import torch
from torch import Tensor

from equipoise.balancing import Balancer, load_balancing_loss, load_fraction, max_vio, mean_scores, routing_scores

E, K, L = 6, 2, 2


def routing(tokens: int, seed: int, layers: int = L) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logits = [
        torch.randn(tokens, E, generator=generator, dtype=torch.float64).mul(2).requires_grad_() for _ in range(layers)
    ]
    return logits, [layer.detach().topk(K).indices for layer in logits]


def counted(experts: Tensor) -> Tensor:
    return torch.stack([(experts == expert).sum() for expert in range(E)])


def lbl(logits: Tensor, load: Tensor) -> Tensor:
    return load_balancing_loss(load_fraction(load, torch.float64), mean_scores(routing_scores(logits, "softmax")))


def test_running_estimate_is_the_written_formula() -> None:
    balancer = Balancer("global_batch", num_experts=E, router_aux_loss_coef=0.5, load_estimate="running")
    sizes, labels, items = [4, 10, 6], [3, 9, 8], 20
    load = torch.zeros(L, E, dtype=torch.long)
    for size, label, seed in zip(sizes, labels, range(3), strict=True):
        logits, experts = routing(size, seed)
        load = load + torch.stack([counted(layer) for layer in experts])
        result = balancer.loss(balancer.observe(logits, experts, batch_size=2, num_labels=label), items)
        expected = sum(lbl(logits[layer], load[layer]) for layer in range(L)) / L
        torch.testing.assert_close(result.terms["load_balancing_loss"], expected.detach())
        torch.testing.assert_close(result.total, 0.5 * label / items * expected)
        gradient = torch.autograd.grad(result.total, logits)
        torch.testing.assert_close(gradient, torch.autograd.grad(0.5 * label / items * expected, logits))
    balancer.after_optimizer_step()
    assert torch.equal(balancer.metrics()["load"], load)
    assert balancer.synchronizer.running is None


def test_current_estimate_sees_one_micro_step() -> None:
    balancer = Balancer("global_batch", num_experts=E, load_estimate="current")
    for seed in range(2):
        logits, experts = routing(8, seed)
        term = balancer.loss(balancer.observe(logits, experts, batch_size=2)).terms["load_balancing_loss"]
        expected = sum(lbl(logits[layer], counted(experts[layer])) for layer in range(L)) / L
        torch.testing.assert_close(term, expected.detach())


def test_completed_estimate_is_the_written_formula() -> None:
    balancer = Balancer("global_batch", num_experts=E, load_estimate="completed")
    previous, seed = None, 0
    for sizes in ([4, 10, 6], [8, 2, 6], [9, 9, 9]):  # a smaller batch than the one before, then a larger one
        load, seen = torch.zeros(L, E, dtype=torch.double), 0
        for size in sizes:
            logits, experts = routing(size, seed)
            load, seen, seed = load + torch.stack([counted(layer) for layer in experts]), seen + size, seed + 1
            term = balancer.loss(balancer.observe(logits, experts, batch_size=1)).terms["load_balancing_loss"]
            unseen = 0.0 if previous is None else max(0.0, 1 - seen / previous[1])
            completed = load if previous is None else load + unseen * previous[0]
            expected = sum(lbl(logits[layer], completed[layer]) for layer in range(L)) / L
            torch.testing.assert_close(term, expected.detach())
        balancer.after_optimizer_step()
        previous = (load, seen)


def test_completed_estimate_forgets_a_skipped_batch_and_survives_saving() -> None:
    balancer, resumed = (Balancer("global_batch", num_experts=E, load_estimate="completed") for _ in range(2))
    for seed, skipped in ((0, False), (1, True)):
        for logits, experts in (routing(4, seed), routing(2, seed + 10)):
            balancer.loss(balancer.observe(logits, experts, batch_size=1))
        balancer.after_optimizer_step(skipped=skipped)
    batch = zip(routing(4, 0)[1], routing(2, 10)[1], strict=True)
    first = torch.stack([counted(torch.cat(layers)) for layers in batch])
    resumed.load_state_dict(balancer.state_dict())
    logits, experts = routing(3, 2)
    for candidate in (balancer, resumed):
        candidate.loss(candidate.observe(logits, experts, batch_size=1))
        expected = torch.stack([counted(layer) for layer in experts]) + 0.5 * first
        torch.testing.assert_close(candidate.synchronizer.completed_load(), expected.double())


def test_terms_add_up_with_their_coefficients() -> None:
    logits, experts = routing(8, 0)
    balancer = Balancer(
        "global_batch",
        num_experts=E,
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.25,
        complementary_balancing_mode="sequence",
        complementary_aux_loss_coef=0.125,
    )
    result = balancer.loss(balancer.observe(logits, experts, batch_size=4))
    assert set(result.terms) == {"load_balancing_loss", "complementary_loss", "router_z_loss"}
    expected = (
        0.5 * result.terms["load_balancing_loss"]
        + 0.125 * result.terms["complementary_loss"]
        + 0.25 * result.terms["router_z_loss"]
    )
    torch.testing.assert_close(result.total.detach(), expected)


@pytest.mark.parametrize("mode", ["none", "loss_free"])
def test_modes_without_a_loss_add_nothing_and_still_count(mode: str) -> None:
    biases = [torch.zeros(E) for _ in range(L)]
    balancer = Balancer(mode, num_experts=E, biases=lambda: biases)
    load = torch.zeros(L, E, dtype=torch.long)
    for seed in range(3):
        logits, experts = routing(5, seed)
        load += torch.stack([counted(layer) for layer in experts])
        result = balancer.loss(balancer.observe(logits, experts, batch_size=1))
        assert result.total.item() == 0
        assert result.terms == {}
    balancer.after_optimizer_step()
    metrics = balancer.metrics()
    assert torch.equal(metrics["load"], load)
    torch.testing.assert_close(metrics["max_vio_batch"], max_vio(load))


def test_loss_free_moves_biases_towards_balance_and_a_skipped_step_does_not() -> None:
    biases = [torch.zeros(E) for _ in range(L)]
    balancer = Balancer("loss_free", num_experts=E, bias_update_rate=0.01, biases=lambda: biases)
    logits, experts = routing(9, 0)
    balancer.observe(logits, experts, batch_size=1)
    balancer.after_optimizer_step(skipped=True)
    assert all(bias.abs().max() == 0 for bias in biases)
    assert balancer.metrics() == {}

    balancer.after_optimizer_step()  # the skipped step's counts must not come back
    assert all(bias.abs().max() == 0 for bias in biases)

    balancer.observe(logits, experts, batch_size=1)
    balancer.after_optimizer_step()
    for layer, bias in enumerate(biases):
        direction = torch.sign(counted(experts[layer]).double().mean() - counted(experts[layer]))
        torch.testing.assert_close(bias, (0.01 * (direction - direction.mean())).float())


def test_state_of_a_batch_under_way_survives() -> None:
    for mode in ("global_batch", "none"):
        straight, resumed = Balancer(mode, num_experts=E), Balancer(mode, num_experts=E)
        for seed in range(2):
            logits, experts = routing(6, seed)
            straight.loss(straight.observe(logits, experts, batch_size=1))
            if seed == 0:
                resumed.load_state_dict(straight.state_dict())
            else:
                resumed.loss(resumed.observe(logits, experts, batch_size=1))
        straight.after_optimizer_step()
        resumed.after_optimizer_step()
        assert torch.equal(straight.metrics()["load"], resumed.metrics()["load"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"balancing_mode": "global"}, "balancing_mode must be one of none, micro_batch"),
        ({"load_estimate": "future"}, "load_estimate must be one of current, running, completed, exact; got future"),
        ({"bias_update_rule": "nudge"}, "bias_update_rule must be one of sign, centred_sign, proportional"),
        ({"complementary_balancing_mode": "loss_free"}, "complementary_balancing_mode must be one of"),
        ({"balancing_mode": "loss_free"}, "needs biases"),
    ],
)
def test_unknown_settings_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Balancer(**arguments, num_experts=E)


@pytest.mark.parametrize("mode", ["none", "micro_batch", "sequence", "global_batch", "loss_free"])
@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_a_micro_batch_without_sequences_divides_by_nothing(mode: str, rule: str) -> None:
    biases = [torch.zeros(E) for _ in range(L)]
    balancer = Balancer(
        mode,
        num_experts=E,
        biases=lambda: biases,
        bias_update_rule=rule,
        router_z_loss_coef=0.1,
        complementary_balancing_mode="none" if mode == "sequence" else "sequence",
    )
    logits, experts = [torch.zeros(0, E, requires_grad=True) for _ in range(L)], [torch.zeros(0, K).long()] * L
    for items in (None, 0, 5):
        result = balancer.loss(balancer.observe(logits, experts, batch_size=0), items)
        assert result.total.item() == 0
        result.total.backward()
    balancer.after_optimizer_step()
    assert all(bias.abs().max() == 0 for bias in biases)
    assert all(torch.isfinite(value.double()).all() for value in balancer.metrics().values())


def test_exact_without_a_prepass_is_refused() -> None:
    balancer = Balancer("global_batch", num_experts=E, load_estimate="exact")
    logits, experts = routing(4, 0)
    with pytest.raises(RuntimeError, match="exact needs each global batch to go through"):
        balancer.loss(balancer.observe(logits, experts, batch_size=1))


def test_a_prepass_that_saw_another_batch_is_refused() -> None:
    balancer = Balancer("global_batch", num_experts=E, load_estimate="exact")
    with balancer.prepass():
        balancer.observe(*routing(4, 0), batch_size=1)
        with pytest.raises(RuntimeError, match="prepass must not be inside another"), balancer.prepass():
            pass
    balancer.loss(balancer.observe(*routing(5, 1), batch_size=1))
    with pytest.raises(RuntimeError, match="it saw 4 tokens, the step 5"):
        balancer.after_optimizer_step()
    with pytest.raises(RuntimeError, match="at least one micro-batch"), balancer.prepass():
        pass


def test_each_batch_needs_a_prepass_of_its_own_and_a_failed_one_leaves_nothing() -> None:
    balancer = Balancer("global_batch", num_experts=E, load_estimate="exact")
    for seed in range(2):
        with pytest.raises(RuntimeError, match="exact needs each global batch"):
            balancer.observe(*routing(4, seed), batch_size=1)
        with suppress(KeyError), balancer.prepass():
            balancer.observe(*routing(3, seed), batch_size=1)
            raise KeyError
        with pytest.raises(RuntimeError, match="exact needs each global batch"):
            balancer.observe(*routing(4, seed), batch_size=1)
        with balancer.prepass():
            balancer.observe(*routing(4, seed), batch_size=1)
        assert balancer.loss(balancer.observe(*routing(4, seed), batch_size=1)).total.item() > 0
        balancer.after_optimizer_step()
        assert balancer.metrics()["tokens"].item() == 4


def test_padding_that_is_not_a_number_reaches_no_gradient() -> None:
    logits, experts = routing(6, 0)
    spoilt = [layer.detach().clone() for layer in logits]
    for layer in spoilt:
        layer[4:] = float("nan")
        layer.requires_grad_()
    mask = torch.tensor([[True, True], [True, True], [False, False]])

    def gradients(layers: list[Tensor]) -> tuple[Tensor, ...]:
        balancer = Balancer(
            "global_batch", num_experts=E, router_z_loss_coef=0.1, complementary_balancing_mode="sequence"
        )
        return torch.autograd.grad(
            balancer.loss(balancer.observe(layers, experts, batch_size=3, mask=mask)).total, layers
        )

    for clean, found in zip(gradients(logits), gradients(spoilt), strict=True):
        assert torch.equal(found, clean)
        assert found[4:].abs().max() == 0


def test_no_accumulation_is_remembered_where_the_ranks_are_not() -> None:
    # Two ranks x one micro-step, resumed on one x one: nothing of a batch is unseen there either.
    balancer, resumed = Balancer("global_batch", num_experts=E), Balancer("global_batch", num_experts=E)
    balancer.loss(balancer.observe(*routing(9, 0), batch_size=1))
    balancer.after_optimizer_step()
    resumed.load_state_dict(balancer.state_dict())
    logits, experts = routing(3, 1)
    resumed.loss(resumed.observe(logits, experts, batch_size=1))
    expected = torch.stack([counted(layer) for layer in experts])
    assert torch.equal(resumed.synchronizer.completed_load(), expected.double())


def test_state_made_for_other_simulated_groups_loads() -> None:
    straight = Balancer("global_batch", num_experts=E, expert_parallel_sizes=(2, 3))
    resumed = Balancer("global_batch", num_experts=E, expert_parallel_sizes=(3,))
    for step in range(3):
        straight.loss(straight.observe(*routing(6, step), batch_size=1))
        if step < 2:
            straight.after_optimizer_step()
    resumed.load_state_dict(straight.state_dict())  # in the middle of the third batch
    before, after = straight.metrics(), resumed.metrics()
    assert "expert_parallel_slowdown_3" not in after
    for name in after:
        assert torch.equal(before[name], after[name]), name
    resumed.after_optimizer_step()
    assert "expert_parallel_slowdown_3" in resumed.metrics()
    with pytest.raises(ValueError, match=r"expert_parallel_sizes must divide num_experts \(6\); got 4"):
        Balancer("global_batch", num_experts=E, expert_parallel_sizes=(4,))
