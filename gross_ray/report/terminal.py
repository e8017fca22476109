"""The results as text: the paper's Tables 2 and 3, the sweep over alpha, and the answers of a search."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gross_ray.report import results as stored
from gross_ray.report.results import ResultTable
from gross_ray.report.scores import near_sentences, score_sentences
from gross_ray.report.searched import Searched
from gross_ray.report.strips import HEADS, frame_text, strip_column
from gross_ray.run.store import RunStore
from gross_ray.search.scores import Score

Row = Sequence[str]


def results(store: RunStore, *, markdown: bool = False, searched: Searched | None = None) -> str:
    """Return all stored results, and which are missing; `searched` is read from the run folder if not passed."""
    sweep = [stored.sweep_table(store)] if stored.is_swept(store) else []
    tables = [*stored.main_tables(store, searched or Searched.of(store)), *sweep]
    return "\n\n".join(as_text(table, markdown) for table in tables)


def stage_results(store: RunStore, stage: str) -> str:
    """Return the results of one stage."""
    if stage == "validate":
        return "\n\n".join(map(as_text, stored.main_tables(store, Searched.of(store))))
    if stage == "search":
        searched, tables = Searched.of(store), []
        if store.experiment.search.budgets:
            selections = stored.selected(store)
            notes = near_sentences(selections, searched) + score_sentences(searched)
            tables.append("\n".join([_frame(selections), *notes]))
        return "\n\n".join([*tables, *map(as_text, stored.limit_tables(store, searched))])
    if stage == "sweep-alpha":
        return as_text(stored.sweep_table(store))
    if stage in ("train", "decompose"):
        return _frame(store.read_table({"train": "networks", "decompose": "decompositions"}[stage]))
    history = store.read_table("history")
    return _frame(history[history["stage"] == stage].groupby("unit", sort=False).tail(1))


def front_table(front: pd.DataFrame, costs: Sequence[str], score: Score) -> str:
    """Return the result of `pareto_front` for `costs` as text, the cheapest configuration first."""
    columns = stored.cost_columns(front, set(costs), score)
    rows = list(zip(*columns.values(), strict=True))
    named = ", ".join(costs)
    return as_text(ResultTable(f"Pareto front of {named} and accuracy in the supernet", list(columns), rows))


def _frame(frame: pd.DataFrame) -> str:
    return frame_text(frame) if len(frame) else "nothing stored"


def as_text(shown: ResultTable, markdown: bool = False) -> str:
    """Return a table with its title and notes; in Markdown, an empty line keeps a note from becoming a row.

    Configurations of many layers have a column of strips beside them, but not in Markdown.
    """
    notes = [*shown.notes, *(f"missing: {what}" for what in shown.missing)]
    if not shown.heads:
        return "\n".join([shown.title, *notes])
    heads, rows = (shown.heads, shown.rows) if markdown else _with_strips(shown)
    table = _table(heads, rows, markdown)
    return "\n".join([shown.title, table, *(f"\n{note}" if markdown else note for note in notes)])


def _with_strips(shown: ResultTable) -> tuple[Row, Sequence[Row]]:
    """Return the heads and rows of a table, with a column of strips if it has configurations of many layers."""
    for place, head in enumerate(shown.heads):
        column = strip_column([row[place] for row in shown.rows]) if head in HEADS else None
        if column is not None:
            after = place + 1
            strips = zip(shown.rows, column[1], strict=True)
            rows = [[*row[:after], strip, *row[after:]] for row, strip in strips]
            return [*shown.heads[:after], column[0], *shown.heads[after:]], rows
    return shown.heads, shown.rows


def _table(heads: Row, rows: Sequence[Row], markdown: bool) -> str:
    if markdown:
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    lines = [heads, *rows]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join("  ".join(["", line[0].ljust(first), *map(str.rjust, line[1:], others)]) for line in lines)
