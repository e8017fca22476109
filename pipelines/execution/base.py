"""The seam between what is done and who does it: an executor does units of a job, and knows no stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pipelines.units import Context, Job, Unit, Work
from pipelines.watching import StageProgress


class Executor(Protocol):
    """Does units: in this process, on actors, or as trials; test_executors.py is the contract."""

    starts_the_most_costly_first: bool
    """Whether units are started in the order of their cost; else in their own order."""
    survives_deaths: bool
    """Whether a unit whose process dies is done again, without harm to the others."""

    def do(self, job: Job, units: Sequence[Unit], *, threads: int, progress: StageProgress) -> dict[str, str]:
        """Do some of a job's units, with so many CPU threads each, and return why those failed that did, by name.

        The work stores each unit's result. A unit that raises an exception is not done again, and does not keep the
        others from being done; a unit that is neither stored nor in what is returned was interrupted. Raises
        KeyboardInterrupt on SIGINT and SIGTERM, when what is stored is whole.
        """
        ...

    def close(self) -> None:
        """Give back processes, if there are any; `do` starts new ones."""
        ...


def do_unit(work: Work, context: Context, unit: Unit) -> str:
    """Do a unit, and return its few words, with the damaged files that it deleted and did without."""
    text = work(context, unit)
    lost = "".join(f"; damaged file {file}: deleted, its work was done again" for file in context.store.damaged)
    context.store.damaged.clear()
    return text + lost


def told(error: BaseException) -> str:
    """Return an error in one line, with its kind."""
    return f"{type(error).__name__}: {error}"
