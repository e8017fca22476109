"""Latency of the configurations that are searched: measured on a worker, or here, and written beside their costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch

from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel, LatencyOptions, measure_latency
from gross_ray.search.timing import timed_device
from gross_ray.seeds import derived_generator
from gross_ray.supernet.build import empty_supernet
from pipelines import search
from pipelines.networks import load_base
from pipelines.predictions import measured, put_in_force
from pipelines.session import Session
from pipelines.units import Context, Unit, require, tensor_of

OnPart = Callable[[int, int], object]
"""Told how many timings are done, of how many."""


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
        lambda: measured(store),
        shared=lambda supernet: search.load_shared(store, supernet),
    )
    put_in_force(store, name)


def measure(store: RunStore, device: str, options: LatencyOptions, on_part: OnPart | None = None) -> LatencyModel:
    """Time the parts of the supernet in this process, on `device` of this machine, cpu or cuda.

    Raises MissingStageError before the base networks are trained, as `measure_latency` does, and InvalidValueError for
    cuda where there is none.
    """
    place = timed_device(device)
    base, generator = load_base(store), derived_generator(store.experiment.seed, "latency")
    supernet = empty_supernet(base.network, base.space.group_sizes)
    with torch.no_grad():  # any weights: zeros alone might be faster
        for parameter in supernet.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return measure_latency(supernet, base.input_shape, options, generator=generator, device=place, on_part=on_part)


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
