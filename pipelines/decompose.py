"""Stage `decompose`: layer x group-size x seed, each decomposed by itself, or as a chain where nested (section 3)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from gross_ray.decomposition.btd import BlockTerms, BTDStatus, block_term_decomposition, default_restarts
from gross_ray.decomposition.layers import by_reason
from gross_ray.errors import DamagedFileError
from gross_ray.results.store import RunStore
from gross_ray.seeds import derive_seed
from pipelines.networks import Base, load_base
from pipelines.session import Session
from pipelines.units import Context, Unit

STAGE = "decompose"


def plan(store: RunStore) -> list[Unit]:
    """Return a unit for each layer, group-size and seed of the supernets; where nested, for each layer and seed."""
    base, experiment = load_base(store), store.experiment
    num_seeds = max(experiment.supernet.seeds, experiment.sweep.seeds if experiment.sweep.alphas else 0)
    nested = experiment.decomposition.nested
    units = []
    for name, conv in base.choice.convs.items():
        sizes, channels = base.space.group_sizes[name], conv.in_channels
        # A step costs alike at every group-size, larger ones take more of them; a single term takes none.
        step = conv.weight.numel() * channels * (experiment.decomposition.restarts or default_restarts(conv.weight))
        costs = {size: step * (1 + size / channels) if size < channels else 1 for size in sizes}
        for seed in range(num_seeds):
            if nested:
                arguments = {"layer": name, "group_size": sizes[-1], "seed": seed, "nested": True}
                units.append(Unit(f"{name},seed={seed},nested", arguments, sum(costs.values())))
                continue
            for size in sizes:
                arguments = {"layer": name, "group_size": size, "seed": seed, "nested": False}
                units.append(Unit(unit_name(name, size, seed, False), arguments, costs[size]))
    return units


def unit_name(layer: str, group_size: int, seed: int, nested: bool) -> str:
    """Return the name under which a decomposition is stored."""
    return f"{layer},g={group_size},seed={seed}{',nested' * nested}"


def finished(store: RunStore) -> set[str]:
    """Return the units of the plan that are stored."""
    stored = store.finished_units("decompositions") & store.finished_checkpoints(STAGE)
    if not store.experiment.decomposition.nested:
        return stored
    sizes = load_base(store).space.group_sizes
    return {
        unit.name
        for unit in plan(store)
        if all(
            unit_name(unit.arguments["layer"], size, unit.arguments["seed"], True) in stored
            for size in sizes[unit.arguments["layer"]]
        )
    }


def run(session: Session) -> None:
    """Decompose what is missing, after telling which convolutions are left alone."""
    store = session.store
    units, choice = plan(store), load_base(store).choice
    if not {unit.name for unit in units} <= finished(store):
        for what, reasons in (("left alone", choice.left_alone), ("not tried", choice.dropped)):
            if reasons:
                session.reporter.note(f"{STAGE}: {what}: {by_reason(reasons)}")
    session.run(STAGE, units, work, lambda: finished(store))


def work(context: Context, unit: Unit) -> str:
    """Decompose one layer at one group-size, or at all of them where nested."""
    arguments = unit.arguments
    terms = layer_terms(
        context,
        load_base(context.store),
        arguments["layer"],
        arguments["group_size"],
        seed=arguments["seed"],
        nested=arguments["nested"],
    )
    return f"error {terms.relative_error:.4f}, {terms.steps} steps"


def layer_terms(context: Context, base: Base, layer: str, group_size: int, *, seed: int, nested: bool) -> BlockTerms:
    """Return a decomposition, stored before or computed and stored now; a nested one does the smaller sizes first."""
    store = context.store
    name = unit_name(layer, group_size, seed, nested)
    if store.has_unit("decompositions", name) and store.has_checkpoint(STAGE, name):
        with suppress(DamagedFileError):  # deleted by now: computed again
            return _load(store, name)
    start = None
    if nested:
        smaller = [size for size in base.space.group_sizes[layer] if size < group_size]
        start = layer_terms(context, base, layer, smaller[-1], seed=seed, nested=True) if smaller else None
    return _compute(context, base.choice.convs[layer], layer, group_size, seed, nested, start)


def stored_terms(store: RunStore, group_sizes: Mapping[str, Sequence[int]], seed: int) -> dict[str, list[BlockTerms]]:
    """Return the decompositions of a supernet's layers, by layer, in the order of the group-sizes."""
    nested = store.experiment.decomposition.nested
    return {
        layer: [_load(store, unit_name(layer, size, seed, nested)) for size in sizes]
        for layer, sizes in group_sizes.items()
    }


def _compute(
    context: Context,
    conv: nn.Conv2d,
    layer: str,
    group_size: int,
    seed: int,
    nested: bool,
    start: BlockTerms | None,
) -> BlockTerms:
    name = unit_name(layer, group_size, seed, nested)
    options = context.store.experiment.decomposition
    started = time.perf_counter()

    def on_step(step: int, error: float) -> None:
        if step % 50 == 0:
            context.report(0.0, f"step {step}, error {error:.4f}")

    terms = block_term_decomposition(
        conv.weight.to(context.device),
        group_size,
        options=options,
        start=start,
        seed=derive_seed(context.seed, STAGE, name),
        on_step=on_step,
    )
    tensors = {"core": terms.core, "factor_in": terms.factor_in, "factor_out": terms.factor_out}
    result = {
        "relative_error": terms.relative_error,
        "cancellation": terms.cancellation,
        "steps": terms.steps,
        "status": terms.status.value,
    }
    context.store.save_checkpoint(STAGE, name, tensors, result)
    row = {
        "layer": layer,
        "group_size": group_size,
        "groups": terms.groups,
        "seed": seed,
        "nested": nested,
        **result,
        "seconds": time.perf_counter() - started,
    }
    context.store.write_table("decompositions", name, [row])
    return terms


def _load(store: RunStore, name: str) -> BlockTerms:
    tensors, result = store.load_checkpoint(STAGE, name)
    fields: dict[str, Any] = {**tensors, **result, "status": BTDStatus(result["status"])}
    return BlockTerms(**fields)
