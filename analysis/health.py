"""What is unhealthy about a run, in words: each finding with its number and what to do about it.

Shapes: L MoE layers, E experts, K experts per token; G domains.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from .measurement import Measurement
from .specialisation import effective_experts, load_by_domain, mutual_information

PROBLEM, WARNING, NOTE = "problem", "warning", "note"
SEVERITIES = (PROBLEM, WARNING, NOTE)

# The thresholds are where a person should look, not where a test would reject.
HIGH_MAX_VIO, EXTREME_MAX_VIO = 1.0, 3.0
"""The busiest expert has twice, four times the mean load."""
GERRYMANDERED_LBL = 0.99
SIGNIFICANT = 0.05
COLLAPSED = 1.5
"""A domain that uses fewer than this many times K experts."""
UNDECIDED = 0.98
"""Normalised entropy of the scores."""
OVERRULED = 0.5
SPIKE_SIGMA, SPIKE_NATS = 6.0, 0.1
REBOUND = 1.05
FEW_DOCUMENTS = 5


@dataclass(frozen=True)
class Finding:
    """One thing to know about a run."""

    severity: str
    """`problem`, `warning` or `note`."""
    what: str
    """A sentence with the number."""
    advice: str
    """What to do, or why it may stand."""


def examine(run: Measurement) -> list[Finding]:
    """All findings about a run, the gravest first; none where nothing was found."""
    checks = (_unfinished, _loss, _dead, _uneven, _gerrymandered, _unspecialised, _collapsed, _undecided, _thin)
    findings = [finding for check in checks for finding in check(run)]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def _unfinished(run: Measurement) -> Iterator[Finding]:
    state = run.record.status.get("state", "finished")
    if state != "finished":
        yield Finding(
            WARNING,
            f"Training is not finished: its state is {state}, at step {run.record.status.get('step')}.",
            "Go on with it (--resume) before comparing it with runs that are.",
        )


def _loss(run: Measurement) -> Iterator[Finding]:
    skipped = run.record.training.get("skipped_steps") or len(run.record.skipped)
    if skipped:
        yield Finding(
            WARNING,
            f"{_count(skipped, 'optimizer step was', 'optimizer steps were')} skipped because loss or gradient was "
            "out of line.",
            "skipped.jsonl names the blocks they held: read that text. If it is sound, lower the learning rate or "
            "warm up longer.",
        )
    series = [(step, loss) for step, _, loss in run.record.series("lm_loss")]
    if any(not math.isfinite(loss) for _, loss in series):
        step = next(step for step, loss in series if not math.isfinite(loss))
        yield Finding(
            PROBLEM, f"The loss is not a number at step {step}.", "Go back to a checkpoint before that step."
        )
        return
    for step, rise in spikes(series):
        yield Finding(
            WARNING,
            f"The loss jumped by {rise:.2f} nats at step {step}.",
            "If it does not come back within a few hundred steps, go on from an earlier checkpoint; spike_sigma "
            "skips such steps.",
        )
    # A line may be the mean of few blocks of few domains: several together are steadier.
    size = max(1, len(series) // 10)
    means = [fmean(loss for _, loss in series[end - size : end]) for end in range(size, len(series) + 1)]
    if means and means[-1] > REBOUND * min(means):
        yield Finding(
            WARNING,
            f"The loss ends at {means[-1]:.3f} nats, {means[-1] / min(means) - 1:.0%} above its lowest value "
            f"({min(means):.3f}; means over a tenth of the log).",
            "Lower the learning rate, or look at the domains' losses for the one that rises.",
        )


def spikes(series: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Steps at which a loss jumped, and by how much.

    A jump is a rise over the line before of more than 0.1 and more than 6 standard deviations of the changes between
    lines, these from their median absolute deviation.

    Args:
        series: step and loss of each line.
    """
    rises = [(step, loss - before) for (_, before), (step, loss) in pairwise(series)]
    if not rises:
        return []
    middle = median(rise for _, rise in rises)
    sigma = 1.4826 * median(abs(rise - middle) for _, rise in rises)
    return [(step, rise) for step, rise in rises if rise > max(SPIKE_NATS, middle + SPIKE_SIGMA * sigma)]


def _dead(run: Measurement) -> Iterator[Finding]:
    dead = {layer: int(count) for layer, count in enumerate(run.balance.dead_experts) if count}
    if dead:
        experts = run.num_layers * run.num_experts
        yield Finding(
            PROBLEM,
            f"{sum(dead.values())} of {experts} experts are dead, no held-out token selects them: "
            + _listed(f"{count} in layer {layer}" for layer, count in dead.items())
            + ".",
            "Their parameters are wasted. Balance from the start (global_batch or loss_free), raise "
            "router_aux_loss_coef or bias_update_rate, or use fewer experts.",
        )


def _uneven(run: Measurement) -> Iterator[Finding]:
    found = {layer: float(value) for layer, value in enumerate(run.balance.max_vio_global) if value > HIGH_MAX_VIO}
    if found:
        layer, worst = max(found.items(), key=lambda item: item[1])
        others = f" It is above {HIGH_MAX_VIO:g} in {_layers(found)}." if len(found) > 1 else ""
        yield Finding(
            PROBLEM if worst > EXTREME_MAX_VIO else WARNING,
            f"MaxVio over the held-out text is {worst:.2f} in layer {layer}: its busiest expert gets {worst + 1:.1f} "
            f"times the mean load.{others}",
            "Busy experts slow training down and idle ones learn little: raise router_aux_loss_coef or "
            "bias_update_rate.",
        )


def _gerrymandered(run: Measurement) -> Iterator[Finding]:
    loss, now = run.record.late("load_balancing_loss_batch"), run.record.late("max_vio_batch")
    history = [value for _, _, value in run.record.series("max_vio_batch")]
    mean = [fmean(layer) for layer in zip(*history, strict=True)]
    found = [
        layer
        for layer, (lbl, violation, usual) in enumerate(zip(loss, now, mean, strict=False))
        if lbl < GERRYMANDERED_LBL and violation > 1.1 * usual
    ]
    if found:
        layer = min(found, key=lambda one: loss[one])
        yield Finding(
            PROBLEM,
            f"The load-balancing loss is {loss[layer]:.3f} in layer {layer}, below its value at balance (1), while "
            f"MaxVio grew to {now[layer]:.2f} from {mean[layer]:.2f} on average{_also(layer, found)}.",
            "The loss is being lowered without balance, which it can be. Judge by MaxVio, and lower "
            "router_aux_loss_coef or change to loss_free.",
        )


def _unspecialised(run: Measurement) -> Iterator[Finding]:
    if len(run.trace.domains) < 2:
        return
    found = run.specialisation
    at_chance = [layer for layer, p in enumerate(found.p_value) if p > SIGNIFICANT]
    if at_chance:
        layer = max(at_chance, key=lambda one: float(found.p_value[one]))
        yield Finding(
            WARNING,
            f"{_layers(at_chance, start=True)} cannot be told from chance: in layer {layer}, "
            f"{float(found.bits[layer]):.3f} bits against {float(found.null_mean[layer]):.3f} with domain labels "
            f"dealt out anew (p = {float(found.p_value[layer]):.2f}).",
            "Balancing each micro-batch or sequence does this, and so do few held-out documents: widen the scope to "
            "global_batch, or measure on more text.",
        )
    if run.untrained is not None:
        untrained = untrained_bits(run)
        under = [layer for layer in range(run.num_layers) if found.bits[layer] <= untrained[layer]]
        if under:
            layer = under[0]
            yield Finding(
                WARNING,
                f"{_layers(under, start=True)} are no more specialised than before training: in layer {layer}, "
                f"{float(found.bits[layer]):.3f} bits against {untrained[layer]:.3f} of a fresh model."
                if len(under) > 1
                else f"Layer {layer} is no more specialised than before training: {float(found.bits[layer]):.3f} bits "
                f"against {untrained[layer]:.3f} of a fresh model.",
                "A router sorts by vocabulary even at random. Training has added no preference for domains here.",
            )
    by_token = mutual_information(run.token_identity)
    error = found.standard_error.nan_to_num(0.0)
    explained = [layer for layer in range(run.num_layers) if found.bits[layer] - 2 * error[layer] <= by_token[layer]]
    if explained:
        layer = explained[0]
        yield Finding(
            NOTE,
            f"In {_layers(explained)} specialisation is not beyond what the vocabulary of each domain explains: in "
            f"layer {layer}, {float(found.bits[layer]):.3f} bits against {float(by_token[layer]):.3f} from token "
            "identity alone.",
            "Experts sort tokens there, not contexts. That is usual of first layers.",
        )


def untrained_bits(run: Measurement) -> list[float]:
    """Mutual information of domain and expert of the untrained model: L values in bits."""
    assert run.untrained is not None
    return mutual_information(load_by_domain(run.untrained)).tolist()


def _collapsed(run: Measurement) -> Iterator[Finding]:
    chosen = run.architecture.num_experts_per_tok
    used = effective_experts(run.shares)  # [G, L]
    if run.num_experts < 2 * COLLAPSED * chosen:
        return
    places = [(float(used[g, layer]), g, layer) for g, layer in (used < COLLAPSED * chosen).nonzero().tolist()]
    if places:
        fewest, domain, layer = min(places)
        names = sorted({run.trace.domains[g] for _, g, _ in places})
        yield Finding(
            WARNING,
            f"{_listed(names)} {'collapses' if len(names) == 1 else 'collapse'} on few experts: "
            f"{run.trace.domains[domain]} uses {fewest:.1f} experts' worth of {run.num_experts} in layer {layer}"
            f"{_also(layer, {layer for _, _, layer in places})}; {chosen} is the least there can be.",
            "If MaxVio is high too, the router has collapsed: balance more. If the load is even, the domain has "
            "experts of its own: compare its loss with that of the other runs.",
        )


def _undecided(run: Measurement) -> Iterator[Finding]:
    entropy = run.confidence.mean()[0]
    flat = [layer for layer in range(run.num_layers) if entropy[layer] > UNDECIDED]
    if flat:
        layer = max(flat, key=lambda one: float(entropy[one]))
        yield Finding(
            NOTE,
            f"The router hardly tells experts apart in {_layers(flat)}: the entropy of its scores is "
            f"{float(entropy[layer]):.3f} of the largest there can be in layer {layer}.",
            "Early in training this passes. Later, lower router_aux_loss_coef or router_z_loss_coef. Sigmoid scores "
            "are flatter by nature.",
        )
    overruled = run.confidence.overruled_share()
    strong = [layer for layer in range(run.num_layers) if overruled[layer] > OVERRULED]
    if strong:
        layer = max(strong, key=lambda one: float(overruled[one]))
        yield Finding(
            NOTE,
            f"The selection bias, or a limit to groups, decides much in {_layers(strong)}: in layer {layer} it "
            f"overrules the scores of {float(overruled[layer]):.0%} of the tokens.",
            "Balance is then bought by sending tokens to experts that score lower. A smaller bias_update_rate at the "
            "end of training lets the scores catch up.",
        )


def _thin(run: Measurement) -> Iterator[Finding]:
    counts = {
        name: len(run.trace.document[run.trace.domain == index].unique())
        for index, name in enumerate(run.trace.domains)
    }
    few = {name: count for name, count in counts.items() if count < FEW_DOCUMENTS}
    if few:
        yield Finding(
            NOTE,
            "Few documents are held out of " + _listed(f"{name} ({count})" for name, count in few.items()) + ".",
            "Chance levels and standard errors rest on documents, not on tokens: hold out more of them.",
        )


def _layers(layers: Sequence[int] | set[int] | dict[int, float], *, start: bool = False) -> str:
    """`layer 3`, `layers 1, 2 and 5`."""
    numbers = sorted(layers)
    text = ("layer " if len(numbers) == 1 else "layers ") + _listed(map(str, numbers))
    return text.capitalize() if start else text


def _also(layer: int, layers: Sequence[int] | set[int]) -> str:
    """` (also in layers 1 and 2)`, or nothing."""
    others = set(layers) - {layer}
    return f" (also in {_layers(others)})" if others else ""


def _listed(parts: Iterator[str] | Sequence[str] | map) -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = list(parts)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


__all__ = ["SEVERITIES", "Finding", "examine", "spikes", "untrained_bits"]
