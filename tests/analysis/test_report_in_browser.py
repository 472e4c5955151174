"""The report in Chromium, as a reader opens it: from a file, in light and dark, narrow and on paper.

Needs a Chromium on the machine (Debian: `apt-get install chromium`); Playwright drives it and brings none here.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import by_domain
from playwright.sync_api import Browser, Page, sync_playwright

from equipoise.analysis import Measurement
from equipoise.analysis.page import render, report_figures
from equipoise.analysis.palette import DARK, LIGHT
from equipoise.analysis.text_sample import SampledText

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)

HOSTILE = "</script><img src='http://example.org/x' onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without its sandbox, which root may not have: the only page it ever sees is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(measurements: list[Measurement], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of one run and one of two; of the text of the first domain, one character stands for three tokens, and
    one piece would like to be a script."""
    folder = tmp_path_factory.mktemp("pages")
    first, *others = measurements[0].texts
    pieces = (HOSTILE, "数", "", "", "\t", "↵\n", *first.pieces[6:])
    hostile = replace(measurements[0], texts=[replace(first, pieces=pieces), *others])
    runs = {"one": [hostile], "two": [hostile, measurements[1]]}
    for name, of_page in runs.items():
        page = render(of_page, report_figures(of_page), ["A word."] if len(of_page) > 1 else [])
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in runs}


@pytest.fixture
def opened(browser: Browser, pages: dict[str, Path]) -> Iterator[Callable[..., Page]]:
    """A function that opens a report and waits until it is drawn. At the end nothing must have gone wrong in it, and
    nothing been asked of the network."""
    contexts, wrong, asked = [], [], []

    def open_page(name: str, *, width: int = 1200, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name].as_uri())
        drawn(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert set(asked) <= {path.as_uri() for path in pages.values()}


def drawn(page: Page) -> None:
    page.wait_for_selector("html[data-state=drawn]", state="attached", timeout=30_000)


def colour(page: Page, selector: str, name: str = "color") -> str:
    """A computed colour, as #rrggbb."""
    value = page.eval_on_selector(selector, f"node => getComputedStyle(node).getPropertyValue('{name}')")
    return "#" + "".join(f"{int(part):02x}" for part in value.removeprefix("rgb(").removesuffix(")").split(","))


def test_every_section_and_chart_is_there(opened: Callable[..., Page]) -> None:
    page = opened("two")
    for name in (
        "At a glance", "What is unhealthy", "What was trained", "How the load is spread",
        "Whether experts specialise in domains", "What each expert likes", "How the router decides",
        "Text, token by token", "How it was measured",
    ):  # fmt: skip
        assert page.locator("h2", has_text=name).is_visible()
    charts = page.locator(".chart")
    assert charts.count() == 21
    for chart in charts.all():
        box = chart.locator("svg").bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 60
        assert chart.get_attribute("aria-label")
        assert chart.locator("svg path").count() > 0
    assert page.locator(".missing").all_inner_texts() == ["A token selects one expert, so none are selected together."]
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href") or "").count() == 1


def test_nothing_is_clipped(opened: Callable[..., Page]) -> None:
    for width in (1200, 390):
        page = opened("two", width=width)
        # What is drawn lies within its picture, and the page is as wide as the window.
        clipped = page.evaluate(
            """() => [...document.querySelectorAll('.chart svg')].flatMap((svg) => {
                const frame = svg.getBoundingClientRect();
                return [...svg.querySelectorAll('text')].filter((text) => {
                    const box = text.getBoundingClientRect();
                    return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1
                        || box.top < frame.top - 1 || box.bottom > frame.bottom + 1);
                }).map((text) => svg.closest('.chart').id + ': ' + text.textContent);
            })"""
        )
        assert clipped == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_layer_switch_changes_maps_tables_and_texts(opened: Callable[..., Page]) -> None:
    page = opened("two")
    assert page.locator("#layer-bar input:checked").get_attribute("value") == "0"  # the one with most to see

    def fills() -> list[str]:
        return page.eval_on_selector_all(
            "#experts_by_domain-0 .mark-rect path", "paths => paths.map((path) => path.getAttribute('fill'))"
        )

    def top_experts() -> list[str]:
        return page.eval_on_selector_all(".text .pieces span", "spans => spans.map((span) => span.dataset.expert)")

    specialised, experts = fills(), top_experts()
    assert len(specialised) == 16
    assert specialised.count("var(--heat-0)") == 12
    table = page.locator("#expert-tables").inner_text()
    page.get_by_label("1", exact=True).check(force=True)
    drawn(page)
    assert fills().count("var(--heat-0)") == 4
    assert top_experts() != experts
    assert page.locator("#expert-tables").inner_text() != table
    assert set(page.locator(".which-layer").all_inner_texts()) == {"layer 1"}
    page.get_by_label("0", exact=True).check(force=True)
    drawn(page)
    assert fills() == specialised
    assert top_experts() == experts


def test_light_dark_and_print(opened: Callable[..., Page]) -> None:
    for scheme, colours in (("light", LIGHT), ("dark", DARK)):
        page = opened("one", color_scheme=scheme)
        assert colour(page, "html", "background-color") == colours["page"]
        assert colour(page, "h2") == colours["text"]
        assert colour(page, "#max_vio-0 svg .role-axis-label text", "fill") == colours["muted"]
        assert colour(page, "#experts_by_domain-0 .mark-rect path", "fill") in {
            colours[f"heat-{step}"] for step in range(9)
        }
    # On paper it is light even for those who read in the dark, without what can only be clicked.
    assert page.locator("#layer-bar").is_visible()
    page.emulate_media(media="print", color_scheme="dark")
    assert colour(page, "h2") == LIGHT["text"]
    assert colour(page, "#max_vio-0 svg .role-axis-label text", "fill") == LIGHT["muted"]
    for selector in ("#layer-bar", "nav", ".controls"):
        assert not page.locator(selector).first.is_visible()
    page.emulate_media(media="screen", color_scheme="dark")
    assert page.locator("details:not([open])").count() > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_tokens_tell_their_experts_to_pointer_and_keyboard(
    opened: Callable[..., Page], measurements: list[Measurement]
) -> None:
    page = opened("one")
    box = page.locator(".text", has_text="ash").first
    spans = box.locator(".pieces span")
    assert spans.count() == 60
    tip = page.locator("#tip")
    assert not tip.is_visible()

    # Text stays text, whatever it holds.
    assert spans.nth(0).inner_text() == HOSTILE
    assert page.locator("img").count() == 0

    spans.nth(20).hover()
    letter = spans.nth(20).inner_text()
    assert f"“{letter}”" in tip.inner_text()
    assert f"expert {by_domain(letter)}, weight 100%" in tip.inner_text()
    page.mouse.move(0, 0)

    # Into the text with Tab, then token by token; parts of a character name the whole.
    box.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    for place, name in ((1, "“数”"), (2, "a part of “数”"), (3, "a part of “数”")):
        page.keyboard.press("ArrowRight")
        assert name in tip.inner_text()
        assert box.locator(".current").get_attribute("data-token") == str(place)
    page.keyboard.press("End")
    assert box.locator(".current").get_attribute("data-token") == "59"
    page.keyboard.press("Escape")
    assert not tip.is_visible()

    # Colours say what the map says: one expert, one colour, and in a specialised layer one for each domain.
    colours = page.eval_on_selector_all(
        ".text",
        "boxes => boxes.map((box) => getComputedStyle(box.querySelectorAll('.pieces span')[30]).backgroundColor)",
    )
    assert len(colours) == len(set(colours)) == 4
    page.get_by_label("show the number of each top expert").check()
    shown = page.eval_on_selector(".pieces span:nth-child(31)", "span => getComputedStyle(span, '::after').content")
    assert shown.strip('"') in {"0", "1", "2", "3"}


def test_texts_of_several_runs_stand_side_by_side(opened: Callable[..., Page]) -> None:
    page = opened("two")
    assert page.locator(".text").count() == 2
    page.locator("#text-domain").select_option("damson")
    assert page.locator(".text h4").all_inner_texts() == ["specialised: damson", "uniform: damson"]
    page.locator("#text-domain").select_option("")
    assert page.locator(".text").count() == 8


def test_experts_of_more_than_256_and_many_a_token_arrive_whole(
    browser: Browser, measurements: list[Measurement], tmp_path: Path
) -> None:
    run = measurements[0]
    experts = torch.tensor([[[300, 1, 299]]] * 4).short().expand(4, 2, 3).contiguous()
    weights = torch.tensor([[[128, 76, 51]]] * 4).byte().expand(4, 2, 3).contiguous()
    generator = torch.Generator().manual_seed(0)
    load = torch.randint(1, 9, (len(run.trace.load), 2, 301), generator=generator, dtype=torch.int32)
    wide = replace(
        run,
        trace=replace(run.trace, load=load, num_tokens=load[:, 0].sum(-1) // 3),
        texts=[SampledText("ash", ("a", "b", "c", "d"), experts, weights)],
        favourites={layer: [[]] * 301 for layer in (0, 1)},
        coactivation=_wide_pairs(run, generator),
        token_identity=torch.full((4, 2, 301), 1 / 301, dtype=torch.float64),
        untrained=None,
    )
    file = tmp_path / "wide.html"
    file.write_text(render([wide], report_figures([wide])), encoding="utf-8")
    page = browser.new_page()
    page.goto(file.as_uri())
    drawn(page)
    page.locator(".pieces span").first.hover()
    lines = page.locator("#tip").inner_text()
    for line in ("expert 300, weight 50%", "expert 1, weight 30%", "expert 299, weight 20%"):
        assert line in lines
    page.close()


def _wide_pairs(run: Measurement, generator: torch.Generator) -> Any:
    pairs = type(run.coactivation)(num_layers=2, num_experts=301)
    counts = torch.randint(1, 50, (2, 301, 301), generator=generator)
    pairs.count = counts + counts.mT
    return pairs
