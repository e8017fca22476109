"""The parts that all figures of the page share: colours, the layout, and a figure with its texts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from gross_ray.report.results import FIXED, NAMED, SELECTED, ResultTable

COLOURS = ("#2f7fc1", "#d2691e", "#2a9461", "#b0509c", "#8466cf", "#cf4a4a", "#1d8f9c", "#97803a")
"""Colours of lines and marks: as distinct for the colour-blind as eight can be, contrast 3:1 on light and dark."""
GREY = "#7f7f7f"
BLUE, ORANGE, GREEN, PURPLE = COLOURS[:4]
MARKS = {FIXED: (ORANGE, "square"), SELECTED: (PURPLE, "star"), NAMED: (COLOURS[6], "diamond")}
"""Colour and symbol of each kind of configurations (`kinds_of`)."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "cross")
MAX_DETAILS = 200
"""Maximum number of rows in the table of a figure's numbers."""


@dataclass(frozen=True)
class Chart:
    """A figure of the page, in one or more versions to choose from."""

    name: str
    """Its id in the page."""
    title: str
    summary: str
    """The text beneath it, also for readers who cannot see it: its content with its main numbers."""
    versions: Mapping[str, go.Figure]
    """The versions by their names in the chooser; a single version has no chooser."""
    chooser: str = ""
    """The chooser's label."""
    details: ResultTable | None = None
    """Its numbers as a table."""
    budgets: Mapping[str, Any] = field(default_factory=dict)
    """The data of the filter by budget, for each version (see `space_chart`); empty: no filter."""
    tall: bool = False


def layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    """Return a figure's layout with its axis titles; the page's script sets the colours of text and grid."""
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
    """Return text escaped for plotly's labels, which are read as HTML."""
    return html.escape(str(text), quote=False)


def padded(values: Sequence[float]) -> list[float]:
    """Return the range of an axis that shows all `values` with a margin."""
    low, high = float(min(values)), float(max(values))
    margin = 0.04 * (high - low) or 0.02 * abs(high) or 1.0
    return [low - margin, high + margin]


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` (2 or more) evenly spaced items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(step * (len(items) - 1) / (most - 1))] for step in range(most)]
