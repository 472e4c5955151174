"""Charts of specialisation.

Shapes: L MoE layers, E experts, K experts per token; G domains.
"""

import math
from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np
import torch

from .health import untrained_bits
from .measurement import Measurement
from .ordering import expert_order
from .palette import SHAPES, variable
from .specialisation import domain_divergence, mutual_information
from .vega import (
    Columns,
    Drawing,
    Legend,
    Line,
    Panel,
    ReportFigure,
    append,
    from_zero,
    line_chart,
    rounded,
    run_legend,
    run_title,
    step_labels,
    stepped,
)

TIMES_EVEN = (0.25, 0.5, 1, 2, 3, 4, 6, 8)
"""Where the colour of a share changes, in multiples of an even share."""
DIVERGENCE = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
"""Where the colour of a Jensen-Shannon divergence changes, in bits."""

MEASURED, BY_TOKEN, UNTRAINED, CHANCE = SERIES = (
    "measured",
    "token identity alone",
    "untrained model",
    "chance: permuted domains",
)
SERIES_DASHES = ((1, 0), (6, 3), (2, 2), (1, 3))


def specialisation_figure(runs: Sequence[Measurement]) -> ReportFigure:
    """Mutual information of domain and expert by layer, with its nulls."""
    found = {run.name: _bits(run) for run in runs}
    columns_of = {run.name: _bits_columns(run, found[run.name]) for run in runs}
    highest = max(value for columns in columns_of.values() for value in columns["high"])
    layers = max(run.num_layers for run in runs)
    table = []
    for run in runs:
        table += [[run.name, name, *(f"{bits:.3f}" for bits in values)] for name, values in found[run.name].items()]
        table.append([run.name, "p", *(f"{p:.4f}" for p in run.specialisation.p_value.tolist())])
    lines = [
        Line(name, variable(f"series-{index}"), SERIES_DASHES[index], SHAPES[index])
        for index, name in enumerate(SERIES)
        if any(name in values for values in found.values())
    ]
    return ReportFigure(
        name="specialisation",
        title="Specialisation by layer, against three nulls",
        findings=[_bits_words(run, found[run.name]) for run in runs],
        panels=[
            Panel(run_title(name, runs), _bits_chart(highest), {None: columns}, height=240)
            for name, columns in columns_of.items()
        ],
        legend=Legend("mutual information of domain and expert, bits", lines=lines),
        table=(["run", "bits", *(f"layer {layer}" for layer in range(layers))], table),
    )


def _bits(run: Measurement) -> dict[str, list[float]]:
    values = {MEASURED: run.specialisation.bits.tolist(), BY_TOKEN: mutual_information(run.token_identity).tolist()}
    if run.untrained is not None:
        values[UNTRAINED] = untrained_bits(run)
    return values | {CHANCE: run.specialisation.null_mean.tolist()}


def _bits_columns(run: Measurement, values: Mapping[str, Sequence[float]]) -> Columns:
    error = run.specialisation.standard_error.nan_to_num(0.0).tolist()
    quantile = run.specialisation.null_quantile_95.tolist()
    columns: Columns = {"series": [], "layer": [], "bits": [], "low": [], "high": []}
    for name, of_layers in values.items():
        for layer, bits in enumerate(of_layers):
            low, high = {
                MEASURED: (bits - error[layer], bits + error[layer]),
                CHANCE: (bits, quantile[layer]),
            }.get(name, (bits, bits))
            append(columns, series=name, layer=layer, bits=rounded(bits), low=rounded(low), high=rounded(high))
    return columns


def _bits_words(run: Measurement, values: Mapping[str, Sequence[float]]) -> str:
    mean = run.specialisation.mean_over_layers()
    error = "" if torch.isnan(mean.standard_error) else f" ± {float(mean.standard_error):.2f}"
    untrained = f", {np.mean(values[UNTRAINED]):.2f} untrained" if UNTRAINED in values else ""
    return (
        f"{run.name}: {float(mean.bits):.2f}{error} bits, mean over layers; {np.mean(values[BY_TOKEN]):.2f} from "
        f"token identity alone{untrained}, {float(mean.null_mean):.2f} by chance (p = {float(mean.p_value):.3f})."
    )


def _bits_chart(highest: float) -> Drawing:
    scale = alt.Scale(domain=list(from_zero(highest)))
    colours = [variable(f"series-{index}") for index in range(len(SERIES))]
    dashes = [list(dash) for dash in SERIES_DASHES]
    base = alt.Chart().encode(
        x=alt.X("layer:O", title="MoE layer", axis=alt.Axis(labelAngle=0)),
        color=alt.Color("series:N", scale=alt.Scale(domain=list(SERIES), range=colours), legend=None),
    )
    bits = alt.Y("bits:Q", title="bits", scale=scale)
    dash = alt.StrokeDash("series:N", scale=alt.Scale(domain=list(SERIES), range=dashes), legend=None)
    shape = alt.Shape("series:N", scale=alt.Scale(domain=list(SERIES), range=list(SHAPES[:4])), legend=None)
    tooltip = [
        alt.Tooltip("series:N", title="what"),
        alt.Tooltip("layer:O"),
        alt.Tooltip("bits:Q", format=".4f"),
        alt.Tooltip("low:Q", title="from", format=".4f"),
        alt.Tooltip("high:Q", title="to", format=".4f"),
    ]
    return alt.layer(
        base.mark_rule(strokeWidth=5, opacity=0.3).encode(y=alt.Y("low:Q", scale=scale, title="bits"), y2="high:Q"),
        base.mark_line(strokeWidth=1.8).encode(y=bits, strokeDash=dash),
        base.mark_point(filled=True, size=45, opacity=1).encode(y=bits, shape=shape, tooltip=tooltip),
    )


def heatmap_figure(
    runs: Sequence[Measurement], order: Mapping[str, Sequence[str]], layers: Sequence[int]
) -> ReportFigure:
    """Share of each domain's selections by expert.

    Args:
        order: of each run, its domains as they are shown.
    """
    panels = []
    for run in runs:
        names = list(order[run.name])
        columns: dict[int | None, Columns] = {
            layer: _heatmap_columns(run, names, layer) for layer in layers if layer < run.num_layers
        }
        panels.append(Panel(run_title(run.name, runs), _heatmap(names), columns, height=17 * len(names)))
    return ReportFigure(
        name="experts_by_domain",
        title="Which experts each domain uses",
        findings=[_heatmap_words(run) for run in runs],
        panels=panels,
        legend=Legend(
            "share of the domain's selections, times an even share", ramp="heat", labels=step_labels(TIMES_EVEN)
        ),
    )


def _heatmap_columns(run: Measurement, names: Sequence[str], layer: int) -> Columns:
    shares = run.shares[[run.trace.domains.index(name) for name in names], layer]  # [G, E]
    experts = expert_order(shares).tolist()
    values = shares[:, experts].flatten().tolist()
    return {
        "domain": [name for name in names for _ in experts],
        "expert": experts * len(names),
        "place": list(range(len(experts))) * len(names),
        "times": [rounded(value * run.num_experts) for value in values],
        "share": [rounded(value) for value in values],
        "tokens": [rounded(value * run.trace.num_experts_per_tok) for value in values],
    }


def _heatmap(names: Sequence[str]) -> alt.Chart:
    return (
        alt.Chart()
        .mark_rect()
        .encode(
            x=alt.X(
                "expert:O",
                title="expert",
                sort=alt.EncodingSortField("place", op="min"),
                axis=alt.Axis(labelAngle=0, labelOverlap=True),
            ),
            y=alt.Y("domain:N", title=None, sort=list(names), axis=alt.Axis(labelLimit=110)),
            color=stepped("times:Q", TIMES_EVEN, "heat"),
            tooltip=[
                alt.Tooltip("domain:N"),
                alt.Tooltip("expert:O"),
                alt.Tooltip("share:Q", title="share of its selections", format=".1%"),
                alt.Tooltip("times:Q", title="times an even share", format=".2f"),
                alt.Tooltip("tokens:Q", title="share of its tokens", format=".1%"),
            ],
        )
    )


def _heatmap_words(run: Measurement) -> str:
    times = run.shares * run.num_experts
    domain, layer, expert = (int(index) for index in np.unravel_index(int(times.argmax()), times.shape))
    return (
        f"{run.name}: the strongest tie is that of {run.trace.domains[domain]} to expert {expert} of layer {layer}, "
        f"{float(run.shares[domain, layer, expert]):.0%} of its selections and {float(times.max()):.1f} times an even "
        f"share; {int((times > 2).any(0).sum())} of {run.num_layers * run.num_experts} experts get more than twice an "
        "even share of some domain."
    )


def divergence_figure(
    runs: Sequence[Measurement], order: Mapping[str, Sequence[str]], layers: Sequence[int]
) -> ReportFigure | None:
    """Jensen-Shannon divergence between domains."""
    shown = [run for run in runs if len(run.trace.domains) > 1]
    if not shown:
        return None
    panels, findings = [], []
    for run in shown:
        names = list(order[run.name])
        divergence = domain_divergence(run.shares[[run.trace.domains.index(name) for name in names]])
        columns: dict[int | None, Columns] = {
            layer: {
                "one": [name for name in names for _ in names],
                "other": names * len(names),
                "bits": [rounded(value) for value in divergence[layer].flatten().tolist()],
            }
            for layer in layers
            if layer < run.num_layers
        }
        panels.append(Panel(run_title(run.name, runs), _divergence_chart(names), columns, height=17 * len(names)))
        mean = divergence.mean(0).fill_diagonal_(math.nan)
        near, far = (np.unravel_index(int(place(mean)), mean.shape) for place in (np.nanargmin, np.nanargmax))
        findings.append(
            f"{run.name}: over all layers {names[near[0]]} and {names[near[1]]} are nearest ({float(mean[near]):.2f} "
            f"bits), {names[far[0]]} and {names[far[1]]} farthest ({float(mean[far]):.2f})."
        )
    return ReportFigure(
        name="domain_divergence",
        title="How differently two domains use the experts",
        findings=findings,
        panels=panels,
        legend=Legend("Jensen-Shannon divergence, bits", ramp="heat", labels=step_labels(DIVERGENCE)),
    )


def _divergence_chart(names: Sequence[str]) -> alt.Chart:
    return (
        alt.Chart()
        .mark_rect()
        .encode(
            x=alt.X("other:N", title=None, sort=list(names), axis=alt.Axis(labelAngle=-90, labelLimit=110)),
            y=alt.Y("one:N", title=None, sort=list(names), axis=alt.Axis(labelLimit=110)),
            color=stepped("bits:Q", DIVERGENCE, "heat"),
            tooltip=["one:N", "other:N", alt.Tooltip("bits:Q", format=".3f")],
        )
    )


def olmoe_figure(runs: Sequence[Measurement]) -> ReportFigure:
    """OLMoE's domain and vocabulary specialisation by layer."""
    names = [run.name for run in runs]
    measures = {
        "Domain specialisation": [
            (run.shares.amax(-1).mean(0) * run.trace.num_experts_per_tok).tolist() for run in runs
        ],
        "Vocabulary specialisation": [run.vocabulary_specialisation.tolist() for run in runs],
    }
    panels, rows = [], []
    for title, values in measures.items():
        columns: Columns = {"run": [], "layer": [], "value": []}
        for name, of_run in zip(names, values, strict=True):
            rows.append([name, title, *(f"{value:.3f}" for value in of_run)])
            for layer, value in enumerate(of_run):
                if math.isfinite(value):
                    append(columns, run=name, layer=layer, value=rounded(value))
        chart = line_chart("layer:O", "value:Q", "MoE layer", "share of tokens", names, domain=(0, 1.02), points=True)
        panels.append(Panel(title, chart, {None: columns}))
    findings = [
        f"{run.name}: "
        + ", ".join(f"{title.lower()} {np.mean(values[index]):.2f}" for title, values in measures.items())
        + f", means over layers; without any preference {run.trace.num_experts_per_tok / run.num_experts:.3f} (K / E)."
        for index, run in enumerate(runs)
    ]
    layers = max(run.num_layers for run in runs)
    return ReportFigure(
        name="olmoe_specialisation",
        title="Domain and vocabulary specialisation by layer (OLMoE)",
        findings=findings,
        panels=panels,
        legend=run_legend(names),
        table=(["run", "measure", *(f"layer {layer}" for layer in range(layers))], rows),
    )


__all__ = ["TIMES_EVEN", "divergence_figure", "heatmap_figure", "olmoe_figure", "specialisation_figure"]
