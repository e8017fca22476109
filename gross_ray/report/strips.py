"""Configurations as strips of text for the terminal, one character for each layer, and names for uniform ones."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from gross_ray.errors import InvalidValueError
from gross_ray.space import DENSE, Configuration, listed, ordered

if TYPE_CHECKING:  # `gross show` prints a small table without loading more than it needs
    import pandas as pd

HEADS = ("configuration", "network")
"""Heads of the columns whose cells may name a configuration."""
LEAST_LAYERS = 7
"""Fewest layers for which the terminal shows strips: up to six group-sizes are read at a glance as they are."""
BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", ".:-=+*#D"
"""The characters of group-sizes 1, 2, 4, ..., 32, of 64 and more, and of a dense layer; PLAIN is ASCII."""


def configuration_in(cell: str) -> Configuration | None:
    """Return the configuration that a cell names, like ``4-16-d (fixed)``; None if it names none."""
    for word in cell.split():
        with suppress(InvalidValueError):
            return Configuration.parse(word)
    return None


def uniform_name(configuration: Sequence[int]) -> str:
    """Return "all 4" if each of several layers has group-size 4, "all dense" if none is changed; else an empty text."""
    if len(configuration) < 2 or len(set(configuration)) > 1:
        return ""
    return "all dense" if configuration[0] == DENSE else f"all {configuration[0]}"


def text_strip(configuration: Iterable[int], characters: str = BLOCKS) -> str:
    """Return one character for each layer: the larger the group-size, the fuller; the last one is for a dense layer.

    A group-size that is no power of two has the character of the next smaller power.
    """
    largest = len(characters) - 1  # DENSE is 0: it has no bits, and takes the last character
    return "".join(characters[min(size.bit_length(), largest) - 1] for size in configuration)


def strip_column(cells: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return a column of strips for cells that name configurations: its head, which is the legend, and its cells.

    Uniform configurations are also named. Returns None if no cell names a configuration of `LEAST_LAYERS` layers.
    """
    found = [configuration_in(cell) for cell in cells]
    if max((len(one) for one in found if one), default=0) < LEAST_LAYERS:
        return None
    characters = _characters()
    sizes: dict[str, list[int]] = {}
    for size in ordered(size for one in found if one for size in one):
        sizes.setdefault(text_strip([size], characters), []).append(size)
    legend = " ".join(character + listed(of_it, ",") for character, of_it in sizes.items())
    return legend, [f"{uniform_name(one)} {text_strip(one, characters)}".strip() if one else "" for one in found]


def frame_text(frame: pd.DataFrame) -> str:
    """Return the rows of a stored table as text, with a column of strips beside its configurations."""
    column = strip_column(frame["configuration"].tolist()) if "configuration" in frame else None
    if column is not None:
        frame = frame.copy()
        frame.insert(list(frame.columns).index("configuration") + 1, *column)
    return frame.to_string(index=False)


def _characters() -> str:
    """Return BLOCKS if the standard output can print them, else PLAIN."""
    try:
        BLOCKS.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return PLAIN
    return BLOCKS
