"""What a new run folder takes over from another: the units that do not depend on a setting in which the two differ."""

from __future__ import annotations

from dataclasses import dataclass

from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Experiment
from gross_ray.results.store import RunStore
from pipelines import decompose, supernet, train, validate
from pipelines.predictions import TABLES as LATENCY_TABLES


@dataclass(frozen=True)
class _Part:
    """What a stage stores, and the fields and groups of fields of the experiment that decide it."""

    stage: str
    fields: tuple[str, ...]
    tables: tuple[str, ...] = ()
    """Tables that hold nothing but this stage's units."""
    trains: bool = False
    """Whether units named after the stage are in `history`."""


_NETWORKS = (
    "seed",
    "model",
    "weights",
    "data",
    "training",
    "engine.precision",
    "engine.compile",
    "engine.parallel_seeds",
)
_TERMS = (*_NETWORKS, "decomposition")
_SUPERNETS = (*_TERMS, "supernet", "reconstruction")

PARTS = (
    _Part(train.STAGE, _NETWORKS, ("networks",), trains=True),
    _Part(decompose.STAGE, _TERMS, ("decompositions",)),
    _Part("latency", _TERMS, LATENCY_TABLES),
    _Part(supernet.RECONSTRUCT, _SUPERNETS, trains=True),
    _Part(supernet.FINETUNE, (*_SUPERNETS, "finetuning"), trains=True),
    _Part(
        validate.STAGE, (*_TERMS, "validation", "search.budgets", "engine.recalibrate"), ("validations",), trains=True
    ),
)
"""The parts in the order of the stages. A search is not among them: what it evaluates, its strategy decides."""


def take_over(store: RunStore, other: RunStore) -> dict[str, int]:
    """Copy from `other` what `store` lacks and would make alike; return the number of units by stage.

    Nothing of `other` changes. Stages that depend on a field in which the two differ are left out.
    """
    differing = _differing(store.experiment, other.experiment)
    return {part.stage: _copy(store, other, part) for part in PARTS if not _touching(differing, part.fields)}


def check_reusable(experiment: Experiment, other: RunStore) -> None:
    """Raise InvalidValueError, naming a field that differs, if not even the base networks of `other` can be used."""
    touching = _touching(_differing(experiment, other.experiment), PARTS[0].fields)
    if touching:
        name = touching[0]
        values = f"{name} is {experiment.fields()[name]!r} here and {other.experiment.fields().get(name)!r} there"
        raise InvalidValueError(
            f"nothing of {other.storage} can be taken over, for {values}: give the same value, or leave --reuse out"
        )


def _differing(one: Experiment, other: Experiment) -> list[str]:
    theirs = other.fields()
    return [name for name, value in one.fields().items() if value != theirs.get(name)]


def _touching(differing: list[str], fields: tuple[str, ...]) -> list[str]:
    return [name for name in differing if any(name == field or name.startswith(f"{field}.") for field in fields)]


def _copy(store: RunStore, other: RunStore, part: _Part) -> int:
    """Copy the units of one stage: what tells that a unit is finished comes last."""
    checkpoints = other.checkpoints(part.stage)
    prefix = f"{part.stage},"
    history = {unit for unit in other.units("history") if unit.startswith(prefix)} if part.trains else set()
    copied = set()
    for unit in checkpoints:
        if not store.has_checkpoint(part.stage, unit):
            store.copy_checkpoint(other, part.stage, unit)
            copied.add(unit)
        if f"{prefix}{unit}" in history and not store.has_unit("history", f"{prefix}{unit}"):
            store.copy_unit(other, "history", f"{prefix}{unit}")
    for table in part.tables:
        for unit in other.units(table):
            if not store.has_unit(table, unit):
                store.copy_unit(other, table, unit)
                copied.add(unit)
    return len(copied)
