"""Stage `decompose`: every layer at every group-size and seed, alone or as a nested chain (section 3)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gross_ray.btd.block_terms import BlockTerms, BTDStatus
from gross_ray.btd.solver import block_term_decomposition, default_restarts
from gross_ray.errors import DamagedFileError
from gross_ray.nn.calls import network_calls
from gross_ray.run.opened import Run
from gross_ray.run.progress import finished_units
from gross_ray.run.store import RunStore
from gross_ray.search.cost import convolution_macs
from gross_ray.seeds import derive_seed
from gross_ray.space import DENSE
from gross_ray.supernet.layers import by_reason
from pipelines.stages import supernets
from pipelines.stages.base import Driver
from pipelines.units import Context, Job, Unit, require

NAME = "decompose"


@dataclass(frozen=True, kw_only=True)
class Decomposition(Unit):
    """One layer at one group-size."""

    layer: str
    group_size: int
    seed: int
    nested: bool = False
    """Whether it starts from the expansion of the next smaller group-size."""

    @property
    def name(self) -> str:
        """Like conv2,g=16,seed=0."""
        return f"{self.layer},g={self.group_size},seed={self.seed}{',nested' * self.nested}"


@dataclass(frozen=True, kw_only=True)
class Chain(Unit):
    """One layer at all of its group-sizes, each of which starts from the previous one."""

    layer: str
    group_sizes: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        """Like conv2,seed=0,nested."""
        return f"{self.layer},seed={self.seed},nested"

    @property
    def stored_as(self) -> list[str]:
        """The names of its decompositions."""
        return [link.name for link in self.links]

    @property
    def links(self) -> list[Decomposition]:
        """The decompositions of the chain, in order."""
        return [
            Decomposition(layer=self.layer, group_size=size, seed=self.seed, nested=True) for size in self.group_sizes
        ]


def plan(run: Run) -> Sequence[Decomposition | Chain]:
    """Return a unit for each layer, group-size and seed of the supernets; if nested, for each layer and seed."""
    return run.once(f"{NAME} plan", lambda: _plan(run))


def _plan(run: Run) -> Sequence[Decomposition | Chain]:
    experiment = run.experiment
    seeds = range(max(experiment.supernet.seeds, experiment.sweep.seeds if supernets.swept(run) else 0))
    sizes = decomposed_sizes(run)
    if not experiment.decomposition.nested:
        return [unit(run, layer, size, seed) for layer in sizes for seed in seeds for size in sizes[layer]]
    return [
        Chain(layer=layer, group_sizes=chain, seed=seed, cost=sum(_cost(run, layer, size) for size in chain))
        for layer, chain in sizes.items()
        for seed in seeds
    ]


def decomposed_sizes(run: Run) -> dict[str, tuple[int, ...]]:
    """Return the group-sizes of each layer: its choices but DENSE."""
    return {layer: tuple(size for size in sizes if size != DENSE) for layer, sizes in run.space.group_sizes.items()}


def unit(run: Run, layer: str, group_size: int, seed: int) -> Decomposition:
    """Return the unit of one decomposition that does not start from another."""
    return Decomposition(layer=layer, group_size=group_size, seed=seed, cost=_cost(run, layer, group_size))


def _cost(run: Run, layer: str, group_size: int) -> float:
    """Estimate the work: a step costs the same at every group-size, larger ones need more steps, a single term none."""
    weight = run.base.choice.convs[layer].weight
    channels = weight.shape[1]
    if group_size == channels:
        return 1.0
    step = weight.numel() * channels * (run.experiment.decomposition.restarts or default_restarts(weight))
    return step * (1 + group_size / channels)


def done(run: Run) -> set[str]:
    """Return the names of the stored units, both chains and single decompositions."""
    stored = finished_units(run.store, NAME)
    chains = plan(run) if run.experiment.decomposition.nested else ()
    return stored | {chain.name for chain in chains if stored.issuperset(chain.stored_as)}


def do(driver: Driver) -> None:
    """Report which convolutions are left alone, store the MACs of the others, then do the missing decompositions."""
    run = driver.run
    _store_layers(run)
    units, choice = plan(run), run.base.choice
    if not {unit.name for unit in units} <= done(run):
        for what, reasons in (
            ("made plain", choice.made_plain),
            ("left alone", choice.left_alone),
            ("not tried", choice.dropped),
        ):
            if reasons:
                driver.note(f"{NAME}: {what}: {by_reason(reasons)}")
    driver.do(job(run, units))


def _store_layers(run: Run) -> None:
    """Store the MACs of the layers that are decomposed, unless they are stored."""
    if run.store.has_unit("layers", "all"):
        return
    base = run.base
    macs = convolution_macs(network_calls(base.network, base.input_shape), base.choice.convs)
    rows = [{"layer": layer, "dense_macs": count} for layer, count in macs.items()]
    run.store.write_table("layers", "all", rows)


def job(run: Run, units: Sequence[Decomposition | Chain]) -> Job:
    """Return the job of these decompositions."""
    return Job(stage=NAME, units=units, work=work, done=lambda: done(run), kind=NAME, num_equal=len(plan(run)))


def require_all(run: Run) -> None:
    """Raise MissingStageError unless every decomposition of the supernets is stored."""
    require(run.store, NAME, [unit.name for unit in plan(run)], done(run))


def work(context: Context, unit: Decomposition | Chain) -> str:
    """Decompose one layer at one group-size, or, for a chain, at all of them."""
    terms: BlockTerms | None = None
    for link in unit.links if isinstance(unit, Chain) else [unit]:
        stored = _stored_link(context.store, link) if isinstance(unit, Chain) else None
        terms = stored or _decompose(context, link, start=terms)
    assert terms is not None
    return f"error {terms.relative_error:.4f}, {terms.steps} steps"


def supernet_terms(run: Run, seed: int) -> dict[str, list[BlockTerms]]:
    """Return the stored decompositions of a supernet by layer, in the order of the group-sizes."""
    nested = run.experiment.decomposition.nested
    return {
        layer: [
            load_terms(run.store, Decomposition(layer=layer, group_size=size, seed=seed, nested=nested))
            for size in sizes
        ]
        for layer, sizes in decomposed_sizes(run).items()
    }


def load_terms(store: RunStore, unit: Decomposition) -> BlockTerms:
    """Return a stored decomposition; raises MissingStageError if it is not stored."""
    tensors, result = store.load_checkpoint(NAME, unit.name)
    fields: dict[str, Any] = {**tensors, **result, "status": BTDStatus(result["status"])}
    return BlockTerms(**fields)


def _stored_link(store: RunStore, unit: Decomposition) -> BlockTerms | None:
    """Return a decomposition that an interrupted chain has stored; None if it is missing or damaged."""
    if store.has_unit("decompositions", unit.name) and store.has_checkpoint(NAME, unit.name):
        with suppress(DamagedFileError):  # the file was deleted, and is computed again
            return load_terms(store, unit)
    return None


def _decompose(context: Context, unit: Decomposition, start: BlockTerms | None) -> BlockTerms:
    """Compute and store one decomposition."""
    started = time.perf_counter()

    def on_step(step: int, error: float) -> None:
        if step % 50 == 0:
            context.report(0.0, f"step {step}, error {error:.4f}")

    terms = block_term_decomposition(
        context.run.base.choice.convs[unit.layer].weight.to(context.device),
        unit.group_size,
        options=context.run.experiment.decomposition,
        start=start,
        seed=derive_seed(context.seed, NAME, unit.name),
        on_step=on_step,
    )
    tensors = {"core": terms.core, "factor_in": terms.factor_in, "factor_out": terms.factor_out}
    result = {
        "relative_error": terms.relative_error,
        "cancellation": terms.cancellation,
        "steps": terms.steps,
        "status": terms.status.value,
    }
    context.store.save_checkpoint(NAME, unit.name, tensors, result)
    row = {**unit.values(), "groups": terms.groups, **result, "seconds": time.perf_counter() - started}
    context.store.write_table("decompositions", unit.name, [row])
    return terms
