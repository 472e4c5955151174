"""Charts as Vega-Lite: one description each for the page, for PNG and for SVG.

Altair makes and checks the descriptions; vl-convert draws the files, and brings the script that draws in the page.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import vl_convert

from ..data import write_whole
from .palette import DASHES, SHAPES, as_light, ramp, variable

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])

UNKNOWN = "\N{EN DASH}"
"""Stands in a table for what is not known."""

Columns = dict[str, list[Any]]

Drawing = alt.Chart | alt.LayerChart | alt.FacetChart


@dataclass(frozen=True)
class Panel:
    """One chart, and what it shows."""

    title: str
    """Empty where the figure's says all."""
    chart: Drawing
    """Without data and size; its fields are the columns' names."""
    columns: Mapping[int | None, Columns]
    """What it shows, by layer, or under None if it does not depend on the layer."""
    height: int = 220


@dataclass(frozen=True)
class Line:
    """How one series is drawn: in shape and dash too, for those who do not see the colour."""

    name: str
    colour: str
    dash: Sequence[int]
    shape: str


@dataclass(frozen=True)
class Legend:
    """What the colours stand for: the steps of a ramp, or lines."""

    title: str
    ramp: str = ""
    labels: Sequence[str] = ()
    lines: Sequence[Line] = ()


@dataclass(frozen=True)
class ReportFigure:
    """Panels that belong together."""

    name: str
    """Of the files, and of the place in the page."""
    title: str
    findings: Sequence[str]
    """What is to be seen, in sentences, of all layers; they stand below, and for those who do not see the charts."""
    panels: Sequence[Panel]
    legend: Legend | None = None
    columns: int = 2
    """Panels side by side, where there is room."""
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    """The numbers: header and rows."""
    words: int = 2
    """Columns of the table that hold words; the others hold numbers."""

    @property
    def layers(self) -> list[int | None]:
        """The layers it can show; None alone where it does not depend on the layer."""
        return sorted({layer for panel in self.panels for layer in panel.columns}, key=lambda layer: layer or 0)


def page_spec(panel: Panel) -> dict[str, Any]:
    """A panel as the page draws it: as wide as there is room, its data to be put in under the name `rows`."""
    chart = panel.chart.properties(
        data=alt.NamedData(name="rows"),
        width="container",
        height=panel.height,
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        background="transparent",
    )
    return chart.configure(**_config("inherit")).to_dict()


def save_figures(figure: ReportFigure, folder: Path) -> list[Path]:
    """Writes a figure as PNG and SVG, one of each layer if it depends on it: `<name>.png`, `<name>_layer<n>.svg`.

    Each file is written under a temporary name and renamed.
    """
    written = []
    for layer in figure.layers:
        stem = figure.name if layer is None else f"{figure.name}_layer{layer}"
        svg = vl_convert.vegalite_to_svg(file_spec(figure, layer), vl_version=VEGA_LITE)
        for kind, content in (("svg", svg.encode()), ("png", vl_convert.svg_to_png(svg, scale=2))):
            written.append(write_whole(folder / f"{stem}.{kind}", _writer(content)))
    return written


def file_spec(figure: ReportFigure, layer: int | None) -> dict[str, Any]:
    """A figure as a file shows it: in light colours, with title and legend, and its data."""
    shown = [panel for panel in figure.panels if layer in panel.columns]
    parts = [
        panel.chart.properties(
            data=alt.InlineData(values=rows(panel.columns[layer])),
            width=380 if len(shown) > 1 else 620,
            height=panel.height,
            title=panel.title,
        )
        for panel in shown
    ]
    title = alt.TitleParams(
        figure.title if layer is None else f"{figure.title}, layer {layer}", fontSize=14, offset=14
    )
    panels = alt.concat(*parts, columns=figure.columns)
    whole = alt.vconcat(panels, *([_legend_chart(figure.legend)] if figure.legend else []), spacing=18, title=title)
    return json.loads(as_light(json.dumps(whole.configure(**_config("sans-serif")).to_dict())))


def rows(columns: Columns) -> list[dict[str, Any]]:
    """Columns as rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def append(columns: Columns, **values: Any) -> None:
    """Adds a row to columns."""
    for name, value in values.items():
        columns[name].append(value)


def rounded(value: float) -> float:
    """Four digits: more are not seen, and the page must carry them."""
    return float(f"{value:.4g}")


def evenly(count: int, most: int) -> list[int]:
    """At most `most` places of `count`, evenly, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()})


def from_zero(highest: float) -> tuple[float, float]:
    """An axis that holds what there is, with room for the marks of the highest."""
    return 0.0, 1.06 * highest if highest > 0 else 1.0


def line_chart(
    x: str,
    y: str,
    x_title: str,
    y_title: str,
    names: Sequence[str],
    *,
    domain: tuple[float, float] | None = None,
    points: bool = False,
) -> Drawing:
    """Lines by the field `run`; with `points` also the points, for an axis of few places.

    Args:
        domain: of `y`; without it the axis holds what there is, and not 0.
    """
    scale = alt.Scale(zero=False) if domain is None else alt.Scale(domain=list(domain))
    x_axis = alt.Axis(labelAngle=0) if x.endswith(":O") else alt.Axis(tickCount=6)
    base = alt.Chart().encode(
        x=alt.X(x, title=x_title, axis=x_axis), y=alt.Y(y, title=y_title, scale=scale), color=run_colour(names)
    )
    tooltip = ["run:N", alt.Tooltip(x, title=x_title), alt.Tooltip(y, title=y_title, format=".3f")]
    dashes = alt.Scale(domain=list(names), range=[list(dash) for dash in DASHES[: len(names)]])
    line = base.mark_line(strokeWidth=1.8).encode(strokeDash=alt.StrokeDash("run:N", scale=dashes, legend=None))
    if points:
        marks = base.mark_point(filled=True, size=50, opacity=1).encode(shape=run_shape(names), tooltip=tooltip)
    else:
        marks = base.mark_point(opacity=0, size=90).encode(tooltip=tooltip)  # for the pointer to find
    return alt.layer(line, marks)


def run_colour(names: Sequence[str]) -> alt.Color:
    """The field `run` as colour."""
    colours = [variable(f"run-{index}") for index in range(len(names))]
    return alt.Color("run:N", scale=alt.Scale(domain=list(names), range=colours), legend=None)


def run_shape(names: Sequence[str]) -> alt.Shape:
    """The field `run` as shape."""
    return alt.Shape("run:N", scale=alt.Scale(domain=list(names), range=list(SHAPES[: len(names)])), legend=None)


def run_legend(names: Sequence[str]) -> Legend | None:
    """A legend of runs, in their order; none for one."""
    if len(names) == 1:
        return None
    lines = [Line(name, variable(f"run-{index}"), DASHES[index], SHAPES[index]) for index, name in enumerate(names)]
    return Legend("run", lines=lines)


def run_title(name: str, runs: Sequence[Any]) -> str:
    """The title of a run's panel: none where there is no other."""
    return name if len(runs) > 1 else ""


def stepped(field: str, steps: Sequence[float], name: str) -> alt.Color:
    """A field as the steps of the ramp called `name`."""
    return alt.Color(field, scale=alt.Scale(type="threshold", domain=list(steps), range=ramp(name)), legend=None)


def step_labels(steps: Sequence[float]) -> list[str]:
    """What the steps of a ramp stand for."""
    written = [f"{step:g}" for step in steps]
    return [f"< {written[0]}", *(f"{low}\N{EN DASH}{high}" for low, high in pairwise(written)), f"> {written[-1]}"]


def _legend_chart(legend: Legend) -> alt.Chart:
    """A legend drawn as a chart: that of a file."""
    labels = list(legend.labels) if legend.ramp else [line.name for line in legend.lines]
    colours = ramp(legend.ramp) if legend.ramp else [line.colour for line in legend.lines]
    width = 64 if legend.ramp else 30 + 6 * max(map(len, labels))
    axis = alt.Axis(ticks=False, domain=False, grid=False, labelAngle=0, labelLimit=300, labelOverlap=False)
    chart = alt.Chart(alt.InlineData(values=[{"label": label} for label in labels])).encode(
        x=alt.X("label:N", sort=labels, title=legend.title, axis=axis),
        color=alt.Color("label:N", scale=alt.Scale(domain=labels, range=colours), legend=None),
    )
    if legend.ramp:
        drawn = chart.mark_rect(height=12)
    else:
        shapes = alt.Scale(domain=labels, range=[line.shape for line in legend.lines])
        shape = alt.Shape("label:N", scale=shapes, legend=None)
        drawn = chart.mark_point(filled=True, size=90, opacity=1).encode(shape=shape)
    return drawn.properties(width=width * len(labels), height=14)


def _writer(content: bytes) -> Any:
    return lambda file: file.write_bytes(content)


def _config(font: str) -> dict[str, Any]:
    """Colours and sizes of every chart."""
    return {
        "font": font,
        "axis": {
            "labelColor": variable("muted"),
            "titleColor": variable("muted"),
            "gridColor": variable("grid"),
            "domainColor": variable("rule"),
            "tickColor": variable("rule"),
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "aria": False,
        },
        # The figure speaks for its charts, in a sentence; a label of every mark would drown it.
        "mark": {"aria": False},
        "title": {"color": variable("text"), "fontSize": 12, "fontWeight": 600, "anchor": "start"},
        "view": {"stroke": None},
        "legend": {"labelColor": variable("muted"), "titleColor": variable("muted"), "titleFontWeight": "normal"},
    }


__all__ = [
    "UNKNOWN",
    "VEGA_LITE",
    "Columns",
    "Drawing",
    "Legend",
    "Line",
    "Panel",
    "ReportFigure",
    "append",
    "evenly",
    "file_spec",
    "from_zero",
    "line_chart",
    "page_spec",
    "rounded",
    "rows",
    "run_colour",
    "run_legend",
    "run_shape",
    "run_title",
    "save_figures",
    "step_labels",
    "stepped",
]
