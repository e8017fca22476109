"""The budgets of a run: a limit in percent of the full network's cost becomes an amount."""

from __future__ import annotations

from collections.abc import Iterable

from gross_ray.errors import MissingStageError
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import RELATIVE, Budget, RelativeBudget, amounts, parse_budgets


def full_costs(store: RunStore) -> dict[str, float]:
    """Return the costs of the full network; raises MissingStageError if no base network is stored."""
    networks = store.read_table("networks", list(RELATIVE))
    if networks.empty:
        raise MissingStageError(f"no base network is stored in {store.storage}: run `gross train` on it first")
    return {cost: float(networks[cost].iloc[0]) for cost in RELATIVE}


def budget_amounts(store: RunStore, budgets: Iterable[Budget | RelativeBudget]) -> list[Budget]:
    """Return budgets as amounts; raises MissingStageError for one in percent if no base network is stored."""
    budgets = list(budgets)
    relative = any(isinstance(budget, RelativeBudget) for budget in budgets)
    return amounts(budgets, full_costs(store) if relative else {})


def limits(store: RunStore) -> list[list[Budget]]:
    """Return the budgets of each of the experiment's limits (`search.limits`)."""
    return [budget_amounts(store, parse_budgets(text)) for text in store.experiment.search.limits]
