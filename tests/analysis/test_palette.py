"""Colours: legible in light and dark, and ordered without colour."""

from itertools import combinations, pairwise

import pytest

from equipoise.analysis.palette import DARK, DASHES, HEAT, LIGHT, RUNS, SHAPES, as_light, ramp, variable


def linear(colour: str) -> list[float]:
    """Light of each channel, from 0 to 1 (sRGB)."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_and_lines_stand_out(colours: dict[str, str]) -> None:
    for ground in ("page", "panel"):
        for name in ("text", "muted", "link", "problem", "warning", "note", "good"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for place in range(RUNS):
        assert contrast(colours[f"run-{place}"], colours["page"]) >= 3, place
    for place in range(4):
        assert contrast(colours[f"series-{place}"], colours["page"]) >= 3, place


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_ramps_are_ordered_by_lightness(colours: dict[str, str]) -> None:
    heat = [luminance(colours[f"heat-{place}"]) for place in range(HEAT)]
    steps = [later - earlier for earlier, later in pairwise(heat)]
    assert all(step < 0 for step in steps) or all(step > 0 for step in steps)
    # Away from the middle, both ways, the load ramp leaves the page's own lightness.
    even = [luminance(colours[f"even-{place}"]) for place in range(HEAT)]
    away = [abs(value - even[HEAT // 2]) for value in even]
    assert away[: HEAT // 2 + 1] == sorted(away[: HEAT // 2 + 1], reverse=True)
    assert away[HEAT // 2 :] == sorted(away[HEAT // 2 :])


# What is left of light without the red, the green and the blue cones (Machado, Oliveira and Fernandes 2009).
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def seen_by(colour: str, matrix: list[list[float]]) -> list[float]:
    light = [sum(weight * value for weight, value in zip(row, linear(colour), strict=True)) for row in matrix]
    light = [min(max(value, 0), 1) for value in light]
    return [12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055 for value in light]


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_first_four_runs_are_told_apart_by_the_colour_blind(kind: str) -> None:
    for colours in (LIGHT, DARK):
        seen = [seen_by(colours[f"run-{place}"], BLINDNESS[kind]) for place in range(4)]
        for one, other in combinations(seen, 2):
            assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.14


def test_runs_differ_in_dash_and_shape_too() -> None:
    assert len(set(DASHES)) == len(set(SHAPES)) == RUNS


def test_both_themes_name_the_same_colours_and_files_get_the_light_ones() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert as_light(f'["{variable("run-3")}", "{ramp("heat")[0]}", "text"]') == (
        f'["{LIGHT["run-3"]}", "{LIGHT["heat-0"]}", "text"]'
    )
