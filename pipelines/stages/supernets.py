"""The supernets: their units, and the training of one supernet or a stack (sections 4.3 and 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gross_ray.data.image_set import Splits
from gross_ray.errors import DivergedError
from gross_ray.experiment import EngineOptions, Schedule
from gross_ray.run.opened import Run, save_supernet
from gross_ray.run.progress import finished_units, history_unit
from gross_ray.seeds import derive_seed
from gross_ray.space import SearchSpace
from gross_ray.training.capture import captures
from gross_ray.training.loop import EpochRecord
from gross_ray.training.sampling import ConfigurationSampler, settled_scaling
from gross_ray.training.together import Member, Outcome
from pipelines.stages import rates
from pipelines.stages.base import history_rows, metrics
from pipelines.stages.rates import FindRates
from pipelines.units import Context, EpochSlot, Group, Job, Unit, Work

KIND = "supernets"
"""Kind of all trainings of supernets: a supernet is trained with the same number of threads in every stage."""

Training = Callable[..., list[EpochRecord]]
Measure = Callable[[nn.Module, EpochRecord], dict[str, float]]
"""Returns metrics of a supernet after an epoch; it may leave any configuration active."""


@dataclass(frozen=True, kw_only=True)
class Supernet(Unit):
    """One supernet; `supernet_of` makes it."""

    alpha: float
    scaling: str
    seed: int

    @property
    def name(self) -> str:
        """Like alpha=4,scaling=normalised,seed=0; alpha is exact."""
        written = f"{self.alpha:g}"
        exact = written if float(written) == self.alpha else repr(self.alpha)
        return f"alpha={exact},scaling={self.scaling},seed={self.seed}"


@dataclass(frozen=True, kw_only=True)
class InSupernet(Unit):
    """A unit that reads the weights of a trained supernet."""

    supernet: Supernet

    @property
    def shared(self) -> str:
        """Name of the supernet's weights."""
        return self.supernet.name


def supernet_of(alpha: float, scaling: str, seed: int) -> Supernet:
    """Return the unit of one supernet; for alpha 0 both scalings are the same."""
    return Supernet(alpha=alpha, scaling=settled_scaling(alpha, scaling), seed=seed)


def searched(run: Run) -> list[Supernet]:
    """Return one unit for each seed of the supernet that is searched."""
    options = run.experiment.supernet
    return [supernet_of(options.alpha, options.scaling, seed) for seed in range(options.seeds)]


def swept(run: Run) -> list[Supernet]:
    """Return one unit for each alpha, scaling and seed of the sweep; it may include searched supernets."""
    options = run.experiment.sweep
    units = [
        supernet_of(alpha, scaling, seed)
        for alpha in options.alphas
        for scaling in options.scalings
        for seed in range(options.seeds)
    ]
    return list(dict.fromkeys(units))


def is_trained(run: Run, stage: str, unit: Supernet) -> bool:
    """Return whether `stage` has stored this supernet."""
    history = history_unit(stage, unit.name)
    return run.store.has_checkpoint(stage, unit.name) and run.store.has_unit("history", history)


def job(run: Run, stage: str, units: Sequence[Supernet], one: Work, several: Work, *, shown: str | None = None) -> Job:
    """Return a stage's job for these supernets: `one` trains one alone, `several` trains a stack."""
    together = run.experiment.engine.parallel_seeds if in_groups(run) else None
    return Job(
        stage=shown or stage,
        units=units,
        work=one if together is None else several,
        done=lambda: finished_units(run.store, stage),
        kind=KIND,
        num_equal=num_supernets(run),
        together=together,
    )


def num_supernets(run: Run) -> int:
    """Return the number of units in which the experiment's supernets are trained."""
    return -(-len({*searched(run), *swept(run)}) // run.experiment.engine.parallel_seeds)


def in_groups(run: Run) -> bool:
    """Return whether supernets are trained in groups; if not, each may still be a stack of one (`as_one_graph`)."""
    engine = run.experiment.engine
    return engine.parallel_seeds > 1 or engine.compile


def as_one_graph(engine: EngineOptions, device: str) -> bool:
    """Return whether a single supernet is trained as a stack of one."""
    return engine.compile or captures(engine, torch.device(device))


def train(
    context: Context,
    unit: Supernet,
    stage: str,
    supernet: nn.Module,
    schedule: Schedule,
    training: Training,
    share: tuple[float, float] = (0.0, 1.0),
    measure: Measure | None = None,
) -> EpochRecord:
    """Train a supernet from its last stored epoch, store the result, and return the last epoch's record.

    `share` is the interval of the unit's progress that this training covers. The metrics that `measure` returns are
    reported with each epoch's.
    """

    def report(record: EpochRecord) -> None:
        done = share[0] + (share[1] - share[0]) * record.epoch / schedule.epochs
        measured = {} if measure is None else measure(supernet, record)
        text = f"{stage} epoch {record.epoch}, loss {record.train_loss:.4f}"
        context.report(done, text, **metrics(record), **measured)

    history = training(
        context.splits,
        schedule,
        seed=derive_seed(context.seed, stage, unit.name),
        sampler=sampler_of(supernet, unit),
        engine=context.run.experiment.engine,
        checkpoint=EpochSlot(context.store, stage, unit.name),
        on_epoch=report,
    )
    _store(context, unit, stage, supernet, history)
    return history[-1]


def as_stack(supernet: nn.Module, together: Callable[..., list[Outcome]]) -> Training:
    """Return the training of one supernet as a stack of one, which is one graph for all configurations."""

    def training(
        splits: Splits,
        schedule: Schedule,
        *,
        seed: int,
        sampler: ConfigurationSampler,
        engine: EngineOptions,
        checkpoint: EpochSlot | None,
        on_epoch: Callable[[EpochRecord], object] | None,
    ) -> list[EpochRecord]:
        members = [Member(supernet, seed, sampler, checkpoint, on_epoch)]
        (outcome,) = together(members, splits=splits, schedule=schedule, engine=engine)
        if isinstance(outcome, DivergedError):
            raise outcome
        return outcome

    return training


def train_group(
    context: Context,
    group: Group,
    stage: str,
    supernets: Mapping[Supernet, nn.Module],
    schedule: Schedule,
    together: Callable[..., list[Outcome]],
) -> str:
    """Train several supernets in one pass; store those that did not diverge, and raise DivergedError for the others."""

    def report(record: EpochRecord) -> None:
        text = f"{stage} epoch {record.epoch}, loss {record.train_loss:.4f}"
        context.report(record.epoch / schedule.epochs, text, **metrics(record))

    members = [
        Member(
            supernet,
            derive_seed(context.seed, stage, unit.name),
            sampler_of(supernet, unit),
            EpochSlot(context.store, stage, unit.name),
            report,
        )
        for unit, supernet in supernets.items()
    ]
    outcomes = together(members, splits=context.splits, schedule=schedule, engine=context.run.experiment.engine)
    diverged, losses = [], []
    for (unit, supernet), outcome in zip(supernets.items(), outcomes, strict=True):
        if isinstance(outcome, DivergedError):
            diverged.append(f"{unit.name}: {outcome}")
        else:
            _store(context, unit, stage, supernet, outcome)
            losses.append(outcome[-1].train_loss)
    if diverged:
        raise DivergedError("; ".join(diverged))
    return f"loss {min(losses):.4f} to {max(losses):.4f}"


def find(context: Context, unit: FindRates, stage: str, supernet: nn.Module, training: Training) -> str:
    """Find the learning rate of a stage's schedule on one supernet, which keeps its weights."""
    (name,), of = unit.schedules, unit.of
    assert isinstance(of, Supernet)

    def train_shortly(splits: Splits, schedule: Schedule) -> list[EpochRecord]:
        return training(
            splits,
            schedule,
            seed=derive_seed(context.seed, stage, unit.name, "rate"),
            sampler=sampler_of(supernet, of),
            engine=context.run.experiment.engine,
            checkpoint=None,
            on_epoch=None,
        )

    return f"learning rate {rates.find(context, name, supernet, train_shortly):g}"


def sampler_of(supernet: nn.Module, unit: Supernet) -> ConfigurationSampler:
    """Return the sampler of a supernet's configurations."""
    return ConfigurationSampler(SearchSpace.of(supernet), unit.alpha, scaling=unit.scaling)


def _store(context: Context, unit: Supernet, stage: str, supernet: nn.Module, history: list[EpochRecord]) -> None:
    """Store a trained supernet, and delete its state between epochs."""
    save_supernet(context.store, stage, unit.name, supernet, unit.values())
    rows = history_rows(stage, unit.name, unit.seed, history)
    context.store.write_table("history", history_unit(stage, unit.name), rows)
    EpochSlot(context.store, stage, unit.name).clear()
