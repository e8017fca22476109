"""Latencies of a run: measured in this process, stored, and predicted for the evaluated configurations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from gross_ray.errors import InvalidValueError
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel, LatencyOptions, measure_latency
from gross_ray.search.timing import timed_device
from gross_ray.seeds import derived_generator
from gross_ray.space import listed
from gross_ray.supernet.build import empty_supernet

STAGE = "latency"
TABLES = ("latencies", "latency_models")
_IN_FORCE = "in-force"

OnPart = Callable[[int, int], object]
"""Called with the number of finished timings and the number of all timings."""


def measure(run: Run, device: str, options: LatencyOptions, on_part: OnPart | None = None) -> LatencyModel:
    """Time the parts of the supernet in this process, on `device` of this machine, cpu or cuda.

    Raises MissingStageError if the base networks are not trained, InvalidValueError for cuda without a GPU, and as
    `measure_latency` does.
    """
    timed_on = timed_device(device)
    generator = derived_generator(run.experiment.seed, "latency")
    supernet = empty_supernet(run.base.network, run.space.group_sizes)
    with torch.no_grad():  # any weights but zeros, which might be faster
        for parameter in supernet.parameters():
            parameter.normal_(std=0.1, generator=generator)
    shape = run.base.input_shape
    return measure_latency(supernet, shape, options, generator=generator, device=timed_on, on_part=on_part)


def put(run: Run, model: LatencyModel) -> None:
    """Store a measurement of this or another machine, and the `latency_ms` that it predicts.

    Raises InvalidValueError, and stores nothing, if its layers or group-sizes differ from the run's.
    """
    store, sizes = run.store, run.space.group_sizes
    timed = {name: tuple(sorted(times)) for name, times in model.layer_ms.items()}
    if timed != {name: tuple(sorted(each)) for name, each in sizes.items()}:
        raise InvalidValueError(
            f"the latencies are of other layers or group-sizes than the run's, which has {_listed(sizes)}; "
            f"they are of {_listed(timed)}"
        )
    device = re.sub("[^0-9A-Za-z]+", "-", f"{model.device} {model.host}").strip("-")
    name = f"device={device[:80]},batch={model.batch_size},threads={model.threads}"
    store.write_table("latencies", name, model.rows())
    store.write_table("latency_models", name, [model.summary()])
    store.save_checkpoint(STAGE, _IN_FORCE, {}, {"unit": name})
    run.changed()
    fill(run, model)


def _listed(group_sizes: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{name} at {listed(sizes)}" for name, sizes in group_sizes.items())


def in_force(run: Run) -> LatencyModel | None:
    """Return the measurement that predicts `latency_ms`: the one stored last; None if it is missing.

    If the folder does not say which one was stored last, return its only measurement; None if it has another one, whole
    or in part.
    """
    return run.once("latency in force", lambda: _in_force(run.store))


def _in_force(store: RunStore) -> LatencyModel | None:
    whole = measured(store)
    if store.has_checkpoint(STAGE, _IN_FORCE):
        _, about = store.load_checkpoint(STAGE, _IN_FORCE)
        return _model(store, about["unit"]) if about["unit"] in whole else None
    if len(whole) != 1 or {unit for table in TABLES for unit in store.units(table)} != whole:
        return None
    return _model(store, *whole)


def _model(store: RunStore, unit: str) -> LatencyModel:
    return LatencyModel.from_tables(*(store.read_units(table, [unit]) for table in TABLES))


def measured(store: RunStore) -> set[str]:
    """Return the names of the completely stored measurements."""
    return set.intersection(*map(store.finished_units, TABLES))


def fill(run: Run, model: LatencyModel) -> None:
    """Put the predictions of `model` into the rows of `configurations`."""
    store, layers = run.store, run.space.layers
    changed = []
    for unit in sorted(store.finished_units("configurations")):
        predicted, stored = _predicted(store, model, unit, layers)
        if predicted != stored:
            changed.append(unit)
    for unit in changed:  # first clear all, so that a run that is killed in between never mixes two measurements
        missing = [None] * len(store.read_units("configurations", [unit], ["latency_ms"]))
        store.set_column("configurations", unit, "latency_ms", missing)
    for unit in changed:
        store.set_column("configurations", unit, "latency_ms", _predicted(store, model, unit, layers)[0])


def _predicted(
    store: RunStore, model: LatencyModel, unit: str, layers: Sequence[str]
) -> tuple[list[float], list[float]]:
    """Return the latencies that the model predicts for a unit's rows, and the stored latencies."""
    rows = store.read_units("configurations", [unit], [*(f"layer {layer}" for layer in layers), "latency_ms"])
    predicted = model.predict_many({layer: rows[f"layer {layer}"].to_numpy() for layer in layers})
    return predicted.tolist(), rows["latency_ms"].tolist()
