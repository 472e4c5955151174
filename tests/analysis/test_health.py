"""Each thing that is unhealthy, planted alone, is found, with its number; and nothing is found where nothing is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from equipoise.analysis import Measurement, RunRecord, examine
from equipoise.analysis.health import spikes


@pytest.fixture
def healthy(measurements: list[Measurement]) -> Measurement:
    """The specialised run, with what its plan makes of it set right: no layer that does not care, none dead."""
    run = measurements[0]
    return replace(
        run,
        specialisation=replace(
            run.specialisation,
            bits=torch.tensor([0.9, 0.8], dtype=torch.float64),
            null_bits=torch.full((99, 2), 0.1, dtype=torch.float64),
            standard_error=torch.tensor([0.01, 0.01], dtype=torch.float64),
        ),
        balance=replace(
            run.balance,
            dead_experts=torch.tensor([0, 0]),
            max_vio_global=torch.tensor([0.2, 0.3]),
        ),
        token_identity=torch.full_like(run.token_identity, 0.25),
        trace=replace(run.trace, load=torch.full_like(run.trace.load, 5)),
        untrained=replace(run.untrained, load=torch.full_like(run.trace.load, 5)),
        record=replace(run.record, metrics=run.record.metrics),
    )


def with_lines(run: Measurement, **series: list[Any]) -> RunRecord:
    lines = [
        {"step": 10 * place, "tokens": 100 * place, **{name: values[place] for name, values in series.items()}}
        for place in range(len(next(iter(series.values()))))
    ]
    return replace(run.record, metrics=lines)


def test_nothing_is_found_where_nothing_is(healthy: Measurement) -> None:
    assert examine(healthy) == []


CASES: dict[str, tuple[Callable[[Measurement], Measurement], str, str]] = {
    "dead": (
        lambda run: replace(run, balance=replace(run.balance, dead_experts=torch.tensor([0, 2]))),
        "problem",
        "2 of 8 experts are dead, no held-out token selects them: 2 in layer 1.",
    ),
    "uneven": (
        lambda run: replace(run, balance=replace(run.balance, max_vio_global=torch.tensor([1.5, 1.25]))),
        "warning",
        "MaxVio over the held-out text is 1.50 in layer 0: its busiest expert gets 2.5 times the mean load. "
        "It is above 1 in layers 0 and 1.",
    ),
    "very uneven": (
        lambda run: replace(run, balance=replace(run.balance, max_vio_global=torch.tensor([0.5, 6.0]))),
        "problem",
        "MaxVio over the held-out text is 6.00 in layer 1: its busiest expert gets 7.0 times the mean load.",
    ),
    "loss without balance": (
        lambda run: replace(
            run,
            record=with_lines(
                run,
                load_balancing_loss_batch=[[1.1, 1.2]] * 10 + [[1.0, 0.5]] * 2,
                max_vio_batch=[[0.5, 0.5]] * 10 + [[0.5, 4.5]] * 2,
            ),
        ),
        "problem",
        "The load-balancing loss is 0.500 in layer 1, below its value at balance (1), while MaxVio grew to 4.50 from "
        "1.17 on average.",
    ),
    "at chance": (
        lambda run: replace(
            run, specialisation=replace(run.specialisation, null_bits=torch.tensor([[0.0, 0.9]] * 99).double())
        ),
        "warning",
        "Layer 1 cannot be told from chance: in layer 1, 0.800 bits against 0.900 with domain labels dealt out anew "
        "(p = 1.00).",
    ),
    "not finished": (
        lambda run: replace(run, record=replace(run.record, status={"state": "stopped", "step": 12})),
        "warning",
        "Training is not finished: its state is stopped, at step 12.",
    ),
    "skipped steps": (
        lambda run: replace(run, record=replace(run.record, training={"skipped_steps": 3})),
        "warning",
        "3 optimizer steps were skipped because loss or gradient was out of line.",
    ),
    "spike": (
        lambda run: replace(run, record=with_lines(run, lm_loss=[3.0, 2.9, 2.81, 2.7, 4.2, 2.6, 2.5, 2.4])),
        "warning",
        "The loss jumped by 1.50 nats at step 40.",
    ),
    "rebound": (
        lambda run: replace(run, record=with_lines(run, lm_loss=[3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5])),
        "warning",
        "The loss ends at 2.500 nats, 25% above its lowest value (2.000; means over a tenth of the log).",
    ),
    "not a number": (
        lambda run: replace(run, record=with_lines(run, lm_loss=[3.0, float("nan"), 2.0])),
        "problem",
        "The loss is not a number at step 10.",
    ),
    "explained by tokens": (
        lambda run: replace(
            run, token_identity=torch.eye(4, dtype=torch.float64)[:, None].expand(4, 2, 4)
        ),
        "note",
        "In layers 0 and 1 specialisation is not beyond what the vocabulary of each domain explains: in layer 0, "
        "0.900 bits against 2.000 from token identity alone.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_is_found(case: str, healthy: Measurement) -> None:
    plant, severity, what = CASES[case]
    found = examine(plant(healthy))
    assert [(finding.severity, finding.what) for finding in found] == [(severity, what)]
    assert all(finding.advice for finding in found)


def test_no_better_than_untrained(healthy: Measurement, measurements: list[Measurement]) -> None:
    # An untrained model that is specialised more than this one: the planted one itself.
    found = examine(replace(healthy, untrained=measurements[0].trace))
    bits = float(measurements[0].specialisation.bits[0])
    assert [finding.what for finding in found] == [
        f"Layer 0 is no more specialised than before training: 0.900 bits against {bits:.3f} of a fresh model."
    ]


def test_a_domain_on_few_experts(healthy: Measurement) -> None:
    load = healthy.trace.load.clone()
    load[healthy.trace.domain == 2, 1] = torch.tensor([20, 0, 0, 0], dtype=torch.int32)
    [finding] = examine(replace(healthy, trace=replace(healthy.trace, load=load)))
    assert finding.what == (
        "cedar collapses on few experts: cedar uses 1.0 experts' worth of 4 in layer 1; 1 is the least there can be."
    )


def test_the_gravest_come_first(measurements: list[Measurement]) -> None:
    severities = [finding.severity for finding in examine(measurements[0])]
    assert severities == sorted(severities, key=["problem", "warning", "note"].index)
    assert len(set(severities)) > 1


def test_a_router_that_cannot_tell_and_one_that_is_overruled(healthy: Measurement) -> None:
    confidence = healthy.confidence
    flat = type(confidence).__new__(type(confidence))
    flat.__dict__.update(vars(confidence))
    flat.sums = confidence.sums.clone()
    flat.sums[0, 1] = 0.99 * confidence.tokens
    flat.overruled = torch.tensor([int(0.6 * confidence.tokens.sum()), 0])
    what = [finding.what for finding in examine(replace(healthy, confidence=flat))]
    assert what[0].startswith("The router hardly tells experts apart in layer 1: the entropy of its scores is 0.990")
    assert what[1].startswith(
        "The selection bias, or a limit to groups, decides much in layer 0: in layer 0 it overrules"
    )
    assert "the scores of 60%" in what[1]


def test_few_documents(healthy: Measurement) -> None:
    document = healthy.trace.document.clone()
    document[healthy.trace.domain == 1] = document[healthy.trace.domain == 1].min()
    what = [finding.what for finding in examine(replace(healthy, trace=replace(healthy.trace, document=document)))]
    assert what == ["Few documents are held out of beech (1)."]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([], []),
        ([5.0], []),
        ([5.0, 4.0, 3.5, 3.2, 3.0, 2.9], []),  # a fast fall is no jump
        ([3.0, 3.05, 2.98, 3.04, 2.97, 3.03], []),  # noise
        ([3.0, 2.99, 2.98, 2.97, 3.5, 2.95, 2.94], [(40, pytest.approx(0.53))]),
        ([3.0] * 5 + [3.05] + [3.0] * 5, []),  # below what anyone would look at
    ],
)
def test_jumps_of_a_loss(losses: list[float], found: list) -> None:
    assert spikes([(10 * place, loss) for place, loss in enumerate(losses)]) == found
