"""Latencies of a run: measured in this process, stored, and predicted for the evaluated configurations."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence

from gross_ray.errors import InvalidValueError
from gross_ray.run.latencies import STAGE, TABLES, measured, put_in_force, unit_in_force
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel, LatencyOptions, measure_latency
from gross_ray.search.timing import timed_device
from gross_ray.seeds import derived_generator
from gross_ray.space import DENSE, listed, ordered
from gross_ray.supernet.build import empty_supernet, made_up

OnPart = Callable[[int, int], object]
"""Called with the number of networks timed so far, and the most that may be timed."""


def measure(run: Run, device: str, options: LatencyOptions, on_part: OnPart | None = None) -> LatencyModel:
    """Time networks of the supernet's layers in this process, on `device` of this machine, cpu or cuda.

    Raises MissingStageError if the base networks are not trained, InvalidValueError for cuda without a GPU, and as
    `measure_latency` does.
    """
    timed_on = timed_device(device)
    generator = derived_generator(run.experiment.seed, "latency")
    supernet = made_up(empty_supernet(run.base.network, run.space.group_sizes), generator)
    shape = run.base.input_shape
    return measure_latency(supernet, shape, options, generator=generator, device=timed_on, on_part=on_part)


def put(run: Run, model: LatencyModel) -> None:
    """Store a measurement of this or another machine, and the `latency_ms` that it predicts.

    Raises InvalidValueError, and stores nothing, if its layers or group-sizes differ from the run's.
    """
    store, sizes = run.store, run.space.group_sizes
    timed = {name: {*added} for name, added in model.added_ms.items()}
    if timed != {name: {DENSE, *each} for name, each in sizes.items()}:
        raise InvalidValueError(
            f"the latencies are of other layers or group-sizes than the run's, which has {_listed(sizes)}; "
            f"they are of {_listed({name: ordered(added) for name, added in model.added_ms.items()})}"
        )
    device = re.sub("[^0-9A-Za-z]+", "-", model.device).strip("-")[:60]
    machine = zlib.crc32(f"{model.device} {model.host}".encode())
    name = f"runtime={model.runtime},device={device}-{machine:08x},batch={model.batch_size},threads={model.threads}"
    _clear(run, model)  # before it is in force: a run that is killed in between has no times, not another runtime's
    for table in TABLES:
        store.delete_unit(table, name)
    store.write_table("layer_latencies", name, model.rows())
    store.write_table("runtime_latencies", name, [model.summary()])
    put_in_force(store, name)
    fill(run, model)


def _listed(group_sizes: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{name} at {listed(sizes)}" for name, sizes in group_sizes.items())


def in_force(run: Run) -> LatencyModel | None:
    """Return the measurement that predicts `latency_ms` (`unit_in_force`); None if there is none."""
    return run.once("latency in force", lambda: _in_force(run.store), depends=[STAGE])


def all_of(run: Run) -> list[LatencyModel]:
    """Return all measurements that are stored whole, by name."""
    return [_model(run.store, unit) for unit in sorted(measured(run.store))]


def _in_force(store: RunStore) -> LatencyModel | None:
    unit = unit_in_force(store)
    return None if unit is None else _model(store, unit)


def _model(store: RunStore, unit: str) -> LatencyModel:
    return LatencyModel.from_tables(*(store.read_units(table, [unit]) for table in TABLES))


def fill(run: Run, model: LatencyModel) -> None:
    """Put the predictions of `model`, which is in force, into the rows of `configurations`."""
    for unit in sorted(run.store.finished_units("configurations")):
        predicted, stored = _predicted(run, model, unit)
        if predicted != stored:
            run.store.set_column("configurations", unit, "latency_ms", predicted)
    run.changed(STAGE)


def _clear(run: Run, model: LatencyModel) -> None:
    """Delete the latencies of the units in which they differ from the predictions of `model`."""
    for unit in sorted(run.store.finished_units("configurations")):
        predicted, stored = _predicted(run, model, unit)
        if predicted != stored and any(ms == ms for ms in stored):  # NaN: there is none yet
            run.store.set_column("configurations", unit, "latency_ms", [None] * len(stored))


def _predicted(run: Run, model: LatencyModel, unit: str) -> tuple[list[float], list[float]]:
    """Return the latencies that the model predicts for a unit's rows, and the stored latencies, NaN for none."""
    layers = run.space.layers
    rows = run.store.read_units("configurations", [unit], [*(f"layer {layer}" for layer in layers), "latency_ms"])
    predicted = model.predict_many({layer: rows[f"layer {layer}"].to_numpy() for layer in layers})
    return predicted.tolist(), rows["latency_ms"].astype(float).tolist()
