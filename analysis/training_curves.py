"""The course of a training, as a run directory records it: loss by domain, gradient, pace."""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import DPI


def training_figure(records: list[dict[str, Any]]) -> Figure:
    """Four panels over the tokens seen: loss, loss by domain, gradient norm beside the learning rate, and the pace
    with where a step's time goes.

    Args:
        records: the lines of `metrics.jsonl`; what a line lacks is left out of its curve.
    """
    figure = Figure(figsize=(11.5, 7.2), dpi=DPI, layout="constrained")
    figure.suptitle("Training, over tokens seen", fontsize=11)
    (loss, by_domain), (gradient, pace) = figure.subplots(2, 2)
    _draw(loss, records, "lm_loss", "black", "language-model loss")
    loss.set_title("loss, nats per token (mean since the line before)", fontsize=9)
    _draw_domains(by_domain, records)

    _draw(gradient, records, "grad_norm", "tab:gray", "gradient norm, before clipping")
    gradient.set_ylim(bottom=0)
    gradient.set_title("gradient norm (grey) and learning rate (blue)", fontsize=9)
    rate = gradient.twinx()
    _draw(rate, records, "learning_rate", "tab:blue", "learning rate")
    rate.set_ylim(bottom=0)
    rate.tick_params(labelsize=7, colors="tab:blue")

    _draw(pace, records, "tokens_per_second", "black", "tokens per second")
    pace.set_ylim(bottom=0)
    pace.set_title("tokens per second (black) and shares of a step's time", fontsize=9)
    _draw_phases(pace.twinx(), records)
    for axis in (loss, by_domain, gradient, pace):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("million tokens", fontsize=8)
    return figure


def _draw(axis: Axes, records: list[dict[str, Any]], name: str, colour: str, label: str) -> None:
    points = [(record["tokens"] / 1e6, record[name]) for record in records if record.get(name) is not None]
    if points:
        axis.plot(
            *zip(*points, strict=True), color=colour, lw=1.2, label=label, marker="." if len(points) == 1 else ""
        )


def _draw_domains(axis: Axes, records: list[dict[str, Any]]) -> None:
    domains = sorted({name for record in records for name in record.get("domain_loss", {})})
    colours = colormaps["tab20"](np.linspace(0, 1, 20))
    for number, domain in enumerate(domains):
        points = [
            (record["tokens"] / 1e6, record["domain_loss"][domain])
            for record in records
            if domain in record.get("domain_loss", {})
        ]
        # Every even colour of the map is dark; after ten domains the light ones follow.
        colour = colours[(2 * number) % 20 + (number // 10) % 2]
        axis.plot(
            *zip(*points, strict=True), color=colour, lw=1.1, label=domain, marker="." if len(points) == 1 else ""
        )
    axis.set_title("loss by domain", fontsize=9)
    if domains:
        axis.legend(fontsize=6.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_phases(axis: Axes, records: list[dict[str, Any]]) -> None:
    timed = [record for record in records if sum(record.get("step_seconds", {}).values()) > 0]
    if timed:
        phases = list(timed[0]["step_seconds"])
        seconds = np.array([[record["step_seconds"][phase] for phase in phases] for record in timed])
        shares = seconds / seconds.sum(axis=1, keepdims=True)
        colours = colormaps["Set2"](range(len(phases)))
        tokens = [record["tokens"] / 1e6 for record in timed]
        axis.stackplot(tokens, shares.T, labels=phases, colors=colours, alpha=0.45)
        axis.legend(fontsize=6.5, frameon=False, loc="center left", bbox_to_anchor=(1.08, 0.5))
    axis.set_ylim(0, 1)
    axis.tick_params(labelsize=7)
    axis.set_zorder(-1)  # the pace is drawn over it


__all__ = ["training_figure"]
