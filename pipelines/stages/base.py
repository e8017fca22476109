"""The interface of a stage, and the interface of the driver that a stage uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gross_ray.run.opened import Run
from gross_ray.training.loop import EpochRecord
from pipelines.capacity import Capacity
from pipelines.units import Job, Unit


class Driver(Protocol):
    """Executes the jobs of stages; `pipelines.driver.Session` implements it."""

    @property
    def run(self) -> Run:
        """The opened run."""

    def do(self, job: Job) -> None:
        """Do the units of a job that are not done; raises UnitsFailedError, naming them, if any fails."""

    @property
    def capacity(self) -> Capacity:
        """What can run at the same time."""

    def threads(self, kind: str, num_equal: int | None) -> int:
        """Return the CPU threads of each unit of a kind; `num_equal` as in `Job`."""

    def note(self, text: str) -> None:
        """Show one line to the user."""


class Stage(Protocol):
    """A stage; each module in `pipelines.stages.pipeline.STAGES` implements it."""

    NAME: str
    """Name of its command and of its checkpoints."""

    def plan(self, run: Run) -> Sequence[Unit]:
        """Return all of its units; raises MissingStageError if they depend on an earlier stage that is unfinished."""

    def done(self, run: Run) -> set[str]:
        """Return the names of its units that are stored."""

    def do(self, driver: Driver) -> None:
        """Do its units that are missing."""


def metrics(record: EpochRecord) -> dict[str, float]:
    """Return an epoch's measured numbers by name."""
    return {name: value for name, value in vars(record).items() if value is not None}


def history_rows(stage: str, unit: str, seed: int, records: Sequence[EpochRecord]) -> list[dict[str, Any]]:
    """Return the rows of the `history` table for one training."""
    return [{"stage": stage, "unit": unit, "seed": seed, **vars(record)} for record in records]
