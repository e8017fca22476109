"""All stages in order, and the status of each."""

from __future__ import annotations

from gross_ray.errors import MissingStageError, UnitsFailedError
from gross_ray.run.opened import Run
from pipelines.stages import decompose, finetune, reconstruct, rounds, search, sweep, train, validate
from pipelines.stages.base import Driver, Stage

_STAGES: tuple[Stage, ...] = (train, decompose, reconstruct, finetune, search, validate, sweep)
STAGES: dict[str, Stage] = {stage.NAME: stage for stage in _STAGES}
"""The stages in the order in which `gross run` does them."""


def do_all(driver: Driver) -> None:
    """Do every stage; stored units are not done again.

    If units fail, the stages that do not need them still run, and UnitsFailedError, naming them, is raised at the end.
    After the training of the base networks, a limit on a latency that is not measured, or below the fastest
    configuration, is an error.
    """
    failures: list[str] = []
    for name, stage in STAGES.items():
        try:
            stage.do(driver)
            if name == train.NAME:
                rounds.check_limits(driver.run)
        except UnitsFailedError as error:
            failures.append(str(error))
        except MissingStageError:
            if not failures:
                raise
            break  # this stage needs the failed units
    if failures:
        raise UnitsFailedError("\n".join(failures))


def status(run: Run) -> list[tuple[str, int, int | None]]:
    """Return (stage, units done, units planned) for each; planned is None if it depends on an unfinished stage."""
    rows: list[tuple[str, int, int | None]] = []
    for name, stage in STAGES.items():
        try:
            planned = {unit.name for unit in stage.plan(run)}
            rows.append((name, len(stage.done(run) & planned), len(planned)))
        except MissingStageError:
            rows.append((name, 0, None))
    return rows
