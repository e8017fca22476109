"""The measurements of latency in a run folder: which are stored whole, and which one predicts `latency_ms`."""

from __future__ import annotations

from gross_ray.run.store import RunStore

STAGE = "latency"
TABLES = ("layer_latencies", "runtime_latencies")
_IN_FORCE = "in-force"


def put_in_force(store: RunStore, unit: str) -> None:
    """Make a stored measurement the one that predicts `latency_ms`."""
    store.save_checkpoint(STAGE, _IN_FORCE, {}, {"unit": unit})


def unit_in_force(store: RunStore) -> str | None:
    """Return the name of the measurement that predicts `latency_ms`: the one stored last; None if it is missing.

    If the folder does not say which one was stored last, return its only measurement; None if it has another one, whole
    or in part.
    """
    whole = measured(store)
    if store.has_checkpoint(STAGE, _IN_FORCE):
        _, about = store.load_checkpoint(STAGE, _IN_FORCE)
        return about["unit"] if about["unit"] in whole else None
    if len(whole) != 1 or {unit for table in TABLES for unit in store.units(table)} != whole:
        return None
    return next(iter(whole))


def measured(store: RunStore) -> set[str]:
    """Return the names of the completely stored measurements."""
    return set.intersection(*map(store.finished_units, TABLES))
