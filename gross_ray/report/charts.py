"""What all figures of the page share: colours, layout, and a figure with its words."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from gross_ray.report.results import FIXED, NAMED, SELECTED, ResultTable

COLOURS = ("#2f7fc1", "#d2691e", "#2a9461", "#b0509c", "#8466cf", "#cf4a4a", "#1d8f9c", "#97803a")
"""For lines and marks, told apart by the colour-blind as far as eight can be; on light and dark alike (3:1 or more)."""
GREY = "#7f7f7f"
BLUE, ORANGE, GREEN, PURPLE = COLOURS[:4]
MARKS = {FIXED: (ORANGE, "square"), SELECTED: (PURPLE, "star"), NAMED: (COLOURS[6], "diamond")}
"""Colour and symbol of each kind of configurations (`kinds_of`)."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "cross")
MAX_DETAILS = 200
"""Rows of a figure's numbers as a table, at most."""


@dataclass(frozen=True)
class Chart:
    """A figure of the page, in one or more versions to choose from."""

    name: str
    """Its id in the page."""
    title: str
    summary: str
    """What it shows, with its main numbers, for those who don't see it; stands beneath it too."""
    versions: Mapping[str, go.Figure]
    """By what the chooser calls them; one only: no chooser."""
    chooser: str = ""
    """What is chosen."""
    details: ResultTable | None = None
    """The numbers behind it."""
    budgets: Mapping[str, Any] = field(default_factory=dict)
    """For each version what the filter by budget needs (see `space_chart`); empty: no filter."""
    tall: bool = False


def layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    """Return a figure's layout with the titles of its axes; colours of text and grid are the page's."""
    axis = {"automargin": True, "zeroline": False}
    return {
        "xaxis": axis | {"title": {"text": x, "standoff": 8}} | more.pop("xaxis", {}),
        "yaxis": axis | {"title": {"text": y, "standoff": 8}} | more.pop("yaxis", {}),
        "margin": {"l": 8, "r": 12, "t": 34, "b": 8},
        "showlegend": False,
        "hovermode": "closest",
        "template": None,
        **more,
    }


def shown(text: object) -> str:
    """Return text of a stored table as plotly's labels take it: theirs is a small HTML."""
    return html.escape(str(text), quote=False)


def padded(values: Sequence[float]) -> list[float]:
    """Return the range of an axis that holds all `values` with some air."""
    low, high = float(min(values)), float(max(values))
    air = 0.04 * (high - low) or 0.02 * abs(high) or 1.0
    return [low - air, high + air]


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` (2 or more) of the items, first and last among them, evenly chosen."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
