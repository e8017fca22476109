"""Reuse of another run: a new run folder takes over the units that do not depend on any setting that differs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gross_ray.data.image_set import Splits
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Experiment
from gross_ray.run import latencies
from gross_ray.run.opened import Run
from gross_ray.run.pins import check_data, check_weights, stored_data, stored_weights
from gross_ray.run.store import RunStore
from gross_ray.weights import hash_of_tensors, read_weights
from pipelines.stages import decompose, finetune, rates, reconstruct, rounds, search, supernets, train, validate


@dataclass(frozen=True)
class _Part:
    """The results of a stage, and the experiment's fields and groups of fields on which they depend."""

    stage: str
    fields: tuple[str, ...]
    tables: tuple[str, ...] = ()
    """Tables that contain only this stage's units."""
    trains: bool = False
    """Whether `history` has units named after the stage."""
    schedules: tuple[str, ...] = ()
    """The schedules of its trainings, whose learning rates may have been found by range tests."""
    same_with_dense: bool = False
    """Whether `decomposition.keep_dense` changes which units there are, but no unit, if the group-sizes are named."""


_NETWORKS = ("seed", "model", "weights", "weights_key", "data", "training", "engine.precision", "engine.compile")
"""Without engine.capture, .parallel_seeds and .kernels, which change rounding alone, like devices and threads."""
_TERMS = (*_NETWORKS, "decomposition")
_SUPERNETS = (*_TERMS, "supernet", "reconstruction")

_EVALUATIONS = (
    *(*_SUPERNETS, "finetuning", "engine.recalibrate"),
    *(f"search.{name}" for name in ("form", "precision", "memory_budget")),
)

_REMEDY = "use the same ones, or leave --reuse out"

PARTS = (
    _Part(train.NAME, _NETWORKS, ("networks",), trains=True, schedules=(train.SCHEDULE,)),
    _Part(decompose.NAME, _TERMS, ("decompositions",), same_with_dense=True),
    _Part(latencies.STAGE, _TERMS, latencies.TABLES),
    _Part(reconstruct.NAME, _SUPERNETS, trains=True, schedules=(reconstruct.SCHEDULE,)),
    _Part(finetune.NAME, (*_SUPERNETS, "finetuning"), trains=True, schedules=(finetune.SCHEDULE,)),
    _Part(
        validate.NAME,
        (*_TERMS, "validation", "search.budgets", "engine.recalibrate"),
        ("validations",),
        trains=True,
        schedules=validate.SCHEDULES,
        same_with_dense=True,
    ),
)
"""The parts in the order of the stages, without the search: its strategy decides which configurations it evaluates."""


def take_over(store: RunStore, other: RunStore) -> dict[str, int]:
    """Copy the units of `other` that `store` lacks and would compute equally; return their number by stage.

    Stages that depend on a field in which the two experiments differ are left out. `other` does not change. `store` is
    pinned to the images and weights of `other`; raises DatasetError or InvalidValueError if it is pinned to different
    ones.
    """
    _share_pins(store, other)
    differing = _differing(store.experiment, other)
    apart_from_dense = differing
    if store.experiment.decomposition.group_sizes:  # else keep_dense also decides which sizes a layer takes
        apart_from_dense = [name for name in differing if name != "decomposition.keep_dense"]
    return {
        part.stage: _copy(store, other, part)
        for part in PARTS
        if not _touching(apart_from_dense if part.same_with_dense else differing, part.fields)
    }


def take_evaluations(run: Run, other: RunStore) -> int:
    """Begin the search of `run` by a strategy with the evaluations of `other`; return the number of configurations.

    They become round 0 and cost no evaluation. Nothing happens if the search has begun, or if `other` has evaluated no
    configuration in all the supernets. Raises InvalidValueError for a search of the whole space, and, naming a field
    that differs, if evaluations would not be equal here.
    """
    if not search.by_strategy(run):
        raise InvalidValueError(
            "search.strategy = 'exhaustive': it evaluates all, and learns from none; choose another one, or leave "
            "--reuse-evaluations out"
        )
    _check_alike(run.experiment, other, _EVALUATIONS, "--reuse-evaluations")
    _share_pins(run.store, other)
    rows = other.read_table("configurations")
    known = rounds.evaluated_in_all(rows, supernets.searched(run))
    if not known or rounds.stored(run):
        return 0
    if other.has_checkpoint(search.PLAN, "plan"):
        run.store.copy_checkpoint(other, search.PLAN, "plan")
    rounds.begin(run, rows)
    return len(known)


def check_reusable(experiment: Experiment, other: RunStore) -> None:
    """Raise InvalidValueError, naming a field that differs, if not even the base networks of `other` can be used.

    Weights are compared by the hash of their tensors, not by the file's path.
    """
    _check_alike(experiment, other, PARTS[0].fields, "--reuse")
    if experiment.weights and Path(experiment.weights).is_file():
        found = hash_of_tensors(read_weights(experiment.weights, experiment.weights_key))
        check_weights(other, experiment.weights, found, _REMEDY)


def check_same_images(splits: Splits, other: RunStore) -> None:
    """Raise DatasetError, naming the split and both hashes, if `other` was made with different images."""
    check_data(other, splits, _REMEDY)


def _share_pins(store: RunStore, other: RunStore) -> None:
    """Pin `store` to the images and the weights of `other`, whose units it takes over.

    Raises DatasetError or InvalidValueError, naming both hashes, if `store` is pinned to different ones.
    """
    our_images, their_images = stored_data(store), stored_data(other)
    if our_images is not None and their_images is not None:
        their_images.check(our_images, str(other.storage), _REMEDY)
    elif their_images is not None:
        store.write_pin("data", their_images.to_dict())
    our_weights, their_weights = stored_weights(store), stored_weights(other)
    if our_weights is not None:
        check_weights(other, store.experiment.weights, our_weights, _REMEDY)
    elif their_weights is not None and store.experiment.weights:
        store.write_pin("weights", {"hash": their_weights})


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
    """Copy the units of one stage; the file that marks a unit as finished is copied last."""
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
    for unit in {*part.schedules} & other.finished_units(rates.TABLE) - store.finished_units(rates.TABLE):
        store.copy_unit(other, rates.TABLE, unit)
    for table in part.tables:
        for unit in other.units(table):
            if not store.has_unit(table, unit):
                store.copy_unit(other, table, unit)
                copied.add(unit)
    return len(copied)
