"""Colours, by the names that the page's style sheet and the charts share.

A chart says `var(--heat-3)`: in the page the style sheet gives it a value for light, for dark and for print, without
drawing anew; in a file it is replaced by the light one. Lightness falls steadily along each ramp, so that order is
seen without colour; runs differ in shape and dash as well.
"""

import re

RUNS = 8
"""How many runs can be told apart."""
DASHES = ((1, 0), (6, 3), (2, 2), (8, 2, 2, 2), (4, 1), (1, 3), (10, 4), (5, 2, 1, 2))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")

HEAT = 9
"""Steps of the ramps."""


def _ramp(name: str, colours: str) -> dict[str, str]:
    return {f"{name}-{index}": colour for index, colour in enumerate(colours.split())}


LIGHT = {
    "page": "#ffffff",
    "panel": "#f6f7f9",
    "text": "#1b1f24",
    "muted": "#57606a",
    "grid": "#e4e7eb",
    "rule": "#cdd3da",
    "link": "#0b5cad",
    "problem": "#b3261e",
    "warning": "#8a5a00",
    "note": "#3d5a80",
    "good": "#1a6b3c",
    # After Okabe and Ito (2008), whose colours the colour-blind tell apart, darkened for thin lines.
    **_ramp("run", "#0072b2 #d55e00 #2e7d32 #b8578f #b57b00 #3a8fc7 #6a4fa3 #7a5c22"),
    **_ramp("series", "#1b1f24 #c75000 #6a4fa3 #6e7781"),
    **_ramp("heat", "#fdfde6 #f0f7c4 #cfe9b5 #8fd0b8 #4db5c2 #2791bd #2a66a5 #27408c #131f5c"),
    **_ramp("even", "#1f5f9e #4f8fc4 #93c0de #d3e5f0 #f5f5f4 #f9d9c4 #eda57e #d2654a #a3222b"),
}
DARK = {
    "page": "#13161a",
    "panel": "#1b1f25",
    "text": "#e6e9ed",
    "muted": "#a2abb6",
    "grid": "#2b3138",
    "rule": "#3a424c",
    "link": "#7cb7f0",
    "problem": "#ff8a80",
    "warning": "#f0b95a",
    "note": "#9dbbe0",
    "good": "#7fd3a0",
    **_ramp("run", "#58a9e6 #f2874a #5fe3a0 #e59ac6 #f0bb52 #8fcdf5 #b79fdc #cfac6b"),
    **_ramp("series", "#e6e9ed #f2874a #b79fdc #a2abb6"),
    **_ramp("heat", "#1a222b #1d2f3d #1f4153 #215767 #2d7478 #449684 #73b98a #b3da8c #f7f7a8"),
    **_ramp("even", "#7cc0ff #549bd8 #3a709f #2c485f #272c32 #523d36 #8a5645 #c97355 #ffa27a"),
}

_VARIABLE = re.compile(r"var\(--([a-z]+(?:-\d+)?)\)")


def variable(name: str) -> str:
    """A colour as charts of the page name it."""
    assert name in LIGHT, name
    return f"var(--{name})"


def ramp(name: str) -> list[str]:
    """The steps of a ramp."""
    return [variable(f"{name}-{index}") for index in range(HEAT)]


def as_light(text: str) -> str:
    """Text with the light value in the place of each colour's name."""
    return _VARIABLE.sub(lambda found: LIGHT[found[1]], text)


__all__ = ["DARK", "DASHES", "HEAT", "LIGHT", "RUNS", "SHAPES", "as_light", "ramp", "variable"]
