"""How far a run is, from the names of its files alone: neither torch nor pandas is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gross_ray.run.store import RunStore

Plan = list[list[str]]
"""For each unit of a stage, the names under which its results are stored: its own, or those of its parts."""
_PLANS = "plans"


@dataclass(frozen=True)
class StoredStage:
    """Which files show that a unit of a stage is finished: all of those that are listed here."""

    name: str
    """Name of the stage, and of its checkpoints."""
    table: str | None = None
    """Table that has a file for each unit."""
    checkpoint: bool = True
    """Whether each unit has a checkpoint."""
    history: bool = False
    """Whether the table `history` has a file for each unit, called STAGE,UNIT."""

    def finished(self, store: RunStore) -> set[str]:
        """Return the names of the finished units, from listings of the folders."""
        units = store.finished_units(self.table) if self.table else store.finished_checkpoints(self.name)
        if self.table and self.checkpoint:
            units &= store.finished_checkpoints(self.name)
        if self.history:
            trained = store.finished_units("history")
            units = {unit for unit in units if history_unit(self.name, unit) in trained}
        return units


STORED = {
    stage.name: stage
    for stage in (
        StoredStage("train", "networks", history=True),
        StoredStage("decompose", "decompositions"),
        StoredStage("reconstruct", history=True),
        StoredStage("finetune", history=True),
        StoredStage("search", "configurations", checkpoint=False),
        StoredStage("validate", "validations", history=True),
        StoredStage("sweep-alpha", "alpha_sweep", checkpoint=False),
    )
}
"""The stages in the order in which `gross run` does them."""


def history_unit(stage: str, unit: str) -> str:
    """Return the name under which `history` has a unit of a stage."""
    return f"{stage},{unit}"


def finished_units(store: RunStore, stage: str) -> set[str]:
    """Return the names of a stage's finished units; networks whose weights the user brought have no history."""
    stored = STORED[stage]
    if stage == "train" and store.experiment.weights:
        stored = replace(stored, history=False)
    return stored.finished(store)


def store_plans(store: RunStore, plans: Mapping[str, Plan | None]) -> None:
    """Store each stage's plan; None for a stage that cannot be planned yet."""
    if stored_plans(store) != plans:
        store.write_pin(_PLANS, plans)


def stored_plans(store: RunStore) -> dict[str, Plan | None] | None:
    """Return what `store_plans` stored last; None before the first time."""
    return store.read_pin(_PLANS, _parsed)


def progress(store: RunStore, plans: Mapping[str, Plan | None]) -> list[tuple[str, int, int | None]]:
    """Return (stage, units finished, units planned) for each; planned is None if an earlier stage decides it."""
    rows: list[tuple[str, int, int | None]] = []
    for stage, plan in plans.items():
        finished = set() if plan is None else finished_units(store, stage)
        rows.append(
            (stage, sum(finished.issuperset(names) for names in plan or ()), None if plan is None else len(plan))
        )
    return rows


def _parsed(values: Any) -> dict[str, Plan | None]:
    plans: Sequence[tuple[str, Plan | None]] = [(stage, values[stage]) for stage in STORED]
    return dict(plans)
