"""The pictures: whole, of the size they claim, and with nothing that reaches over the edge."""

from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure

from equipoise.analysis import LoadHistory
from equipoise.analysis.figures import DPI, load_figure, save_figure, specialisation_figure
from equipoise.analysis.ordering import expert_order


def check_picture(figure: Figure, path: Path) -> None:
    save_figure(figure, path)
    height, width = matplotlib.image.imread(path).shape[:2]
    assert (width, height) == pytest.approx(tuple(figure.get_size_inches() * DPI), abs=1)
    assert matplotlib.image.imread(path)[..., :3].std() > 0.05  # something is drawn
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file stays
    # Everything that is drawn, texts too, lies within the page.
    drawn = figure.get_tightbbox()
    page_width, page_height = figure.get_size_inches()
    assert drawn.x0 >= 0
    assert drawn.y0 >= 0
    assert drawn.x1 <= page_width
    assert drawn.y1 <= page_height


def test_a_figure_is_saved_as_svg_where_its_name_says_so(tmp_path: Path) -> None:
    figure = specialisation_figure(torch.full((2, 1, 4), 0.25, dtype=torch.float64), ["a", "b"], ["layer 0"])
    save_figure(figure, tmp_path / "specialisation.svg")
    assert "<svg" in (tmp_path / "specialisation.svg").read_text()


@pytest.mark.parametrize(("domains", "layers", "experts"), [(12, 12, 64), (3, 2, 4), (12, 3, 16), (1, 1, 1)])
def test_specialisation_figure(domains: int, layers: int, experts: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shares = torch.randn(domains, layers, experts, dtype=torch.float64).softmax(-1)
    titles = [f"layer {layer}\n0.123 bits (chance 0.004, p 0.001)" for layer in range(layers)]
    figure = specialisation_figure(shares, [f"a long domain {n}" for n in range(domains)], titles)
    check_picture(figure, tmp_path / "specialisation.png")
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(images) == layers
    for layer, image in enumerate(images):
        assert torch.equal(torch.from_numpy(image.data), shares[:, layer, expert_order(shares[:, layer])])


@pytest.mark.parametrize(("steps", "layers", "experts"), [(1, 1, 8), (40, 12, 64), (5, 3, 16)])
def test_load_figure(steps: int, layers: int, experts: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    load = torch.randint(0, 500, (steps, layers, experts))
    load[0, 0] = 0  # a step that counted nothing
    load[:, -1, 0] = 0  # a dead expert
    history = LoadHistory(torch.arange(steps) * 10, load, torch.full((steps, layers), float("nan")))
    check_picture(load_figure(history), tmp_path / "load.png")


def test_curves_hold_what_was_measured_and_lie_within_their_axes() -> None:
    load = torch.tensor([[[8, 0, 0, 0], [2, 2, 2, 2]], [[4, 4, 0, 0], [2, 2, 2, 2]]])
    history = LoadHistory(torch.tensor([5, 9]), load, torch.tensor([[3.0, 0.5], [40.0, 0.25]]))
    curves = load_figure(history).axes[:3]
    expected = [[[3, 1], [0, 0]], [[3, 40], [0.5, 0.25]], [[3, 2], [0, 0]]]
    for axis, lines in zip(curves, expected, strict=True):
        for line, values in zip(axis.lines, lines, strict=True):
            assert line.get_xdata().tolist() == [5, 9]
            assert line.get_ydata().tolist() == pytest.approx(values)
            assert axis.get_ylim()[0] <= min(values)
            assert axis.get_ylim()[1] >= max(values)
    assert curves[0].get_ylim() == curves[1].get_ylim()
