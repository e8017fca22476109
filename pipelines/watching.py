"""What execution says about a stage that is under way, and to whom; how it is shown is decided in `commands`."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Protocol

PATIENCE_SECONDS = 60.0
"""How long a stage may have no unit under way before it reports that it waits."""


class StageProgress:
    """Progress of one stage: counts its finished units. What shows it overrides the methods."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self.name, self.total, self.done = name, total, done
        self.started = time.monotonic()

    def unit_done(self, unit: str, text: str) -> None:
        """Report that a unit has finished; `text` is a few words about its result."""
        self.done += 1

    def under_way(self, states: dict[str, tuple[float, str]]) -> None:
        """Report the share done (0 to 1) and the state of each unit under way."""

    def note(self, text: str) -> None:
        """Report an event that is no progress."""


class ProgressReporter(Protocol):
    """Shows the progress of stages."""

    def stage(self, name: str, total: int, done: int) -> AbstractContextManager[StageProgress]:
        """Show a stage of `total` units, `done` of which were finished before."""

    def note(self, text: str) -> None:
        """Report an event outside any stage."""


class Patience:
    """Reports what a stage waits for, where it has had no unit under way for a while."""

    def __init__(self, progress: StageProgress, *, autoscales: bool) -> None:
        """Begin to wait; `autoscales`: whether the cluster's autoscaler may add nodes."""
        self._progress, self._since = progress, time.monotonic()
        self._then = "; its autoscaler is asked for nodes" if autoscales else ""

    def look(self, *, under_way: bool) -> None:
        """Report once in every `PATIENCE_SECONDS` without a unit `under_way`; to be called again and again."""
        if not under_way:
            if time.monotonic() - self._since <= PATIENCE_SECONDS:
                return
            self._progress.note(f"waiting for a worker: no core or GPU is free, or it is still starting{self._then}")
        self._since = time.monotonic()


class Furthest:
    """Remembers the largest share done that each unit has reported."""

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}

    def came_on(self, unit: str, share: float) -> bool:
        """Return whether a unit has come further than ever before."""
        further = share > self._shares.get(unit, 0.0)
        if further:
            self._shares[unit] = share
        return further
