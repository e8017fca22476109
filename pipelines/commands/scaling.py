"""The seconds of a whole experiment, from those of a small run of it (`pipelines.commands.estimating`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from operator import attrgetter
from statistics import fmean
from typing import Any

from gross_ray.data.image_set import Splits
from gross_ray.experiment import Experiment
from gross_ray.nn.batch_norm import CALIBRATION_IMAGES
from gross_ray.run.opened import Run
from gross_ray.training.options import Schedule
from gross_ray.training.rates import RATES
from gross_ray.training.rates import STEPS as STEPS_OF_A_RATE
from pipelines.stages import decompose, finetune, reconstruct, rounds, search, train, validate
from pipelines.units import Job, Unit

HISTORY = {
    train.SCHEDULE: train.NAME,
    reconstruct.SCHEDULE: reconstruct.NAME,
    finetune.SCHEDULE: finetune.NAME,
    validate.SCHEDULES[0]: f"{validate.NAME}-reconstruct",
    validate.SCHEDULES[1]: f"{validate.NAME}-finetune",
}
"""The schedules of an experiment by their field, and the name of each training in the table `history`."""
_MEASURED = (train.SCHEDULE, finetune.SCHEDULE, validate.SCHEDULES[1])
"""Schedules in which the validation accuracy is measured after each epoch."""


@dataclass(frozen=True)
class Done:
    """A job of the small run, and the seconds that it took."""

    job: Job
    wall: float
    seconds: dict[str, float]
    """Seconds of each unit, by its name."""
    slots: int
    """How many units are done at the same time."""

    def busy(self, more: float = 0.0, times: float = 1.0) -> float:
        """Return the seconds in which the units are done side by side, each changed by a factor and a summand."""
        return side_by_side([times * one + more for one in self.seconds.values()], self.slots)

    @property
    def overhead(self) -> float:
        """Seconds that the job took beside its units."""
        return max(0.0, self.wall - self.busy())


def side_by_side(seconds: Sequence[float], slots: int) -> float:
    """Return about how long units of these seconds take on `slots` workers."""
    return max(max(seconds), sum(seconds) / slots) if seconds else 0.0


def schedules_of(experiment: Experiment, stage: str | None = None) -> dict[str, Schedule]:
    """Return the schedules by which `experiment` trains, in all stages or in one, by their field."""
    fields = [field for field, name in HISTORY.items() if stage is None or name.partition("-")[0] == stage]
    return {
        field: attrgetter(field)(experiment) for field in fields if field != train.SCHEDULE or experiment.trains_base
    }


def shape_of(run: Run, unit: Unit) -> tuple[Any, ...]:
    """Return what the work of a decomposition depends on: the shape of the weight, and the group-sizes."""
    assert isinstance(unit, decompose.Decomposition | decompose.Chain)
    sizes = unit.group_sizes if isinstance(unit, decompose.Chain) else unit.group_size
    return (run.base.choice.convs[unit.layer].weight.shape, sizes)


@dataclass(frozen=True)
class Scaled:
    """Scales the seconds of the stages of a small run to the whole experiment."""

    whole: Experiment
    whole_splits: Splits
    run: Run
    """The small run."""
    splits: Splits
    """The images of the small run."""
    image: float
    """Seconds in which the full network classifies an image."""

    def stage(self, name: str, jobs: Sequence[Done], own: float) -> float:
        """Return the seconds of a stage, whose small run had these jobs and took `own` seconds beside them."""
        if name == decompose.NAME:
            return own + self._decompositions(jobs)
        if name == search.NAME:
            return self._search(jobs, own)
        return own + sum(self._training(name, done) for done in jobs)

    def _decompositions(self, jobs: Sequence[Done]) -> float:
        """Return the seconds of all decompositions; one of an untried shape counts by the cost that it is planned at.

        Each job but the first had its workers already.
        """
        tried = {unit.name: unit for done in jobs for unit in done.job.units}
        seconds = {shape_of(self.run, tried[name]): one for done in jobs for name, one in done.seconds.items()}
        costliest = max(tried.values(), key=lambda unit: unit.cost)
        rate = seconds[shape_of(self.run, costliest)] / costliest.cost
        each = [seconds.get(shape_of(self.run, unit), rate * unit.cost) for unit in decompose.plan(self.run)]
        return jobs[0].overhead + side_by_side(each, jobs[0].slots)

    def _training(self, stage: str, done: Done) -> float:
        """Return the seconds of a training job, and of the range test before it."""
        small, schedules = self.run.experiment, schedules_of(self.whole, stage)
        more = _evaluated(stage, self.whole, self.whole_splits) - _evaluated(stage, small, self.splits)
        seconds, tests = self.image * more, 0.0
        for field, schedule in schedules.items():
            step = self._step(field)
            more = _steps(field, self.whole, self.whole_splits) - _steps(field, small, self.splits)
            seconds += step * more
            tests += 0.0 if schedule.lr else step * (len(RATES) - 1) * 2 * STEPS_OF_A_RATE
        return done.overhead + done.busy(seconds) + (done.overhead + tests if tests else 0.0)

    def _step(self, field: str) -> float:
        """Return the seconds of a step by a schedule, from the last epoch of the small run's first such training."""
        history = self.run.store.read_table("history")
        rows = history[history["stage"] == HISTORY[field]]
        last = rows[rows["epoch"] == rows["epoch"].max()]
        schedule: Schedule = attrgetter(field)(self.run.experiment)
        return float(last["seconds"].mean()) / _steps(field, self.run.experiment, self.splits) * schedule.epochs

    def _search(self, jobs: Sequence[Done], own: float) -> float:
        """Return the seconds of the search: of its plan, and of all shards or of the rounds of a strategy."""
        plan, *jobs = jobs
        times = _searched(self.whole_splits) / _searched(self.splits)
        options, small = self.whole.search, self.run.experiment.search
        if options.strategy == "exhaustive":
            return own + plan.wall + sum(done.overhead + done.busy(times=times) for done in jobs)
        first, *later = jobs
        size, ratio = rounds.size_of(options.evaluations), options.evaluations / small.evaluations
        per_round = [
            each.overhead + each.busy(times=times * size / rounds.size_of(small.evaluations)) for each in later
        ]
        number = ceil(options.evaluations / size)
        return own * ratio + plan.wall + first.overhead + first.busy(times=times) + number * fmean(per_round)


def _steps(field: str, experiment: Experiment, splits: Splits) -> int:
    schedule: Schedule = attrgetter(field)(experiment)
    return schedule.epochs * ceil(schedule.images_of(len(splits.train)) / schedule.batch_size)


def _evaluated(stage: str, experiment: Experiment, splits: Splits) -> int:
    """Return how many images a unit of a stage classifies to measure accuracies."""
    after_epochs = sum(
        schedule.epochs for field, schedule in schedules_of(experiment, stage).items() if field in _MEASURED
    )
    at_the_end = stage in (train.NAME, validate.NAME)
    return after_epochs * len(splits.validation) + at_the_end * (len(splits.validation) + len(splits.test))


def _searched(splits: Splits) -> int:
    """Return how many images a configuration classifies in the search."""
    return len(splits.validation) + min(len(splits.train), CALIBRATION_IMAGES)
