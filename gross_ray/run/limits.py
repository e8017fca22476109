"""The budgets of a run: a limit in percent of the full network's cost becomes an amount."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from gross_ray.errors import MissingStageError
from gross_ray.run.latencies import unit_in_force
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import Budget, RelativeBudget, amounts, parse_budgets


def full_costs(store: RunStore, costs: Collection[str]) -> dict[str, float]:
    """Return these costs of the full network, a latency in the runtime measured last.

    Raises MissingStageError if no base network is stored, and for a latency that is not measured.
    """
    found: dict[str, float] = {}
    if counted := [cost for cost in costs if cost != "latency_ms"]:
        networks = store.read_table("networks", counted)
        if networks.empty:
            raise MissingStageError(f"no base network is stored in {store.storage}: run `gross train` on it first")
        found |= {cost: float(networks[cost].iloc[0]) for cost in counted}
    if "latency_ms" in costs:
        unit = unit_in_force(store)
        if unit is None:
            raise MissingStageError(
                f"a limit on latency_ms in percent of the full network's needs a measurement, and {store.storage} has "
                "none in use: run `gross latency` on it first"
            )
        found["latency_ms"] = float(store.read_units("runtime_latencies", [unit], ["full_ms"])["full_ms"].iloc[0])
    return found


def budget_amounts(store: RunStore, budgets: Iterable[Budget | RelativeBudget]) -> list[Budget]:
    """Return budgets as amounts; raises MissingStageError for one in percent of what is not stored."""
    budgets = list(budgets)
    relative = {budget.cost for budget in budgets if isinstance(budget, RelativeBudget)}
    return amounts(budgets, full_costs(store, relative))


def limits(store: RunStore) -> list[list[Budget]]:
    """Return the budgets of each of the experiment's limits (`search.limits`)."""
    return [budget_amounts(store, parse_budgets(text)) for text in store.experiment.search.limits]
