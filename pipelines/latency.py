"""Latency of the configurations that are searched: measured on a worker, written beside their other costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from gross_ray.decomposition.surgery import empty_supernet
from gross_ray.results.store import RunStore
from gross_ray.search.latency import LatencyModel, LatencyOptions, measure_latency
from gross_ray.seeds import derived_generator
from pipelines import search
from pipelines.networks import load_base
from pipelines.session import Session
from pipelines.units import Context, Unit, require, tensor_of


def add_latency(session: Session, *, batch_size: int, threads: int) -> None:
    """Time the parts of the supernet on the workers' device, and put `latency_ms` into the rows of `configurations`.

    What was measured with this batch size and these threads is not measured again. Raises MissingStageError before
    the search is done.
    """
    store, units = session.store, search.plan(session.store)
    require(store, search.STAGE, [unit.name for unit in units], search.finished(store))
    options = LatencyOptions(batch_size=batch_size, threads=threads)
    session.cluster().require_threads(threads)
    name = f"device={session.cluster().device},batch={batch_size},threads={threads}"
    session.run(
        f"{search.STAGE} latency",
        [Unit(name, asdict(options), shared=units[0].shared)],
        work,
        lambda: store.finished_units("latencies") & store.finished_units("latency_models"),
        shared=lambda supernet: search.load_shared(store, supernet),
    )
    model = LatencyModel.from_tables(*(store.read_units(table, [name]) for table in ("latencies", "latency_models")))
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


def work(context: Context, unit: Unit) -> str:
    """Time the parts of one supernet: its weights do not matter."""
    base = load_base(context.store)
    supernet = empty_supernet(base.network, context.shared["group_sizes"])
    with torch.no_grad():
        for name, parameter in supernet.named_parameters():
            parameter.copy_(tensor_of(context.shared["weights"][name]))
    model = measure_latency(
        supernet,
        base.input_shape,
        LatencyOptions(**unit.arguments),
        generator=derived_generator(context.seed, "latency"),
        device=context.device,
        on_part=lambda done, total: context.report(done / total, f"{done} of {total} timings"),
    )
    context.store.write_table("latencies", unit.name, model.rows())
    context.store.write_table("latency_models", unit.name, [model.summary()])
    return f"median error {100 * model.median_error:.1f} % of {model.num_sampled} configurations, on {model.device}"
