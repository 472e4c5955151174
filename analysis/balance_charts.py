"""Charts of the course of training, of balance and of what it came to.

Shapes: S logging steps, L MoE layers, E experts.
"""

import math
from collections.abc import Sequence

import altair as alt
import numpy as np

from .load_history import LoadHistory
from .measurement import Measurement
from .vega import (
    UNKNOWN,
    Columns,
    Legend,
    Panel,
    ReportFigure,
    append,
    evenly,
    from_zero,
    line_chart,
    rounded,
    run_colour,
    run_legend,
    run_shape,
    run_title,
    stepped,
)

AROUND_EVEN = (1 / 8, 1 / 4, 1 / 2, 1 / 1.25, 1.25, 2, 4, 8)
"""Where the colour of a load changes, in multiples of the mean."""
AROUND_EVEN_LABELS = (
    "< 1/8",
    "1/8\N{EN DASH}1/4",
    "1/4\N{EN DASH}1/2",
    "1/2\N{EN DASH}0.8",
    "even",
    "1.25\N{EN DASH}2",
    "2\N{EN DASH}4",
    "4\N{EN DASH}8",
    "> 8",
)
CELLS = 120_000
"""Most cells of load over time that a page holds; above, lines of the log are left out evenly."""

SCOPES = {
    "global": "Global: all held-out text",
    "batch": "Batch: one optimizer step",
    "micro": "Micro: one micro-batch",
}


def loss_figure(runs: Sequence[Measurement]) -> ReportFigure | None:
    """Loss over the tokens seen."""
    columns: Columns = {"run": [], "tokens": [], "loss": []}
    findings = []
    for run in runs:
        series = [(tokens / 1e6, loss) for _, tokens, loss in run.record.series("lm_loss") if math.isfinite(loss)]
        for tokens, loss in series:
            append(columns, run=run.name, tokens=tokens, loss=rounded(loss))
        if series:
            tokens, loss = series[-1]
            findings.append(f"{run.name}: {loss:.3f} nats per token after {tokens:,.2f} million tokens.")
    if not findings:
        return None
    names = [run.name for run in runs]
    chart = line_chart("tokens:Q", "loss:Q", "million tokens", "nats per token", names)
    return ReportFigure(
        name="loss",
        title="Loss over training",
        findings=findings,
        panels=[Panel("Language-model loss, mean since the line before", chart, {None: columns}, height=260)],
        legend=run_legend(names),
        columns=1,
    )


def bits_per_byte_figure(runs: Sequence[Measurement]) -> ReportFigure | None:
    """Bits per byte by domain, of runs that were evaluated."""
    found = {
        run.name: {name: result["bits_per_byte"] for name, result in run.record.evaluation["domains"].items()}
        for run in runs
        if run.record.evaluation
    }
    if not found:
        return None
    domains = sorted({name for of_run in found.values() for name in of_run}, key=lambda name: (name == "all", name))
    columns: Columns = {"run": [], "domain": [], "bits": []}
    for name, of_run in found.items():
        for domain, bits in of_run.items():
            append(columns, run=name, domain=domain, bits=rounded(bits))
    names = [run.name for run in runs]
    chart = (
        alt.Chart()
        .mark_point(filled=True, size=55, opacity=0.9)
        .encode(
            x=alt.X("bits:Q", title="bits per byte (less is better)", scale=alt.Scale(zero=False)),
            y=alt.Y("domain:N", title=None, sort=domains, axis=alt.Axis(grid=True, labelLimit=110)),
            color=run_colour(names),
            shape=run_shape(names),
            tooltip=["run:N", "domain:N", alt.Tooltip("bits:Q", format=".4f")],
        )
    )
    rows = [[domain, *(_or_dash(of_run.get(domain)) for of_run in found.values())] for domain in domains]
    return ReportFigure(
        name="bits_per_byte",
        title="Bits per byte by domain",
        findings=[f"{name}: {of_run['all']:.3f} over all text." for name, of_run in found.items() if "all" in of_run],
        panels=[Panel("Held-out text", chart, {None: columns}, height=22 * len(domains))],
        legend=run_legend(names),
        columns=1,
        table=(["domain", *found], rows),
        words=1,
    )


def violations(run: Measurement) -> dict[str, list[float]]:
    """MaxVio by layer: `global` on the held-out text, `batch` and `micro` at the end of training, [] if not logged."""
    return {
        "global": run.balance.max_vio_global.tolist(),
        "batch": run.record.late("max_vio_batch"),
        "micro": run.record.late("max_vio_micro"),
    }


def violation_figure(runs: Sequence[Measurement]) -> ReportFigure:
    """MaxVio by layer at three scopes."""
    found = {run.name: violations(run) for run in runs}
    highest = max(value for scoped in found.values() for values in scoped.values() for value in values)
    panels, rows, findings = [], [], []
    for scope, title in SCOPES.items():
        columns: Columns = {"run": [], "layer": [], "value": []}
        for name, scoped in found.items():
            for layer, value in enumerate(scoped[scope]):
                append(columns, run=name, layer=layer, value=rounded(value))
        if columns["run"]:
            chart = line_chart(
                "layer:O", "value:Q", "MoE layer", "MaxVio", list(found), domain=from_zero(highest), points=True
            )
            panels.append(Panel(title, chart, {None: columns}))
    for name, scoped in found.items():
        logged = {scope: values for scope, values in scoped.items() if values}
        rows += [[name, scope, *(f"{value:.3f}" for value in values)] for scope, values in logged.items()]
        means = ", ".join(f"{scope} {np.mean(values):.2f}" for scope, values in logged.items())
        findings.append(f"{name}: {means}, means over layers.")
    layers = max(run.num_layers for run in runs)
    return ReportFigure(
        name="max_vio",
        title="MaxVio by layer, at three scopes",
        findings=findings,
        panels=panels,
        legend=run_legend(list(found)),
        columns=3,
        table=(["run", "scope", *(f"layer {layer}" for layer in range(layers))], rows),
    )


def violation_over_time_figure(runs: Sequence[Measurement], layers: Sequence[int]) -> ReportFigure | None:
    """MaxVio of the global batch and of micro-batches, over the tokens seen."""
    names = [run.name for run in runs]
    panels, findings = [], []
    for scope in ("batch", "micro"):
        columns: dict[int | None, Columns] = {layer: {"run": [], "tokens": [], "value": []} for layer in layers}
        highest = 0.0
        ends = []
        for run in runs:
            series = run.record.series(f"max_vio_{scope}")
            for _, tokens, values in series:
                highest = max(highest, *values)
                for layer in layers:
                    if layer < len(values):
                        append(columns[layer], run=run.name, tokens=tokens / 1e6, value=rounded(values[layer]))
            if series:
                worst_step, worst = max(((step, max(values)) for step, _, values in series), key=lambda item: item[1])
                ends.append(f"{run.name} {worst:.2f} at step {worst_step:,}")
        if ends:
            chart = line_chart("tokens:Q", "value:Q", "million tokens", "MaxVio", names, domain=from_zero(highest))
            panels.append(Panel(SCOPES[scope], chart, columns))
            findings.append(f"{SCOPES[scope].split(':')[0]}, its highest over steps and layers: {', '.join(ends)}.")
    if not panels:
        return None
    return ReportFigure(
        name="max_vio_over_time",
        title="MaxVio over training",
        findings=findings,
        panels=panels,
        legend=run_legend(names),
    )


def load_over_time_figure(runs: Sequence[Measurement], layers: Sequence[int]) -> ReportFigure | None:
    """Each expert's load in the global batch over the steps."""
    histories = {run.name: run.record.load for run in runs if run.record.load is not None}
    panels, findings = [], []
    for name, history in histories.items():
        of_run = [layer for layer in layers if layer < history.load.shape[1]]
        experts = history.load.shape[2]
        lines = max(2, CELLS // (len(histories) * len(of_run) * experts))
        columns: dict[int | None, Columns] = {layer: _load_columns(history, layer, lines) for layer in of_run}
        panels.append(Panel(run_title(name, runs), _load_chart(), columns, height=min(260, max(120, 9 * experts))))
        late = history.load[-max(1, len(history.load) // 10) :].double().sum(0)
        late = late / late.mean(-1, keepdim=True).clamp_min(1e-12)
        layer, expert = divmod(int(late.argmax()), experts)
        findings.append(
            f"{name}: over the last tenth of the log the busiest expert is number {expert} of layer {layer}, with "
            f"{float(late.max()):.1f} times the mean load; {int((late < 0.25).sum())} of {late.numel()} experts get "
            "less than a quarter of it."
        )
    if not panels:
        return None
    return ReportFigure(
        name="load_over_time",
        title="Load of each expert over training",
        findings=findings,
        panels=panels,
        legend=Legend("times the mean load", ramp="even", labels=AROUND_EVEN_LABELS),
    )


def _load_columns(history: LoadHistory, layer: int, lines: int) -> Columns:
    """One rectangle for each expert at each of at most `lines` logged steps."""
    load = history.load[:, layer].double()  # [S, E]
    experts = load.shape[1]
    order = load.sum(0).argsort(descending=True, stable=True)
    places = evenly(len(load), lines)
    steps = history.steps[places].tolist()
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    relative = load / load.mean(-1, keepdim=True).clamp_min(1e-12)
    return {
        "step": np.repeat(steps, experts).tolist(),
        "next": np.repeat([*steps[1:], steps[-1] + width], experts).tolist(),
        "expert": order.tolist() * len(steps),
        "place": list(range(experts)) * len(steps),
        "below": list(range(1, experts + 1)) * len(steps),
        "load": [rounded(value) for value in relative[places][:, order].flatten().tolist()],
    }


def _load_chart() -> alt.Chart:
    return (
        alt.Chart()
        .mark_rect()
        .encode(
            x=alt.X(
                "step:Q", title="step", scale=alt.Scale(nice=False, zero=False), axis=alt.Axis(tickCount=6, grid=False)
            ),
            x2="next:Q",
            y=alt.Y(
                "place:Q",
                title="busiest first",
                scale=alt.Scale(reverse=True, nice=False),
                axis=alt.Axis(labels=False, ticks=False, grid=False),
            ),
            y2="below:Q",
            color=stepped("load:Q", AROUND_EVEN, "even"),
            tooltip=[
                alt.Tooltip("step:Q"),
                alt.Tooltip("expert:Q"),
                alt.Tooltip("load:Q", title="times the mean load", format=".2f"),
            ],
        )
    )


def _or_dash(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


__all__ = [
    "CELLS",
    "bits_per_byte_figure",
    "load_over_time_figure",
    "loss_figure",
    "violation_figure",
    "violation_over_time_figure",
    "violations",
]
