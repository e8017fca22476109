"""What a new run folder takes over from another: the units that do not depend on a setting in which the two differ."""

from __future__ import annotations

from dataclasses import dataclass

from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Experiment
from gross_ray.run.store import RunStore
from gross_ray.space import Configuration
from pipelines import decompose, rounds, search, supernet, train, validate
from pipelines.networks import load_base
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
)
"""Without those of the engine that change rounding alone, as devices and threads do: capture, parallel_seeds."""
_TERMS = (*_NETWORKS, "decomposition")
_SUPERNETS = (*_TERMS, "supernet", "reconstruction")

_EVALUATIONS = (
    *(*_SUPERNETS, "finetuning", "engine.recalibrate"),
    *(f"search.{name}" for name in ("form", "precision", "memory_budget")),
)

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
"""The parts in the order of the stages. A search is not among them, for what it evaluates, its strategy decides."""


def take_over(store: RunStore, other: RunStore) -> dict[str, int]:
    """Copy from `other` what `store` lacks and would make alike; return the number of units by stage.

    Nothing of `other` changes. Stages that depend on a field in which the two differ are left out.
    """
    differing = _differing(store.experiment, other.experiment)
    return {part.stage: _copy(store, other, part) for part in PARTS if not _touching(differing, part.fields)}


def take_evaluations(store: RunStore, other: RunStore) -> int:
    """Let the search of `store` by a strategy begin with what `other` evaluated; return how many configurations.

    They are round 0 and cost no evaluation. Nothing happens where the search has begun, or `other` has evaluated
    nothing in all the supernets. Raises InvalidValueError for a search of the whole space, and where evaluations would
    not be equal here, naming a field that differs.
    """
    if not search.by_strategy(store):
        raise InvalidValueError(
            "search.strategy = 'exhaustive': it evaluates all, and learns from none; choose another one, or leave "
            "--reuse-evaluations out"
        )
    _check_alike(store.experiment, other, _EVALUATIONS, "--reuse-evaluations")
    planned, rows = supernet.plan(store), other.read_table("configurations")
    found = {unit.name: rows[rows["supernet"] == unit.name].drop_duplicates("configuration") for unit in planned}
    known = set.intersection(*(set(each["configuration"]) for each in found.values()))
    if not known or rounds.stored(store):
        return 0
    store.copy_checkpoint(other, search.PLAN, "plan")
    rounds.begin(store, [Configuration.parse(text) for text in known])
    layers = load_base(store).space.layers
    for one in planned:
        by_name = found[one.name].set_index("configuration", drop=False).assign(latency_ms=None)
        for unit in rounds.units(one, 0, rounds.stored(store)[0]):
            names = unit.arguments["configurations"]
            if known.issuperset(names):  # else the part is evaluated: a fixed one that is new is in it
                store.write_table("configurations", unit.name, by_name.loc[names].to_dict("records"), layers=layers)
    return len(known)


def check_reusable(experiment: Experiment, other: RunStore) -> None:
    """Raise InvalidValueError, naming a field that differs, if not even the base networks of `other` can be used."""
    _check_alike(experiment, other, PARTS[0].fields, "--reuse")


def _check_alike(experiment: Experiment, other: RunStore, fields: tuple[str, ...], option: str) -> None:
    touching = _touching(_differing(experiment, other.experiment), fields)
    if touching:
        name = touching[0]
        values = f"{name} is {experiment.fields()[name]!r} here and {other.experiment.fields().get(name)!r} there"
        raise InvalidValueError(
            f"nothing of {other.storage} can be taken over, for {values}: give the same value, or leave {option} out"
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
