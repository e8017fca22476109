"""`gross search` with --budget or --pareto: answer from a finished search, without a lock or any computation."""

from __future__ import annotations

from collections.abc import Sequence

import click

from gross_ray.errors import MissingStageError
from gross_ray.report.results import budget_table, latency_sentences
from gross_ray.report.scores import near_best_of
from gross_ray.report.terminal import as_text, front_table
from gross_ray.run.limits import budget_amounts
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import Budget, RelativeBudget
from gross_ray.search.scores import Score
from pipelines.stages import rounds, search


def best_and_front(
    run: str,
    *,
    budgets: Sequence[Budget | RelativeBudget],
    top: int,
    pareto: bool,
    costs: Sequence[str] | None,
) -> None:
    """Print the `top` most accurate configurations within `budgets`, and, with `pareto`, the Pareto front.

    Raises MissingStageError, naming the command to run, if the search is not finished.
    """
    opened = Run(RunStore.open(run))
    score = Score(opened.experiment.search.score)
    limited, parts = budget_amounts(opened.store, budgets), []
    try:
        if search.by_strategy(opened) and not rounds.ended(opened) and not opened.store.units("selections"):
            raise MissingStageError("its strategy still proposes configurations")
        if budgets:
            best = search.best(opened, limited, top)
            near = near_best_of(best, search.accuracies(opened), limited)
            parts.append(as_text(budget_table(best, limited, score, near)))
        if pareto:
            costs = costs or [budgets[0].cost if budgets else "macs"]
            parts.append(front_table(search.front(opened, costs), costs, score))
    except MissingStageError as error:
        raise MissingStageError(
            f"the search in {opened.store.storage} is not finished: run `gross search {run}` first"
        ) from error
    if "latency_ms" in {*(costs or ()), *(budget.cost for budget in budgets)}:
        parts += latency_sentences(opened.store)
    click.echo("\n\n".join(parts))
