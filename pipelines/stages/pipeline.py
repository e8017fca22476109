"""All stages in order, and the status of each."""

from __future__ import annotations

from gross_ray.errors import InvalidValueError, MissingStageError, UnitsFailedError
from gross_ray.run.opened import Run
from gross_ray.run.progress import Plan
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
            continue  # this stage needs the failed units
    if failures:
        raise UnitsFailedError("\n".join(failures))


def plans(run: Run) -> dict[str, Plan | None]:
    """Return each stage's plan; None for a stage that cannot be planned yet, or not with these settings.

    The latter is no error of the stages before it: the stage itself raises it.
    """
    found: dict[str, Plan | None] = {}
    for name, stage in STAGES.items():
        try:
            found[name] = [unit.stored_as for unit in stage.plan(run)]
        except (MissingStageError, InvalidValueError):
            found[name] = None
    return found
