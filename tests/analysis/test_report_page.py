"""The report as a page and as files, without a browser."""

import json
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vl_convert
from planted import DOMAINS, by_domain, evenly

from equipoise.analysis import Measurement
from equipoise.analysis.page import LAYERS, render, report_figures, shown_layers, text_tokens, write_page
from equipoise.analysis.text_sample import SampledText
from equipoise.analysis.vega import VEGA_LITE, ReportFigure, file_spec, page_spec


class Page(HTMLParser):
    """What a browser would find: elements, and what they point at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.data: dict[str, Any] = {}
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [value for name in ("href", "src") if (value := values.get(name))]
        self._in_data = values.get("id") == "report-data"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data = json.loads(data)
            self._in_data = False


@pytest.fixture(scope="module")
def written(measurements: list[Measurement], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_page(folder, measurements, ["A word about <both> runs."])
    return folder


def test_the_page_is_whole_and_needs_nothing_else(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:  # places in the page alone
        assert link.startswith("#")
        assert link[1:] in page.ids
    assert "default-src 'none'" in text
    assert "A word about &lt;both&gt; runs." in text
    assert page.tags.count("section") == 9
    assert sorted(path.name for path in written.iterdir()) == ["figures", "report.html"]  # nothing temporary stays


def test_figures_are_written_in_light_colours_one_of_each_layer(written: Path) -> None:
    names = {path.name for path in (written / "figures").iterdir()}
    alone = ["loss", "bits_per_byte", "max_vio", "specialisation", "olmoe_specialisation", "router_confidence"]
    layered = ["max_vio_over_time", "load_over_time", "experts_by_domain", "domain_divergence"]
    stems = [*alone, "router_saturation", *(f"{name}_layer{layer}" for name in layered for layer in (0, 1))]
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    for path in (written / "figures").iterdir():
        if path.suffix == ".svg":
            assert "var(--" not in path.read_text()
        else:
            width, height = struct.unpack(">II", path.read_bytes()[16:24])
            assert width > 600
            assert height > 300


def test_the_map_of_a_specialised_layer_is_a_diagonal_and_that_of_a_uniform_one_is_flat(written: Path) -> None:
    panels = Page((written / "report.html").read_text(encoding="utf-8")).data["panels"]
    specialised = panels["experts_by_domain-0"]["columns"]
    times = np.array(specialised["0"]["times"]).reshape(4, 4)
    domains = specialised["0"]["domain"][::4]
    experts = specialised["0"]["expert"][:4]
    for place, name in enumerate(domains):
        column = experts.index(DOMAINS.index(name))
        assert times[place, column] > 3.9
        assert np.delete(times[place], column).max() < 0.05
        assert column == place  # a staircase
    uniform = np.array(specialised["1"]["times"]).reshape(4, 4)
    assert uniform[:, :3].min() > 1.1
    assert uniform[:, :3].max() < 1.5
    assert uniform[:, 3].max() == 0  # the dead one comes last
    # And so it is drawn: two colours, on the diagonal and off it, or of three experts and of the dead one.
    drawn = np.array(_fills(panels["experts_by_domain-0"], "0")).reshape(4, 4)
    off = ~np.eye(4, dtype=bool)
    assert set(drawn[off]) == {"var(--heat-0)"}
    assert set(drawn[~off]) <= {"var(--heat-5)", "var(--heat-6)"}  # 4 times an even share is where they meet
    drawn = np.array(_fills(panels["experts_by_domain-0"], "1")).reshape(4, 4)
    assert set(drawn[:, :3].flatten()) == {"var(--heat-3)"}
    assert set(drawn[:, 3]) == {"var(--heat-0)"}


def _fills(panel: dict[str, Any], layer: str) -> list[str]:
    """Colours of the cells as Vega draws them."""
    columns = panel["columns"][layer]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    scene = vl_convert.vegalite_to_scenegraph(
        {**panel["spec"], "width": 300, "data": {"name": "rows", "values": rows}}, vl_version=VEGA_LITE
    )

    def cells(node: Any) -> list[str]:
        if isinstance(node, dict):
            if node.get("marktype") == "rect" and node.get("name") == "marks":
                return [item["fill"] for item in node["items"]]
            return [fill for part in node.values() for fill in cells(part)]
        return [fill for part in node for fill in cells(part)] if isinstance(node, list) else []

    return cells(scene)


def test_every_number_of_a_chart_is_the_measurements(measurements: list[Measurement]) -> None:
    specialised = measurements[0]
    figures = report_figures(measurements)
    columns = figures["specialisation"].panels[0].columns[None]
    measured = [bits for name, bits in zip(columns["series"], columns["bits"], strict=True) if name == "measured"]
    assert measured == pytest.approx(specialised.specialisation.bits.tolist(), rel=1e-3, abs=1e-9)
    columns = figures["max_vio"].panels[0].columns[None]
    assert columns["value"][:2] == pytest.approx(specialised.balance.max_vio_global.tolist(), rel=1e-3)
    batch = figures["max_vio"].panels[1].columns[None]["value"][:2]
    last = [line["max_vio_batch"] for line in specialised.record.metrics][-2:]
    assert batch == pytest.approx(np.mean(last, axis=0).tolist(), rel=1e-3)
    load = figures["load_over_time"].panels[0].columns[1]
    history = specialised.record.load
    for step, expert, value in list(zip(load["step"], load["expert"], load["load"], strict=True))[::7]:
        row = history.load[history.steps.tolist().index(step), 1]
        assert value == pytest.approx(float(row[expert] / row.float().mean()), rel=1e-3)


@pytest.mark.parametrize("theme", ["page", "file"])
def test_every_chart_is_valid_vega_lite(measurements: list[Measurement], theme: str) -> None:
    for figure in report_figures(measurements).values():
        if figure is None:
            continue
        specs = (
            [page_spec(panel) for panel in figure.panels]
            if theme == "page"
            else [file_spec(figure, layer) for layer in figure.layers]
        )
        for spec in specs:
            vl_convert.vegalite_to_vega(spec, vl_version=VEGA_LITE)


def test_what_a_run_does_not_hold_is_said(measurements: list[Measurement]) -> None:
    run = measurements[1]
    bare = replace(run, record=type(run.record)(), untrained=None)
    figures = report_figures([bare])
    missing = {name for name, figure in figures.items() if figure is None}
    assert missing == {
        "loss", "bits_per_byte", "max_vio_over_time", "load_over_time", "coactivation", "router_saturation"
    }  # fmt: skip
    text = render([bare], figures)
    assert text.count('class="missing"') == len(missing) + 1  # and the word to those without scripts
    assert "untrained model" not in Page(text).data["panels"]["specialisation-0"]["columns"][""]["series"]


def test_no_text_can_leave_its_place(measurements: list[Measurement]) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"
    run = measurements[0]
    texts = [SampledText(text.domain, (hostile, *text.pieces[1:]), text.experts, text.weights) for text in run.texts]
    hurt = replace(
        run,
        name=hostile,
        texts=texts,
        trace=replace(run.trace, domains=(hostile, *run.trace.domains[1:])),
        favourites={layer: [[(hostile, 0.5)]] * 4 for layer in run.favourites},
    )
    hurt = replace(hurt, texts=[replace(text, domain=hostile) if text.domain == "ash" else text for text in texts])
    page = Page(render([hurt], report_figures([hurt]), [hostile]))
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert page.data["runs"][0]["texts"][0]["pieces"][0] == hostile or hostile in {
        text["domain"] for text in page.data["runs"][0]["texts"]
    }


def test_many_layers_and_runs_stay_within_bounds() -> None:
    assert shown_layers(4) == (0, 1, 2, 3)
    layers = shown_layers(48)
    assert (len(layers), layers[0], layers[-1]) == (LAYERS, 0, 47)
    for runs, domains, chosen in ((1, 3, 1), (4, 12, 2), (8, 20, 8)):
        tokens = text_tokens(runs, domains, LAYERS, chosen)
        assert tokens >= 16
        assert tokens == 16 or runs * domains * LAYERS * chosen * tokens <= 500_000


def test_a_large_model_makes_a_page_of_a_few_megabytes(measurements: list[Measurement]) -> None:
    run = measurements[0]
    generator = torch.Generator().manual_seed(0)
    layers, experts = 24, 128
    load = torch.randint(0, 50, (len(run.trace.load), layers, experts), generator=generator, dtype=torch.int32)
    wide = torch.ones(layers, dtype=torch.float64)
    found = run.specialisation
    shown = shown_layers(layers)
    large = replace(
        run,
        trace=replace(run.trace, load=load, num_tokens=load[:, 0].sum(-1) // 8),
        specialisation=replace(
            found, bits=wide, normalised=wide, null_bits=torch.zeros(9, layers).double(), standard_error=wide
        ),
        balance=replace(run.balance, max_vio_global=wide, dead_experts=torch.zeros(layers).long()),
        token_identity=torch.full((4, layers, experts), 1 / experts, dtype=torch.float64),
        vocabulary_specialisation=wide,
        favourites={layer: [[("token", 0.123)] * 10] * experts for layer in shown},
        coactivation=_pairs(run.coactivation, layers, experts, generator),
        confidence=_confidence(run.confidence, layers),
        texts=[SampledText("ash", ("abc",) * 200, torch.zeros(200, 12, 8).short(), torch.zeros(200, 12, 8).byte())],
        text_layers=shown,
        untrained=None,
        saturation=None,
        record=replace(run.record, metrics=[], load=None),
    )
    pages = [replace(large, name=f"run{number}") for number in range(4)]
    assert len(render(pages, report_figures(pages)).encode()) < 9_000_000


def _pairs(pairs: Any, layers: int, experts: int, generator: torch.Generator) -> Any:
    made = type(pairs)(num_layers=layers, num_experts=experts)
    counts = torch.randint(1, 100, (layers, experts, experts), generator=generator)
    made.count = counts + counts.mT
    return made


def _confidence(confidence: Any, layers: int) -> Any:
    made = type(confidence).__new__(type(confidence))
    made.__dict__.update(vars(confidence))
    for name in ("sums", "histogram"):
        setattr(made, name, getattr(confidence, name)[:, :1].expand(-1, layers, -1).clone())
    made.overruled = confidence.overruled[:1].expand(layers).clone()
    return made


def test_findings_name_no_layer_that_is_not_there(measurements: list[Measurement]) -> None:
    figures = [figure for figure in report_figures(measurements).values() if isinstance(figure, ReportFigure)]
    assert all(figure.findings and all(figure.findings) for figure in figures)
    for figure in figures:
        for layer in re.findall(r"layer (\d+)", " ".join(figure.findings)):
            assert int(layer) < 2
    assert by_domain("a") == evenly("a") == 0  # the plan on which the tests above stand
