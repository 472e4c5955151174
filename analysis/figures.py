"""The pictures: who uses which expert, and how the load went over training.

Shapes: G domains, L MoE layers, E experts; S logging steps.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..balancing import dead_experts, max_vio
from ..data import write_whole
from .load_history import LoadHistory
from .ordering import expert_order

# Figures are made without pyplot: no backend to choose, no global state, and nothing to close.
DPI = 130


def specialisation_figure(shares: Tensor, domains: Sequence[str], titles: Sequence[str]) -> Figure:
    """One heatmap per MoE layer: the share of each domain's selections that goes to each expert.

    Experts are ordered within a layer by the domain that uses them most, so that specialised experts form a
    staircase; their numbers stand below. All layers share one scale, on which 1/E, an even share, is marked.

    Args:
        shares: `[G, L, E]`, rows sum to 1.
        domains: G names.
        titles: L titles, one per layer; two short lines each fit the narrowest panel.
    """
    num_domains, num_layers, num_experts = shares.shape
    panel_width = min(max(num_experts * 0.135, 2.4), 12.0)
    panel_height = max(num_domains * 0.17, 0.9) + 0.85
    label_size = 7.0 if num_experts <= 20 else min(6.0, 0.75 * 72 * panel_width / num_experts)
    columns = _columns(num_layers, panel_width, panel_height)
    rows = math.ceil(num_layers / columns)
    size = (max(columns * panel_width + 2.2, 6.0), rows * panel_height + 0.6)  # no narrower than the heading
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle("Share of each domain's selections by expert, in each MoE layer", fontsize=11)

    even = 1 / num_experts
    norm = Normalize(0, max(float(shares.max()), 2 * even))
    for layer, axis in enumerate(axes.flat):
        if layer >= num_layers:
            axis.set_axis_off()
            continue
        order = expert_order(shares[:, layer])
        axis.imshow(shares[:, layer, order].numpy(), norm=norm, cmap="magma_r", aspect="auto", interpolation="nearest")
        axis.set_title(titles[layer], fontsize=8.5)
        labelled = slice(None, None, math.ceil(num_experts / 128))  # more numbers than that would overlap
        axis.set_xticks(range(num_experts)[labelled], order.tolist()[labelled], fontsize=label_size, rotation=90)
        axis.set_yticks(range(num_domains), domains if layer % columns == 0 else [], fontsize=8)
        axis.tick_params(length=0, pad=2)
        if layer >= num_layers - columns:
            axis.set_xlabel("expert", fontsize=8)
    bar = figure.colorbar(ScalarMappable(norm, "magma_r"), ax=axes, fraction=0.04, aspect=30)
    bar.set_label("share of the domain's selections", fontsize=8)
    _mark(bar.ax, even, f"even (1/{num_experts})")
    return figure


def load_figure(history: LoadHistory) -> Figure:
    """Load over training: MaxVio of the global batch and of its micro-batches, dead experts, and each expert's load.

    In the images a row is an expert, the most loaded first, and white is an even load. The scale is logarithmic and
    the same for every run: twice and half the even load are equally far from white, and the ends stand for 8 times and
    an eighth of it, and beyond.
    """
    num_layers = history.load.shape[1]
    columns = min(4, max(3, num_layers))
    image_rows = math.ceil(num_layers / columns)
    figure = Figure(figsize=(columns * 3.4, 3.3 + image_rows * 2.3), dpi=DPI, layout="constrained")
    figure.suptitle("Load over training, by MoE layer", fontsize=11)
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.25, image_rows])
    _draw_curves(upper, history)
    _draw_images(lower, history, image_rows, columns)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes the figure, whole or not at all: as PNG or, where the name ends so, as SVG."""
    write_whole(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:]))


def _draw_curves(figure: SubFigure, history: LoadHistory) -> None:
    num_layers, num_experts = history.load.shape[1:]
    dead = dead_experts(history.load)
    measures = {
        "MaxVio of the global batch": max_vio(history.load),
        "MaxVio of a micro-batch (mean)": history.max_vio_micro,
        f"dead experts of {num_experts} (global batch)": dead,
    }
    axes = figure.subplots(1, 3)
    axes[1].sharey(axes[0])  # what the micro-batches add to the global batch's violation is then seen
    colours = colormaps["viridis"](np.linspace(0, 0.9, num_layers))
    marker = "." if len(history.steps) == 1 else ""
    for axis, (title, values) in zip(axes, measures.items(), strict=True):
        for layer in range(num_layers):
            line = values[:, layer].numpy()
            axis.plot(history.steps.numpy(), line, color=colours[layer], lw=1.2, marker=marker, label=f"layer {layer}")
        axis.set_title(title, fontsize=8.5)
        axis.grid(alpha=0.25)
        _small_ticks(axis)
    axes[0].set_ylim(bottom=0)  # only now: a limit that is set no longer grows with what is drawn
    axes[2].set_ylim(0, max(1.0, float(dead.max()) * 1.05))
    axes[2].yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)


def _draw_images(figure: SubFigure, history: LoadHistory, rows: int, columns: int) -> None:
    num_layers, num_experts = history.load.shape[1:]
    relative = _relative_load(history.load).log2()
    doublings = 3
    norm = Normalize(-doublings, doublings)
    axes = figure.subplots(rows, columns, squeeze=False)
    edges = _edges(history.steps.numpy())
    for layer, axis in enumerate(axes.flat):
        if layer >= num_layers:
            axis.set_axis_off()
            continue
        order = history.load[:, layer].sum(0).argsort(descending=True, stable=True)
        image = relative[:, layer, order].T.numpy()
        # As pixels in an SVG too: a cell for each expert at each step would be many thousands of shapes.
        axis.pcolormesh(edges, np.arange(num_experts + 1), image, norm=norm, cmap="RdBu_r", rasterized=True)
        axis.set_title(f"layer {layer}", fontsize=8.5)
        axis.invert_yaxis()
        axis.set_yticks([])
        _small_ticks(axis)
        if layer % columns == 0:
            axis.set_ylabel("expert", fontsize=8)
    bar = figure.colorbar(ScalarMappable(norm, "RdBu_r"), ax=axes, fraction=0.04, extend="both")
    bar.set_ticks(range(-doublings, doublings + 1), labels=["1/8", "1/4", "1/2", "even", "2", "4", "8"])
    bar.set_label("load / even load", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _columns(panels: int, width: float, height: float) -> int:
    """How many columns give a page near 7:5 with few empty places."""

    def badness(columns: int) -> float:
        rows = math.ceil(panels / columns)
        return abs(math.log(columns * width / (1.4 * rows * height))) + 2 * (rows * columns - panels) / panels

    return min(range(1, panels + 1), key=badness)


def _mark(axis: Axes, value: float, label: str) -> None:
    axis.tick_params(labelsize=7)
    axis.axhline(value, color="tab:blue", lw=1.5)
    # On the left of the bar, where no number stands.
    axis.text(
        -0.15,
        value,
        label,
        transform=axis.get_yaxis_transform(),
        ha="right",
        va="center",
        fontsize=7,
        color="tab:blue",
        rotation=90,
    )


def _relative_load(load: Tensor) -> Tensor:
    """Load [S, L, E] -> load / mean load, above 0; 1 where nothing was counted."""
    mean = load.double().mean(-1, keepdim=True)
    return torch.where(mean > 0, load / mean.clamp_min(1e-12), 1.0).clamp_min(
        1e-6
    )  # a dead expert has a logarithm too


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders of the cells around S steps: [S + 1]."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[1.5 * steps[0] - 0.5 * steps[1]], middle, [1.5 * steps[-1] - 0.5 * steps[-2]]])


def _small_ticks(axis: Axes) -> None:
    axis.tick_params(labelsize=7)
    axis.set_xlabel("step", fontsize=8)
