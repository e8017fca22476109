"""What a new run folder takes over from another: the units that do not depend on a setting in which the two differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gross_ray.data.image_set import Splits
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Experiment
from gross_ray.run.opened import Run
from gross_ray.run.pins import check_data, check_weights, stored_data, stored_weights
from gross_ray.run.store import RunStore
from gross_ray.space import Configuration
from gross_ray.weights import hash_of_tensors, read_weights
from pipelines.stages import decompose, finetune, latencies, reconstruct, rounds, search, supernets, train, validate


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

_REMEDY = "give the same ones, or leave --reuse out"

PARTS = (
    _Part(train.NAME, _NETWORKS, ("networks",), trains=True),
    _Part(decompose.NAME, _TERMS, ("decompositions",)),
    _Part(latencies.STAGE, _TERMS, latencies.TABLES),
    _Part(reconstruct.NAME, _SUPERNETS, trains=True),
    _Part(finetune.NAME, (*_SUPERNETS, "finetuning"), trains=True),
    _Part(
        validate.NAME, (*_TERMS, "validation", "search.budgets", "engine.recalibrate"), ("validations",), trains=True
    ),
)
"""The parts in the order of the stages. A search is not among them, for what it evaluates, its strategy decides."""


def take_over(store: RunStore, other: RunStore) -> dict[str, int]:
    """Copy from `other` what `store` lacks and would make alike; return the number of units by stage.

    Nothing of `other` changes. Stages that depend on a field in which the two differ are left out. `store` is pinned to
    the images and weights that the units were made with. Raises DatasetError or InvalidValueError where it is pinned to
    others.
    """
    _share_pins(store, other)
    differing = _differing(store.experiment, other)
    return {part.stage: _copy(store, other, part) for part in PARTS if not _touching(differing, part.fields)}


def take_evaluations(run: Run, other: RunStore) -> int:
    """Let the search of `run` by a strategy begin with what `other` evaluated; return how many configurations.

    They are round 0 and cost no evaluation. Nothing happens if the search has begun, or `other` has evaluated nothing
    in all the supernets. Raises InvalidValueError for a search of the whole space, and, naming a field that differs, if
    evaluations would not be equal here.
    """
    if not search.by_strategy(run):
        raise InvalidValueError(
            "search.strategy = 'exhaustive': it evaluates all, and learns from none; choose another one, or leave "
            "--reuse-evaluations out"
        )
    _check_alike(run.experiment, other, _EVALUATIONS, "--reuse-evaluations")
    _share_pins(run.store, other)
    searched, rows = supernets.searched(run), other.read_table("configurations")
    found = {unit: rows[rows["supernet"] == unit.name].drop_duplicates("configuration") for unit in searched}
    known = set.intersection(*(set(each["configuration"]) for each in found.values()))
    if not known or rounds.stored(run):
        return 0
    run.store.copy_checkpoint(other, search.PLAN, "plan")
    rounds.begin(run, [Configuration.parse(text) for text in known])
    for unit in searched:
        by_name = found[unit].set_index("configuration", drop=False).assign(latency_ms=None)
        for part in rounds.units(unit, 0, rounds.stored(run)[0]):
            names = list(map(str, part.configurations))
            if known.issuperset(names):  # else the part is evaluated: a fixed one that is new is in it
                taken = by_name.loc[names].to_dict("records")
                run.store.write_table("configurations", part.name, taken, layers=run.space.layers)
    run.changed()
    return len(known)


def check_reusable(experiment: Experiment, other: RunStore) -> None:
    """Raise InvalidValueError, naming a field that differs, if not even the base networks of `other` can be used.

    Weights are compared by their hash: they differ where the tensors do, wherever the files are.
    """
    _check_alike(experiment, other, PARTS[0].fields, "--reuse")
    if experiment.weights and Path(experiment.weights).is_file():
        found = hash_of_tensors(read_weights(experiment.weights))
        check_weights(other, experiment.weights, found, _REMEDY)


def check_same_images(splits: Splits, other: RunStore) -> None:
    """Raise DatasetError, naming the split and both hashes, where `other` was made with other images."""
    check_data(other, splits, _REMEDY)


def _share_pins(store: RunStore, other: RunStore) -> None:
    """Pin `store` to the images and the weights of `other`, whose units it takes over.

    Raises DatasetError or InvalidValueError, naming both hashes, where `store` is pinned to others.
    """
    ours, theirs = stored_data(store), stored_data(other)
    if ours is not None and theirs is not None:
        theirs.check(ours, str(other.storage), _REMEDY)
    elif theirs is not None:
        store.write_pin("data", theirs.to_dict())
    mine, given = stored_weights(store), stored_weights(other)
    if mine is not None and given is not None:
        check_weights(other, store.experiment.weights, mine, _REMEDY)
    elif given is not None and store.experiment.weights:
        store.write_pin("weights", {"hash": given})


def _check_alike(experiment: Experiment, other: RunStore, fields: tuple[str, ...], option: str) -> None:
    touching = _touching(_differing(experiment, other), fields)
    if touching:
        name = touching[0]
        values = f"{name} is {experiment.fields()[name]!r} here and {other.experiment.fields().get(name)!r} there"
        raise InvalidValueError(
            f"nothing of {other.storage} can be taken over, for {values}: give the same value, or leave {option} out"
        )


def _differing(experiment: Experiment, other: RunStore) -> list[str]:
    return experiment.differences(other.experiment, paths=other.unpinned())


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
