"""Progress of stages: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gross_ray.search.options import RUNTIMES
from pipelines.watching import StageProgress

SECONDS_BETWEEN_LINES = 5.0
"""Outside a terminal: how often the state of the running units is printed, if it has changed."""
SECONDS_OF_SILENCE = 60.0
"""Outside a terminal: how often an unchanged state is printed."""


class _Lines(StageProgress):
    def __init__(self, name: str, total: int, done: int, out: TextIO, counted: str) -> None:
        super().__init__(name, total, done)
        self._out = out
        self._last, self._printed = time.monotonic(), ""
        already = f", {done:,} done already" if done else ""
        self._print(f"{name}: {total:,} {counted}{already}")

    def unit_done(self, unit: str, text: str) -> None:
        super().unit_done(unit, text)
        self._print(f"{self.name}: {self.done}/{self.total} {unit} {text}")

    def under_way(self, states: dict[str, tuple[float, str]]) -> None:
        state, silence = _text(states), time.monotonic() - self._last
        if state and silence >= (SECONDS_OF_SILENCE if state == self._printed else SECONDS_BETWEEN_LINES):
            self._print(f"{self.name}: {state}")
            self._printed = state

    def note(self, text: str) -> None:
        self._print(f"{self.name}: {text}")

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)
        self._last = time.monotonic()


class _Bar(StageProgress):
    def __init__(self, name: str, total: int, done: int, bar: Progress) -> None:
        super().__init__(name, total, done)
        self._bar = bar
        self._task = bar.add_task(name, total=total, completed=done, state="")

    def unit_done(self, unit: str, text: str) -> None:
        super().unit_done(unit, text)
        self._bar.update(self._task, completed=self.done, state=f"{unit} {text}")

    def under_way(self, states: dict[str, tuple[float, str]]) -> None:
        if states:
            share = sum(share for share, _ in states.values())
            self._bar.update(self._task, completed=min(self.total, self.done + share), state=_text(states))

    def note(self, text: str) -> None:
        self._bar.console.print(f"{self.name}: {text}", markup=False, highlight=False, soft_wrap=True)


def _text(states: dict[str, tuple[float, str]]) -> str:
    return "; ".join(f"{unit} {text}" for unit, (_, text) in states.items())


class Reporter:
    """Shows the progress of stages on a stream (a `ProgressReporter`)."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stderr if out is None else out
        self._terminal = self._out.isatty()

    @contextmanager
    def stage(self, name: str, total: int, done: int, counted: str = "units") -> Iterator[StageProgress]:
        """Show a stage of `total` units, or of what is `counted` in it, `done` of which were finished before."""
        if not self._terminal:
            progress: StageProgress = _Lines(name, total, done, self._out, counted)
            yield progress
            if progress.done > done:
                progress.note(f"finished after {time.monotonic() - progress.started:.1f} s")
            return
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}", style="dim", markup=False),
        )
        with Progress(*columns, console=Console(file=self._out)) as bar:
            yield _Bar(name, total, done, bar)

    def note(self, text: str) -> None:
        """Print one line outside any stage."""
        print(text, file=self._out, flush=True)


@contextmanager
def measuring_bar(runtime: str, device: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while latency is measured, and yield what advances it: number done, total."""
    with click.progressbar(length=1000, label=f"latency in {RUNTIMES[runtime]} on {device}", file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.update(1000 * done // total - bar.pos)

        yield advance


@contextmanager
def reading() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Yield what shows a line, and what shows how many images are read into files and how many there are, on stderr."""
    reporter = Reporter()
    with ExitStack() as stack:
        shown: list[StageProgress] = []
        before = 0

        def progress(done: int, total: int) -> None:
            nonlocal before
            if not shown:
                before = done
                reporter.note("more images than data.memory: reading them into files, once (gross data lists them)")
                shown.append(stack.enter_context(reporter.stage("reading", total, done, "images")))
            shown[0].done, started = done, shown[0].started
            shown[0].under_way({"images": (0.0, _state(done, total, done - before, time.monotonic() - started))})

        yield reporter.note, progress


def _state(done: int, total: int, done_now: int, seconds: float) -> str:
    """Return how many images are read, and the time left by the `seconds` that this process took for `done_now`."""
    minutes = seconds / max(1, done_now) * (total - done) / 60
    return f"{done:,} of {total:,}, about {minutes:.0f} minutes left" if minutes >= 1.5 else f"{done:,} of {total:,}"
