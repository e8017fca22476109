"""The progress of a run, from the names of its files alone: neither torch nor pandas is imported."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from gross_ray.errors import RunFolderError
from gross_ray.run.store import RunStore

Plan = list[list[str]]
"""For each unit of a stage, the names under which its results are stored: its own name, or those of its parts."""
_PLANS = "plans"


@dataclass(frozen=True)
class StoredStage:
    """The files of a stage's unit: a unit is finished if all of them exist."""

    name: str
    """Name of the stage and of its checkpoints."""
    table: str | None = None
    """Table with a file for each unit."""
    checkpoint: bool = True
    """Whether each unit has a checkpoint."""
    history: bool = False
    """Whether the table `history` has a file STAGE,UNIT for each unit."""

    def finished(self, store: RunStore) -> set[str]:
        """Return the names of the finished units."""
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
    """Return the name of a stage's unit in the table `history`."""
    return f"{stage},{unit}"


def finished_units(store: RunStore, stage: str) -> set[str]:
    """Return the names of a stage's finished units; base networks that are not trained have no history."""
    stored = STORED[stage]
    if stage == "train" and not store.experiment.trains_base:
        stored = replace(stored, history=False)
    return stored.finished(store)


def store_plans(store: RunStore, plans: Mapping[str, Plan | None]) -> None:
    """Store each stage's plan; None for a stage that cannot be planned yet."""
    if stored_plans(store) != plans:
        store.write_pin(_PLANS, plans)


def stored_plans(store: RunStore) -> dict[str, Plan | None] | None:
    """Return the plans that `store_plans` stored last; None if none are stored, or none that can be read."""
    with suppress(RunFolderError):  # they follow from the rest of the folder: the next command stores them anew
        return store.read_pin(_PLANS, lambda values: {stage: values[stage] for stage in STORED})
    return None


def progress(store: RunStore, plans: Mapping[str, Plan | None]) -> list[tuple[str, int, int | None]]:
    """Return (stage, units finished, units planned) for each; planned is None if it depends on an earlier stage."""
    rows: list[tuple[str, int, int | None]] = []
    for stage, plan in plans.items():
        if plan is None:
            rows.append((stage, 0, None))
        else:
            finished = finished_units(store, stage)
            rows.append((stage, sum(map(finished.issuperset, plan)), len(plan)))
    return rows
