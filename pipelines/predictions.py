"""Latencies in a run folder: a measurement stored, and what it predicts for the configurations that are searched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gross_ray.errors import InvalidValueError
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel
from pipelines.networks import load_base

STAGE = "latency"
TABLES = ("latencies", "latency_models")
_IN_FORCE = "in-force"


def put(store: RunStore, model: LatencyModel) -> None:
    """Store a measurement, of this machine or another, and `latency_ms` of what is searched.

    Raises InvalidValueError, and stores nothing, where it is of other layers or group-sizes than the run's.
    """
    space = load_base(store).space
    timed = {name: tuple(sorted(times)) for name, times in model.layer_ms.items()}
    if timed != {name: tuple(sorted(sizes)) for name, sizes in space.group_sizes.items()}:
        raise InvalidValueError(
            f"the latencies are of other layers or group-sizes than the run's, which has {_listed(space.group_sizes)}; "
            f"they are of {_listed(timed)}"
        )
    device = re.sub("[^0-9A-Za-z]+", "-", f"{model.device} {model.host}").strip("-")
    name = f"device={device[:80]},batch={model.batch_size},threads={model.threads}"
    store.write_table("latencies", name, model.rows())
    store.write_table("latency_models", name, [model.summary()])
    put_in_force(store, name)


def put_in_force(store: RunStore, unit: str) -> None:
    """Let a stored measurement be the one that predicts `latency_ms`."""
    store.save_checkpoint(STAGE, _IN_FORCE, {}, {"unit": unit})
    fill(store, _model(store, unit))


def _listed(group_sizes: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{name} at {', '.join(map(str, sizes))}" for name, sizes in group_sizes.items())


def stored_model(store: RunStore) -> LatencyModel | None:
    """Return the measurement that predicts `latency_ms`: the one that was stored or asked for last; None without it.

    In a folder where nothing says which that was: the only one there is, with no part of another, whose rest was
    damaged, beside it.
    """
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
    """Return the measurements that are stored whole."""
    return set.intersection(*map(store.finished_units, TABLES))


def fill(store: RunStore, model: LatencyModel) -> None:
    """Put what `model` predicts into the rows of `configurations`."""
    layers = load_base(store).space.layers
    changed = [unit for unit in sorted(store.finished_units("configurations")) if _differs(store, model, unit, layers)]
    for unit in changed:  # first none, then all: a run killed in between never mixes two measurements
        missing = [None] * len(store.read_units("configurations", [unit], ["latency_ms"]))
        store.set_column("configurations", unit, "latency_ms", missing)
    for unit in changed:
        store.set_column("configurations", unit, "latency_ms", _predicted(store, model, unit, layers)[0])


def _differs(store: RunStore, model: LatencyModel, unit: str, layers: Sequence[str]) -> bool:
    predicted, stored = _predicted(store, model, unit, layers)
    return predicted != stored


def _predicted(
    store: RunStore, model: LatencyModel, unit: str, layers: Sequence[str]
) -> tuple[list[float], list[float]]:
    """Return what the model predicts for a shard's rows, and what is stored."""
    rows = store.read_units("configurations", [unit], [*(f"layer {layer}" for layer in layers), "latency_ms"])
    predicted = model.predict_many({layer: rows[f"layer {layer}"].to_numpy() for layer in layers})
    return predicted.tolist(), rows["latency_ms"].tolist()
