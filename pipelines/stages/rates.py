"""Learning rates that an experiment leaves open: a range test finds each before its training, and stores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from torch import nn

from gross_ray.errors import MissingStageError
from gross_ray.run.opened import Run
from gross_ray.training.options import Schedule
from gross_ray.training.rates import Training, find_rate
from pipelines.stages.base import Driver
from pipelines.units import Context, Job, Unit, Work

TABLE = "range_tests"


@dataclass(frozen=True, kw_only=True)
class FindRates(Unit):
    """The range tests of schedules that are trained one after another, on the network of a stage's unit."""

    schedules: tuple[str, ...]
    """Fields of the experiment, like finetuning or validation.finetuning."""
    of: Unit

    @property
    def name(self) -> str:
        """Like rate of finetuning."""
        return "+".join(self.schedules)

    @property
    def stored_as(self) -> list[str]:
        """The schedules: each is stored on its own."""
        return list(self.schedules)


def settle(driver: Driver, job: Job, schedules: Sequence[str], work: Work) -> None:
    """Find the rates of `schedules` that are open, unless they are stored or `job` has nothing left to do.

    `work` does a `FindRates` unit on the first missing unit of `job`, and calls `find` for each schedule.
    """
    run = driver.run
    names = tuple(name for name in schedules if is_open(run, name))
    if not names:
        return
    stored = job.done()
    missing = [unit for unit in job.units if unit.name not in stored]
    if not missing:
        return
    unit = FindRates(schedules=names, of=missing[0])

    def done() -> set[str]:
        return {unit.name} if run.store.finished_units(TABLE).issuperset(unit.stored_as) else set()

    shown = f"{job.stage}: learning rate"
    driver.do(replace(job, stage=shown, units=[unit], work=work, done=done, trials=False, together=None))


def is_open(run: Run, name: str) -> bool:
    """Return whether the experiment leaves the rate of a schedule open, and no range test has found it."""
    asked: Schedule = attrgetter(name)(run.experiment)
    return asked.lr == 0 and not run.store.has_unit(TABLE, name)


def schedule(run: Run, name: str) -> Schedule:
    """Return the schedule in the field `name` of the experiment, with the rate that was found if it leaves it open.

    Raises MissingStageError if no range test has found it.
    """
    asked: Schedule = attrgetter(name)(run.experiment)
    return asked if asked.lr else run.once(f"schedule {name}", lambda: replace(asked, lr=_found(run, name)))


def _found(run: Run, name: str) -> float:
    if not run.store.has_unit(TABLE, name):
        raise MissingStageError(
            f"the learning rate of {name} is 0, to be found, and {run.store.storage} has no range test of it: run the "
            f"stages before, or set {name}.lr"
        )
    rows = run.store.read_units(TABLE, [name], ["lr", "chosen"])
    return float(rows.loc[rows["chosen"], "lr"].iloc[0])


def find(context: Context, name: str, network: nn.Module, training: Training) -> float:
    """Find the rate of a schedule by a range test on `network`, which keeps its weights; store it and return it."""
    asked: Schedule = attrgetter(name)(context.run.experiment)

    def report(share: float, rate: float) -> None:
        context.report(share, f"at {rate:g}")

    test = find_rate(network, training, context.splits, asked, on_rate=report)
    rows = [
        {"schedule": name, "lr": rate, "train_loss": loss, "chosen": rate == test.chosen}
        for rate, loss in zip(test.rates, test.losses, strict=True)
    ]
    context.store.write_table(TABLE, name, rows)
    return test.chosen
