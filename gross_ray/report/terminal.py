"""The paper's Tables 2 and 3, the sweep over alpha and what a search under budgets finds, as text."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gross_ray.report import results as stored
from gross_ray.report.results import ResultTable
from gross_ray.report.searched import Searched
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import Budget

Row = Sequence[str]


def results(store: RunStore, *, markdown: bool = False, searched: Searched | None = None) -> str:
    """Return all results that are stored, and what is missing; `searched` is read unless it is given."""
    sweep = [stored.sweep_table(store)] if stored.is_swept(store) else []
    tables = [*stored.main_tables(store, searched or Searched.of(store)), *sweep]
    return "\n\n".join(as_text(table, markdown) for table in tables)


def stage_results(store: RunStore, stage: str) -> str:
    """Return what one stage has to show."""
    if stage == "validate":
        return "\n\n".join(map(as_text, stored.main_tables(store, Searched.of(store))))
    if stage == "search":
        selected = [_frame(stored.selected(store))] if store.experiment.search.budgets else []
        return "\n\n".join([*selected, *map(as_text, stored.limit_tables(store))])
    if stage == "sweep-alpha":
        return sweep_table(store)
    if stage in ("train", "decompose"):
        return _frame(store.read_table({"train": "networks", "decompose": "decompositions"}[stage]))
    history = store.read_table("history")
    return _frame(history[history["stage"] == stage].groupby("unit", sort=False).tail(1))


def network_table(store: RunStore, *, markdown: bool = False) -> str:
    """Return Table 2: the full network and the fixed configurations, accuracy on the test split and MACs."""
    return as_text(stored.network_table(store), markdown)


def selection_table(store: RunStore, *, markdown: bool = False) -> str:
    """Return Table 3: under each budget the fixed and the selected configurations, in the supernet and on their own.

    Beneath it stands how far the supernet ranks all validated configurations as their own training does.
    """
    return as_text(stored.selection_table(store), markdown)


def sweep_table(store: RunStore, *, markdown: bool = False) -> str:
    """Return Figure 1's numbers: accuracy in the supernet less that on its own, for each alpha (validation split)."""
    return as_text(stored.sweep_table(store), markdown)


def inspection_page(tables: Sequence[ResultTable]) -> str:
    """Return what `inspection` gives as text."""
    return "\n\n".join(map(as_text, tables))


def budget_table(best: pd.DataFrame, budgets: Sequence[Budget]) -> str:
    """Return what `best_under` gives as text, the best first."""
    return as_text(stored.budget_table(best, budgets))


def front_table(front: pd.DataFrame, costs: Sequence[str]) -> str:
    """Return what `pareto_front` gives for `costs` as text, the cheapest first."""
    columns = stored.cost_columns(front, set(costs))
    rows = list(zip(*columns.values(), strict=True))
    named = ", ".join(costs)
    return as_text(ResultTable(f"Pareto front of {named} and accuracy in the supernet", list(columns), rows))


def latency_table(store: RunStore) -> str:
    """Return how well the stored latency models predict the time of whole configurations."""
    rows = [
        [
            str(model.device),
            str(model.host),
            str(model.batch_size),
            str(model.threads),
            f"{100 * model.median_error:.1f} % ({model.num_sampled})",
        ]
        for model in store.read_table("latency_models").itertuples()
    ]
    heads = ["device", "host", "batch", "threads", "median error (configurations timed)"]
    return as_text(ResultTable("Predicted latency of a configuration, against its own timing", heads, rows))


def _frame(frame: pd.DataFrame) -> str:
    return frame.to_string(index=False) if len(frame) else "nothing stored"


def as_text(shown: ResultTable, markdown: bool = False) -> str:
    """Return a table between its title and its notes; right beneath one in Markdown, a note would be a row of it."""
    notes = [*shown.notes, *(f"missing: {what}" for what in shown.missing)]
    if not shown.heads:
        return "\n".join([shown.title, *notes])
    table = _table(shown.heads, shown.rows, markdown)
    return "\n".join([shown.title, table, *(f"\n{note}" if markdown else note for note in notes)])


def _table(heads: Row, rows: Sequence[Row], markdown: bool) -> str:
    if markdown:
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[place]) for line in [heads, *rows]) for place in range(len(heads))]
    return "\n".join(
        "  "
        + "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [heads, *rows]
    )
