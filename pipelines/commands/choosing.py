"""`gross search` with --budget or --pareto: answers from a finished search, without a write lock or any work."""

from __future__ import annotations

from collections.abc import Sequence

import click

from gross_ray.errors import MissingStageError
from gross_ray.report.terminal import budget_table, front_table
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import Budget
from pipelines import rounds, search


def best_and_front(run: str, *, budgets: Sequence[Budget], top: int, pareto: bool, costs: Sequence[str] | None) -> None:
    """Print the `top` most accurate configurations within `budgets` if there are any, and the front if `pareto`.

    Raises MissingStageError, naming the command to run, unless the search is finished.
    """
    store = RunStore.open(run)
    parts = []
    try:
        if search.by_strategy(store) and not rounds.ended(store) and not store.units("selections"):
            raise MissingStageError("its strategy still proposes configurations")
        if budgets:
            parts.append(budget_table(search.best(store, budgets, top), budgets))
        if pareto:
            costs = costs or [budgets[0].cost if budgets else "macs"]
            parts.append(front_table(search.front(store, costs), costs))
    except MissingStageError as error:
        raise MissingStageError(
            f"the search in {store.storage} is not finished: run `gross search {run}` first"
        ) from error
    click.echo("\n\n".join(parts))
