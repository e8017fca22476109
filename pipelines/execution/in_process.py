"""Execution in this process, one unit after another, without Ray: for debuggers, notebooks, machines with one GPU."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gross_ray.data.image_set import Splits
from gross_ray.errors import GrossRayError, one_line
from gross_ray.run.opened import Run
from gross_ray.search.timing import threads as torch_threads
from pipelines.execution.base import do_unit, report_failure
from pipelines.packing import pack_splits, room_for_images, unpack_splits
from pipelines.units import Context, Job, Unit
from pipelines.watching import StageProgress


class InProcess:
    """Does units in their order (an `Executor`)."""

    starts_the_most_costly_first = False
    survives_deaths = False

    def __init__(self, run: Run, splits: Splits, device: str) -> None:
        """Put the images on `device`, cpu or cuda; images that do not fit are streamed to it."""
        self._run, self._device = run, device
        self._splits = unpack_splits(pack_splits(splits, run.experiment.data), device, room_for_images(device))
        self._kept: dict[str, Any] = {}

    def do(self, job: Job, units: Sequence[Unit], *, threads: int, progress: StageProgress) -> dict[str, str]:
        """Do the units (see `Executor`)."""
        failed: dict[str, str] = {}
        loaded: dict[str, Any] = {}
        users = Counter(unit.shared for unit in units)
        with torch_threads(threads):
            for unit in units:
                if unit.shared and job.shared is not None and unit.shared not in loaded:
                    loaded[unit.shared] = job.shared(unit.shared)
                try:
                    text = do_unit(job.work, self._context(unit, loaded.get(unit.shared), progress), unit)
                except Exception as error:
                    failed[unit.name] = line = one_line(error)
                    ours = isinstance(error, GrossRayError)
                    text, whole = (str(error), None) if ours else (line, traceback.format_exc())
                    report_failure(progress, unit.name, text, whole, self._run, getattr(error, "deleted", ()))
                else:
                    progress.unit_done(unit.name, text)
                users[unit.shared] -= 1
                if not users[unit.shared]:
                    loaded.pop(unit.shared, None)
        self._kept.clear()
        return failed

    def close(self) -> None:
        """Do nothing: there are no processes to end."""

    def _context(self, unit: Unit, shared: Any, progress: StageProgress) -> Context:
        def report(share: float, text: str, **_: float) -> None:
            progress.under_way({unit.name: (share, text)})

        return Context(self._run, self._splits, self._device, report, shared, self._kept)
