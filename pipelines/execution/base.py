"""The interface of executors: an executor does the units of a job, and knows nothing of stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gross_ray.errors import DamagedFileError
from gross_ray.run.opened import Run
from gross_ray.run.tracebacks import keep_traceback
from pipelines.units import Context, Job, Unit, Work
from pipelines.watching import StageProgress


class Executor(Protocol):
    """Does units in this process, on actors, or as trials; test_executors.py tests every implementation."""

    starts_the_most_costly_first: bool
    """Whether units are started by decreasing cost; if not, in their order."""
    survives_deaths: bool
    """Whether a unit whose process dies is done again, without effect on other units."""

    def do(self, job: Job, units: Sequence[Unit], *, threads: int, progress: StageProgress) -> dict[str, str]:
        """Do these units of a job, with `threads` CPU threads each; return the failed units' errors by name.

        The work stores each unit's result. A unit that raises an exception is not done again, and the others are still
        done. A unit that is neither stored nor in the returned errors was interrupted. On SIGINT and SIGTERM, raises
        KeyboardInterrupt once every stored file is complete.
        """

    def close(self) -> None:
        """End the executor's processes, if it has any; `do` starts new ones."""


def do_unit(work: Work, context: Context, unit: Unit) -> str:
    """Do a unit, and return its text, to which the damaged files that it deleted and made anew are added.

    A DamagedFileError, after which it is to be done again, takes these files along to the driver.
    """
    before = len(context.store.damaged)
    try:
        text = work(context, unit)
    except DamagedFileError as error:
        error.deleted = _taken(context.store.damaged, before)
        raise
    found = _taken(context.store.damaged, before)
    return text + "".join(f"; damaged file {file}: deleted, its work was done again" for file in found)


def _taken(damaged: list[str], before: int) -> tuple[str, ...]:
    """Return the files that were added since there were `before`, and remove them."""
    found = tuple(damaged[before:])
    del damaged[before:]
    return found


def report_failure(
    progress: StageProgress, name: str, error: str, traceback: str | None, run: Run, deleted: Sequence[str] = ()
) -> None:
    """Report a failed unit in one line; an error that is not ours comes with a `traceback`, which goes to a file.

    The driver reports damaged files that the unit has `deleted`.
    """
    run.store.damaged += deleted
    where = "" if traceback is None else f"; {keep_traceback(traceback, run.store.storage.folder)}"
    progress.note(f"{name}: failed: {error}{where}")
