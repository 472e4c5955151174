"""Each bias update rule against its written formula, and as a loop: does it bring balance?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise import MoEConfig
from equipoise.balancing import (
    Balancer,
    BiasUpdate,
    CentredSignUpdate,
    ProportionalUpdate,
    QuantileUpdate,
    SignUpdate,
    TanhMomentumUpdate,
    max_vio,
)
from equipoise.modeling import MoERouter

loads = st.integers(2, 24).flatmap(
    lambda experts: st.lists(
        st.lists(st.integers(0, 10**12), min_size=experts, max_size=experts), min_size=1, max_size=3
    )
)


def draw_biases(load: list[list[int]], seed: int) -> Tensor:
    biases = torch.randn(len(load), len(load[0]), generator=torch.Generator().manual_seed(seed))
    return biases - biases.mean(-1, keepdim=True)


def centred(row: list[float]) -> list[float]:
    return [value - sum(row) / len(row) for value in row]


def shortfalls(row: list[int]) -> list[float]:
    mean = sum(row) / len(row)
    return [(mean - n) / mean if mean else 0.0 for n in row]


def signs(row: list[int]) -> list[int]:
    total, experts = sum(row), len(row)  # in integers: no rounding decides a tie
    return [(total > experts * n) - (total < experts * n) for n in row]


@given(loads, st.integers(0, 2**31), st.floats(0, 1))
def test_rules_are_their_formulas(load: list[list[int]], seed: int, rate: float) -> None:
    biases, counted = draw_biases(load, seed), torch.tensor(load)
    rows = list(zip(biases.double().tolist(), load, strict=True))
    formulas: list[tuple[BiasUpdate, list[list[float]]]] = [
        (SignUpdate(), [centred([b + rate * s for b, s in zip(bias, signs(row), strict=True)]) for bias, row in rows]),
        (
            CentredSignUpdate(),
            [[b + rate * s for b, s in zip(bias, centred(signs(row)), strict=True)] for bias, row in rows],
        ),
        (
            ProportionalUpdate(),
            [centred([b + rate * v for b, v in zip(bias, shortfalls(row), strict=True)]) for bias, row in rows],
        ),
    ]
    for rule, expected in formulas:
        updated = rule.update(biases, counted, rate, None)
        assert updated.dtype == torch.float32
        torch.testing.assert_close(updated.double(), torch.tensor(expected).double(), atol=2e-5, rtol=0)


@given(st.lists(loads, min_size=1, max_size=4), st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 0.99))
def test_tanh_momentum_is_its_formula(batches: list, seed: int, rate: float, momentum: float) -> None:
    load = batches[0]
    history = [load] + [[[n // (step + 2) for n in row] for row in load] for step in range(len(batches))]
    rule, biases = TanhMomentumUpdate(kappa=1.5, momentum=momentum), draw_biases(load, seed)
    expected, mean_step = biases.double().tolist(), [[0.0] * len(load[0]) for _ in load]
    for batch in history:
        biases = rule.update(biases, torch.tensor(batch), rate, None)
        for layer, row in enumerate(batch):
            step = centred([rate * math.tanh(1.5 * v) for v in shortfalls(row)])
            mean_step[layer] = [momentum * m + (1 - momentum) * d for m, d in zip(mean_step[layer], step, strict=True)]
            expected[layer] = [b + m for b, m in zip(expected[layer], mean_step[layer], strict=True)]
    torch.testing.assert_close(biases.double(), torch.tensor(expected).double(), atol=5e-5, rtol=0)
    resumed = TanhMomentumUpdate(kappa=1.5, momentum=momentum)
    resumed.load_state_dict(rule.state_dict())
    again = torch.tensor(load)
    assert torch.equal(resumed.update(biases, again, rate, None), rule.update(biases, again, rate, None))


def test_small_updates_are_not_lost() -> None:
    # In bf16, 0.5 + 0.001 is 0.5.
    biases = torch.tensor([[0.5, -0.5]])
    assert SignUpdate().update(biases, torch.tensor([[0, 2]]), 1e-3, None)[0, 0].item() > 0.5


# --- Rules at work: tokens with fixed scores, experts selected by score plus bias ---


def draw_scores(tokens: int, experts: int, seed: int = 0, centre: float = 0.0, spread: float = 1.0) -> Tensor:
    """Sigmoid scores `[1, N, E]` that favour some experts."""
    generator = torch.Generator().manual_seed(seed)
    favour = torch.randn(experts, generator=generator)
    return (centre + spread * (torch.randn(1, tokens, experts, generator=generator) + favour)).sigmoid()


def selections(scores: Tensor, biases: Tensor, per_token: int) -> Tensor:
    chosen = (scores + biases[:, None]).topk(per_token).indices.flatten(1)
    return torch.zeros(1, scores.shape[-1], dtype=torch.long).scatter_add_(1, chosen, torch.ones_like(chosen))


def run(rule: BiasUpdate, rate: float, steps: int, scores: Tensor, per_token: int) -> tuple[Tensor, float]:
    """Biases and MaxVio after `steps` global batches of the same tokens."""
    biases = torch.zeros(1, scores.shape[-1])
    for _ in range(steps):
        rule.observe(scores, biases, per_token, None)
        load = selections(scores, biases, per_token)
        biases = rule.update(biases, load, rate, rule.gathered())
        rule.forget()
    return biases, max_vio(selections(scores, biases, per_token)).item()


@pytest.mark.parametrize(
    ("rule", "rate"),
    [
        (SignUpdate, 0.005),
        (CentredSignUpdate, 0.005),
        (ProportionalUpdate, 0.02),
        (TanhMomentumUpdate, 0.01),
        (QuantileUpdate, 0.2),
    ],
)
def test_every_rule_brings_balance_and_stays_centred(rule: type[BiasUpdate], rate: float) -> None:
    scores = draw_scores(4000, 16)
    assert max_vio(selections(scores, torch.zeros(1, 16), 4)).item() > 1
    biases, vio = run(rule(), rate, 300, scores, 4)
    assert vio < 0.06
    # Uncentred, one released model's biases drifted to 7, where bf16 leaves them 8 values.
    assert abs(biases.mean().item()) < 1e-5


def test_group_limited_routing_is_brought_to_balance_too() -> None:
    config = MoEConfig(hidden_size=16, head_dim=2, num_experts=16, num_experts_per_tok=2, n_group=4, topk_group=2)
    config.scoring_func = "sigmoid"
    torch.manual_seed(0)
    gate = MoERouter(config)
    torch.nn.init.normal_(gate.weight, std=0.3)
    tokens = torch.randn(3000, 16) + 0.7  # a common direction: some experts are everyone's first choice
    biases = [gate.e_score_correction_bias]
    balancer = Balancer(
        "loss_free", num_experts=16, scoring_func="sigmoid", bias_update_rate=0.003, biases=lambda: biases
    )
    vio = []
    for _ in range(400):
        with torch.no_grad():
            logits, _, experts = gate(tokens)
        groups = experts // 4
        assert ((groups == groups[:, :1]) | (groups == groups[:, 1:])).all()
        balancer.observe([logits], [experts], batch_size=1)
        balancer.after_optimizer_step()
        vio.append(balancer.metrics()["max_vio_batch"].item())
    assert vio[0] > 1
    assert min(vio[-20:]) < 0.1


def test_biases_of_a_released_model_keep_their_mean_under_centred_sign() -> None:
    offset = torch.tensor([[7.0, 6.9, 7.05, 6.85]])
    load = torch.tensor([[3, 1, 1, 1]])
    assert CentredSignUpdate().update(offset, load, 0.01, None).mean().item() == pytest.approx(6.95, abs=1e-5)
    assert SignUpdate().update(offset, load, 0.01, None).mean().item() == pytest.approx(0, abs=1e-5)


# --- The quantile rule ---


def exact_quantiles(scores: Tensor, biases: Tensor, per_token: int) -> Tensor:
    """`Q_{K/E}(cutoff_{-i} - s_i)` by sorting, with the cutoff found anew for each expert among the others."""
    experts, tokens = scores.shape[-1], scores.shape[1]
    found = []
    for expert in range(experts):
        others = (scores + biases[:, None]).double()
        others[..., expert] = -torch.inf
        cutoff = others.sort(-1, descending=True).values[..., per_token - 1]
        margins = (cutoff - scores[..., expert].double()).sort(-1).values
        found.append(margins[:, round(tokens * per_token / experts) - 1])
    return torch.stack(found, dim=-1)


@settings(max_examples=20)
@given(st.integers(3, 12), st.integers(0, 2**31), st.floats(-6, 6), st.floats(0.01, 3))
def test_histogram_finds_the_exact_quantile(experts: int, seed: int, centre: float, spread: float) -> None:
    per_token = 1 + seed % (experts - 1)
    scores = draw_scores(300 * experts, experts, seed, centre, spread)
    biases = 0.1 * torch.randn(1, experts, generator=torch.Generator().manual_seed(seed))
    rule = QuantileUpdate()
    for _ in range(12):  # each update narrows or shifts the windows
        rule.observe(scores, biases, per_token, None)
        moved = rule.update(biases, selections(scores, biases, per_token), 1.0, rule.gathered())
        rule.forget()
    exact = exact_quantiles(scores, biases, per_token)
    exact -= exact.mean(-1, keepdim=True)
    # What the histogram misses, counted in selections: a bias off by so much moves next to no token.
    error = (moved.double() - exact).abs().max()
    assert error < 2e-2 * float(scores.std()) + 1e-6


def test_saturated_sigmoids_do_not_stall() -> None:
    # All margins within a hundredth: of a thousand fixed bins over [-1, 1], four would hold them.
    scores = draw_scores(3000, 256, centre=7.0, spread=0.3)
    assert max_vio(selections(scores, torch.zeros(1, 256), 8)).item() > 3
    _, vio = run(QuantileUpdate(), 0.2, 40, scores, 8)
    assert vio < 0.1


def test_balance_is_the_fixed_point() -> None:
    scores = draw_scores(4000, 8)
    biases, _ = run(QuantileUpdate(), 0.2, 200, scores, 2)
    quantiles = exact_quantiles(scores, biases, 2)
    torch.testing.assert_close(biases.double(), quantiles - quantiles.mean(-1, keepdim=True), atol=5e-3, rtol=0)


def test_masked_positions_and_micro_batches_do_not_matter_to_the_quantile() -> None:
    scores = draw_scores(600, 6)
    spoilt = torch.cat([scores, torch.full((1, 50, 6), float("nan"))], dim=1)
    mask = torch.arange(650) < 600
    biases = torch.zeros(1, 6)
    whole, split = QuantileUpdate(), QuantileUpdate()
    whole.observe(scores, biases, 2, None)
    split.observe(scores[:, :200], biases, 2, None)
    split.observe(spoilt[:, 200:], biases, 2, mask[200:])
    assert torch.equal(whole.gathered(), split.gathered())
    nothing = QuantileUpdate()
    nothing.observe(scores, biases, 2, torch.zeros(600, dtype=torch.bool))
    kept = torch.randn(1, 6)
    windows = nothing._low.clone(), nothing._high.clone()
    assert torch.equal(nothing.update(kept, torch.zeros(1, 6, dtype=torch.long), 0.5, nothing.gathered()), kept)
    assert torch.equal(nothing._low, windows[0]), "a batch without tokens must not move the windows"
    assert torch.equal(nothing._high, windows[1])


def test_the_quantile_is_interpolated_within_its_bin() -> None:
    scores, biases = draw_scores(20_000, 8), torch.zeros(1, 8)
    rule = QuantileUpdate()
    rule.observe(scores, biases, 2, None)
    moved = rule.update(biases, selections(scores, biases, 2), 1.0, rule.gathered())
    exact = exact_quantiles(scores, biases, 2)
    bin_width = 2 / 256
    assert (moved.double() - (exact - exact.mean(-1, keepdim=True))).abs().max() < bin_width / 5


def test_windows_find_biases_that_something_else_has_moved() -> None:
    scores, biases = draw_scores(4000, 8), torch.zeros(1, 8)
    rule = QuantileUpdate()

    def one_batch(rate: float) -> None:
        nonlocal biases
        rule.observe(scores, biases, 2, None)
        biases = rule.update(biases, selections(scores, biases, 2), rate, rule.gathered())
        rule.forget()

    for _ in range(30):
        one_batch(0.2)
    narrow = (rule._high - rule._low).clone()
    assert (narrow < 1).all()
    biases = biases + torch.linspace(-3, 3, 8)
    one_batch(0.0)
    wider = (rule._high - rule._low) / narrow
    assert (wider > 3.9).any(), "a quantile outside its window widens it fourfold"
    for _ in range(100):
        one_batch(0.2)
    assert max_vio(selections(scores, biases, 2)).item() < 0.1


def test_the_balancer_keeps_padding_from_the_quantile() -> None:
    def biases_after(logits: Tensor, mask: Tensor | None) -> Tensor:
        biases = [torch.zeros(6)]
        balancer = Balancer(
            "loss_free", num_experts=6, scoring_func="sigmoid", bias_update_rule="quantile", biases=lambda: biases
        )
        for _ in range(3):
            experts = (logits.sigmoid() + biases[0]).topk(2).indices
            balancer.observe([logits], [experts], batch_size=1, mask=mask)
            balancer.after_optimizer_step()
        return biases[0]

    logits = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)) + torch.arange(6.0)
    padded = torch.cat([logits, torch.full((60, 6), 9.0)])
    assert torch.equal(biases_after(padded, (torch.arange(160) < 100)[None]), biases_after(logits, None))


# --- In the Balancer ---


def one_batch(balancer: Balancer, logits: Tensor, biases: list[Tensor], per_token: int = 2) -> None:
    experts = (logits.sigmoid() + biases[0]).topk(per_token).indices
    balancer.observe([logits], [experts], batch_size=1)
    balancer.after_optimizer_step()


def test_the_rate_decays_by_the_step() -> None:
    biases = [torch.zeros(4)]
    balancer = Balancer(
        "loss_free",
        num_experts=4,
        scoring_func="sigmoid",
        bias_update_rate=0.5,
        bias_update_rate_decay=0.5,
        biases=lambda: biases,
    )
    logits = torch.tensor([[3.0, 2.0, -3.0, -3.0]]).repeat(5, 1)
    expected = torch.zeros(4)
    for step in range(3):
        chosen = (logits.sigmoid() + biases[0]).topk(2).indices
        load = torch.zeros(4).scatter_add_(0, chosen.flatten(), torch.ones(10))
        expected = expected + 0.5 * 0.5**step * (load.mean() - load).sign()
        expected = expected - expected.mean()
        one_batch(balancer, logits, biases)
        torch.testing.assert_close(biases[0], expected)


@pytest.mark.parametrize("rule", ["tanh_momentum", "quantile"])
def test_a_resumed_rule_goes_on_as_if_never_stopped(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    straight, resumed = [torch.zeros(6)], [torch.zeros(6)]

    def make(biases: list[Tensor]) -> Balancer:
        return Balancer(
            "loss_free",
            num_experts=6,
            scoring_func="sigmoid",
            bias_update_rule=rule,
            bias_update_rate=0.3,
            biases=lambda: biases,
        )

    one, other = make(straight), make(resumed)
    for step in range(6):
        logits = torch.randn(64, 6, generator=generator) + torch.arange(6.0)
        one_batch(one, logits, straight)
        if step == 2:
            resumed[0].copy_(straight[0])
            other.load_state_dict(one.state_dict())
        elif step > 2:
            one_batch(other, logits, resumed)
    assert torch.equal(straight[0], resumed[0])
    assert straight[0].abs().max() > 0
