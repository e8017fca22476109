"""Progress of a stage as executors report it; `pipelines.commands.terminal` shows it."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Protocol

PATIENCE_SECONDS = 60.0
"""How long no unit may be running before the stage reports that it waits."""


class StageProgress:
    """Progress of one stage, which counts its finished units; subclasses show it."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self.name, self.total, self.done = name, total, done
        self.started = time.monotonic()

    def unit_done(self, unit: str, text: str) -> None:
        """Report that a unit has finished; `text` is a few words about its result."""
        self.done += 1

    def under_way(self, states: dict[str, tuple[float, str]]) -> None:
        """Report the share done (0 to 1) and the state of each running unit."""

    def note(self, text: str) -> None:
        """Report an event other than progress."""


class ProgressReporter(Protocol):
    """Shows the progress of stages."""

    def stage(self, name: str, total: int, done: int) -> AbstractContextManager[StageProgress]:
        """Show a stage of `total` units, `done` of which were finished before."""

    def note(self, text: str) -> None:
        """Show one line outside any stage."""


class Patience:
    """Reports that a stage waits for a worker, if no unit has been running for a while."""

    def __init__(self, progress: StageProgress, *, autoscales: bool) -> None:
        """Start the clock; `autoscales`: whether the cluster's autoscaler may add nodes."""
        self._progress, self._since = progress, time.monotonic()
        self._then = "; its autoscaler is asked for nodes" if autoscales else ""

    def look(self, *, under_way: bool) -> None:
        """Report once in every `PATIENCE_SECONDS` without a running unit; call this regularly."""
        if not under_way:
            if time.monotonic() - self._since <= PATIENCE_SECONDS:
                return
            self._progress.note(f"waiting for a worker: no core or GPU is free, or it is still starting{self._then}")
        self._since = time.monotonic()


class Furthest:
    """Records the largest share done that each unit has reported."""

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}

    def advanced(self, unit: str, share: float) -> bool:
        """Return whether a unit has got further than ever before."""
        further = share > self._shares.get(unit, 0.0)
        if further:
            self._shares[unit] = share
        return further
