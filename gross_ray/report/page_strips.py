"""Configurations as strips of coloured cells for the page: a cell for each layer, as wide as its share of the MACs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gross_ray.report.results import ResultTable
from gross_ray.report.searched import Searched
from gross_ray.report.strips import HEADS, configuration_in, uniform_name
from gross_ray.run.store import RunStore
from gross_ray.space import DENSE, Configuration, listed, ordered

_LIGHTEST, _DARKEST = 0.95, 0.1
"""The ends of Viridis that are used: its very ends are hard to see on a light or a dark page."""


@dataclass(frozen=True)
class Cell:
    """The cell of one layer."""

    title: str
    """Its layer, group-size and share, for whoever points at it."""
    width: float
    """Its part of the strip's width; all parts together are 1."""
    colour: str
    """A CSS colour; empty for a dense layer, which the page draws hatched."""


@dataclass(frozen=True)
class Strip:
    """The picture of one configuration."""

    name: str
    """The configuration as text, like 4-16-d."""
    uniform: str
    """Its short name, like "all 4"; empty unless all layers have the same group-size."""
    summary: str
    """How many layers have which group-size, for whoever cannot see it."""
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Strips:
    """The strips of a page: what they have in common, and the strip of any of its configurations."""

    shares: Mapping[str, float]
    """The share of each decomposed layer in the full network's MACs, in layer order; equal if `counted` is false."""
    counted: bool
    """Whether the run folder has the MACs of the layers."""
    colours: Mapping[int, str]
    """The colour of each group-size that the page shows, ascending, then DENSE without one."""

    @classmethod
    def of(cls, store: RunStore, searched: Searched, tables: Iterable[ResultTable]) -> Strips:
        """Return the strips for `tables`; none before the layers are known."""
        layers, networks = store.read_table("layers"), store.read_table("networks", ["macs"])
        counted = bool(len(layers) and len(networks))
        shares = dict.fromkeys(searched.layers, 1 / max(1, len(searched.layers)))
        if counted:
            shares = dict(zip(layers["layer"], layers["dense_macs"] / networks["macs"].iloc[0], strict=True))
        named = (_named(cell, len(shares)) for table in tables for cell in _cells(table))
        return cls(shares, counted, colours(size for one in named if one for size in one))

    def strip(self, cell: str, head: str = HEADS[0]) -> Strip | None:
        """Return the strip of the configuration that a cell under `head` names; None if it names none."""
        named = _named(cell, len(self.shares)) if head in HEADS else None
        if named is None:
            return None
        total = sum(self.shares.values())
        cells = []
        for (layer, share), size in zip(self.shares.items(), named, strict=True):
            title = f"{layer}: {_words(size)}" + (f", {100 * share:.1f} % of the full network's MACs" * self.counted)
            cells.append(Cell(title, share / total, self.colours[size]))
        numbers = Counter(named)
        summary = ", ".join(f"{_words(size)} in {numbers[size]}" for size in ordered(numbers))
        return Strip(str(named), uniform_name(named), f"{len(named)} layers: {summary}", tuple(cells))

    @property
    def legend(self) -> list[tuple[str, str]]:
        """The label and the colour of each group-size."""
        return [(listed([size]), colour) for size, colour in self.colours.items()]


def colours(group_sizes: Iterable[int]) -> dict[int, str]:
    """Return a colour for each group-size, in their order and evenly spaced on one scale; an empty text for DENSE."""
    from plotly.colors import sample_colorscale

    sizes = ordered(group_sizes)
    coloured = len(sizes) - (DENSE in sizes)
    step = (_DARKEST - _LIGHTEST) / max(1, coloured - 1)
    scale = sample_colorscale("Viridis", [_LIGHTEST + step * place for place in range(coloured)])
    return dict(zip(sizes, [*scale, ""], strict=False))  # DENSE is the last one, if it is one


def _words(size: int) -> str:
    return "dense" if size == DENSE else f"group-size {size}"


def _named(cell: str, num_layers: int) -> Configuration | None:
    """Return the configuration of several layers that a cell names."""
    found = configuration_in(cell)
    return found if found and len(found) == num_layers > 1 else None


def _cells(table: ResultTable) -> Iterator[str]:
    """Yield the cells of a table that may name a configuration."""
    yield from table.heads
    for row in table.rows:
        yield from (cell for head, cell in zip(table.heads, row, strict=True) if head in HEADS)
