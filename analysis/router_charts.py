"""Charts of how the router decides: experts selected together, its confidence, how early it settles.

Shapes: L MoE layers, E experts, K experts per token.
"""

from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np
import torch

from .measurement import Measurement
from .ordering import expert_order
from .palette import HEAT, variable
from .specialisation_charts import TIMES_EVEN
from .vega import (
    Columns,
    Drawing,
    Legend,
    Panel,
    ReportFigure,
    append,
    rounded,
    run_colour,
    run_legend,
    run_shape,
    run_title,
    step_labels,
    stepped,
)

PAIRED = 48
"""Most experts in a matrix of co-activation: of more, those with the strongest ties."""
COMMON = 0.01
"""A pair is spoken of if so many tokens select it: rare ones are often together by accident."""

CONFIDENCE_TITLES = ("Entropy of the scores (1: undecided)", "Weight of the top expert", "Margin of the last place")


def coactivation_figure(
    runs: Sequence[Measurement], order: Mapping[str, Sequence[str]], layers: Sequence[int]
) -> ReportFigure | None:
    """How often experts are selected together, against what their loads alone would give."""
    shown = [run for run in runs if run.trace.num_experts_per_tok > 1]
    if not shown:
        return None
    panels = []
    for run in shown:
        columns: dict[int | None, Columns] = {
            layer: _pairs(run, order[run.name], layer) for layer in layers if layer < run.num_layers
        }
        height = min(430, max(150, 15 * min(PAIRED, run.num_experts)))
        panels.append(Panel(run_title(run.name, runs), _pair_chart(), columns, height=height))
    return ReportFigure(
        name="coactivation",
        title="Which experts are selected together",
        findings=[_pair_words(run) for run in shown],
        panels=panels,
        legend=Legend("times what the loads alone would give", ramp="heat", labels=step_labels(TIMES_EVEN)),
    )


def _pairs(run: Measurement, domains: Sequence[str], layer: int) -> Columns:
    lift, shares = run.coactivation.lift()[layer], run.coactivation.conditional()[layer]
    experts = expert_order(run.shares[[run.trace.domains.index(name) for name in domains], layer])
    strongest = shares.amax(-1).argsort(descending=True)[:PAIRED]
    experts = experts[torch.isin(experts, strongest)]
    lift, shares = lift[experts][:, experts], shares[experts][:, experts]
    row, column = (~lift.isnan()).nonzero().unbind(-1)
    return {
        "one": experts[row].tolist(),
        "other": experts[column].tolist(),
        "row": row.tolist(),
        "column": column.tolist(),
        "times": [rounded(value) for value in lift[row, column].tolist()],
        "share": [rounded(value) for value in shares[row, column].tolist()],
    }


def _pair_chart() -> alt.Chart:
    return (
        alt.Chart()
        .mark_rect()
        .encode(
            x=alt.X(
                "other:O",
                title="with expert",
                sort=alt.EncodingSortField("column", op="min"),
                axis=alt.Axis(labelAngle=0, labelOverlap=True),
            ),
            y=alt.Y(
                "one:O",
                title="expert",
                sort=alt.EncodingSortField("row", op="min"),
                axis=alt.Axis(labelOverlap=True),
            ),
            color=stepped("times:Q", TIMES_EVEN, "heat"),
            tooltip=[
                alt.Tooltip("one:O", title="expert"),
                alt.Tooltip("other:O", title="with"),
                alt.Tooltip("share:Q", title="share of its tokens", format=".1%"),
                alt.Tooltip("times:Q", title="times what loads give", format=".2f"),
            ],
        )
    )


def _pair_words(run: Measurement) -> str:
    lift, shares = run.coactivation.lift(), run.coactivation.conditional()
    common = run.coactivation.count >= COMMON * run.trace.num_tokens.sum()
    tie = torch.where(common, lift.nan_to_num(0.0), 0.0)
    if not tie.any():
        return f"{run.name}: no two experts are selected together by {COMMON:.0%} of the tokens or more."
    layer, one, other = (int(index) for index in np.unravel_index(int(tie.argmax()), tie.shape))
    return (
        f"{run.name}: experts {one} and {other} of layer {layer} are tied most, {float(tie.max()):.1f} times as often "
        f"together as their loads alone would have it ({float(shares[layer, one, other]):.0%} of the tokens of expert "
        f"{one}); of pairs that {COMMON:.0%} of the tokens or more select."
    )


def confidence_figure(runs: Sequence[Measurement]) -> ReportFigure:
    """Entropy, top weight and margin of the router's scores by layer."""
    names = [run.name for run in runs]
    found = [(run.confidence.mean(), run.confidence.quantile(0.1), run.confidence.quantile(0.9)) for run in runs]
    panels = []
    for measure, title in enumerate(CONFIDENCE_TITLES):
        columns: Columns = {"run": [], "layer": [], "value": [], "low": [], "high": []}
        for name, of_run in zip(names, found, strict=True):
            for layer, values in enumerate(zip(*(value[measure].tolist() for value in of_run), strict=True)):
                mean, low, high = map(rounded, values)
                append(columns, run=name, layer=layer, value=mean, low=low, high=high)
        domain = (
            (0.0, 1.0) if measure < 2 else (min(0.0, *columns["low"], *columns["value"]), 1.06 * max(columns["high"]))
        )
        panels.append(Panel(title, _band_chart(names, domain), {None: columns}))
    findings = [
        f"{run.name}: entropy {mean[0].mean():.2f}, top weight {mean[1].mean():.2f}, margin {mean[2].mean():.3f}, "
        f"means over layers; the scores of {run.confidence.overruled_share().mean():.0%} of the tokens are overruled "
        "by bias or groups."
        for run, (mean, _, _) in zip(runs, found, strict=True)
    ]
    layers = max(run.num_layers for run in runs)
    rows = [
        [name, title, *(f"{value:.3f}" for value in mean[measure].tolist())]
        for name, (mean, _, _) in zip(names, found, strict=True)
        for measure, title in enumerate(CONFIDENCE_TITLES)
    ]
    return ReportFigure(
        name="router_confidence",
        title="How sure the router is, by layer (mean, and the middle 80% of the tokens)",
        findings=findings,
        panels=panels,
        legend=run_legend(names),
        columns=3,
        table=(["run", "measure", *(f"layer {layer}" for layer in range(layers))], rows),
    )


def _band_chart(names: Sequence[str], domain: tuple[float, float]) -> Drawing:
    """Means by run and layer, with bars from `low` to `high`, side by side."""
    scale = alt.Scale(domain=list(domain))
    base = alt.Chart().encode(
        x=alt.X("layer:O", title="MoE layer", axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("run:N", sort=list(names)),
        color=run_colour(names),
    )
    return alt.layer(
        base.mark_rule(strokeWidth=4, opacity=0.35).encode(y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"),
        base.mark_point(filled=True, size=45, opacity=1).encode(
            y=alt.Y("value:Q", title=None, scale=scale),
            shape=run_shape(names),
            tooltip=[
                "run:N",
                "layer:O",
                alt.Tooltip("value:Q", title="mean", format=".3f"),
                alt.Tooltip("low:Q", title="10% below", format=".3f"),
                alt.Tooltip("high:Q", title="10% above", format=".3f"),
            ],
        ),
    )


def saturation_figure(runs: Sequence[Measurement]) -> ReportFigure | None:
    """Share of a token's final experts that earlier checkpoints select."""
    panels, findings = [], []
    for run in runs:
        found = run.saturation
        if found is None:
            continue
        columns: Columns = {"layer": [], "step": [], "share": []}
        for step, shares in zip(found.steps, found.share.tolist(), strict=True):
            for layer, share in enumerate(shares):
                append(columns, layer=layer, step=step, share=rounded(share))
        panels.append(Panel(run_title(run.name, runs), _saturation_chart(run.num_layers), {None: columns}))
        first, last = found.share.mean(1)[[0, -1]].tolist()
        later = f", at step {found.steps[-1]:,} {last:.0%}" if len(found.steps) > 1 else ""
        findings.append(
            f"{run.name}: at step {found.steps[0]:,} {first:.0%} of a token's final experts are already selected"
            f"{later} (mean over layers, {found.tokens:,} tokens)."
        )
    if not panels:
        return None
    return ReportFigure(
        name="router_saturation",
        title="How early the router settles",
        findings=findings,
        panels=panels,
    )


def _saturation_chart(num_layers: int) -> alt.Chart:
    # From the middle of the ramp: its ends would not be seen on the page.
    steps = [2 + round((HEAT - 3) * layer / max(num_layers - 1, 1)) for layer in range(num_layers)]
    colours = alt.Scale(domain=list(range(num_layers)), range=[variable(f"heat-{step}") for step in steps])
    legend = alt.Legend(symbolType="circle", symbolLimit=num_layers) if num_layers <= 12 else None
    return (
        alt.Chart()
        .mark_line(point=alt.OverlayMarkDef(filled=True, size=40))
        .encode(
            x=alt.X(
                "step:Q",
                title="step of the checkpoint",
                scale=alt.Scale(zero=False, padding=12),
                axis=alt.Axis(tickCount=6),
            ),
            y=alt.Y("share:Q", title="share", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("layer:O", title="layer", scale=colours, legend=legend),
            tooltip=["layer:O", "step:Q", alt.Tooltip("share:Q", format=".1%")],
        )
    )


__all__ = ["PAIRED", "coactivation_figure", "confidence_figure", "saturation_figure"]
