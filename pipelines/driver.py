"""The driver of a run folder: it executes the jobs of stages, and starts an executor when a unit is missing."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import torch

from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.data.names import WITH_FILES
from gross_ray.errors import DamagedFileError, UnitsFailedError
from gross_ray.experiment import DataOptions
from gross_ray.run.opened import Run
from gross_ray.run.pins import fingerprint, pin
from gross_ray.run.progress import store_plans
from gross_ray.run.store import RunStore
from gross_ray.search.timing import timed_device
from gross_ray.version import VERSION
from pipelines.capacity import Capacity, settled_threads
from pipelines.execution import signals
from pipelines.execution.base import Executor
from pipelines.execution.in_process import InProcess
from pipelines.nodes import NodeKind
from pipelines.packing import pack_splits
from pipelines.resources import Resources
from pipelines.stages.pipeline import plans
from pipelines.units import Group, Job, grouped
from pipelines.watching import ProgressReporter, StageProgress

Result = TypeVar("Result")
Reading = tuple[Callable[[str], object] | None, Callable[[int, int], object] | None]
"""The functions `note` and `progress` of `load_dataset`."""

NAMED = 5
"""Maximum number of units that an error names."""
_MEASURE = "measure again with `gross latency`"
_AFTER_DAMAGE = {"runs": "that start is on record no more", "layer_latencies": _MEASURE, "runtime_latencies": _MEASURE}
"""The consequence of losing a file of a table that no stage completes."""


def _silently() -> AbstractContextManager[Reading]:
    return nullcontext((None, None))


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where this machine finds the images."""

    root: str | None = None
    """Folder of the dataset's files; None: ~/.cache/gross_ray."""
    download: bool = False
    """Download missing files."""
    reading: Callable[[], AbstractContextManager[Reading]] = _silently
    """Shows the reading of images into files while a block runs."""

    def load(self, options: DataOptions) -> Splits:
        """Return the images; the images loaded last are cached until `forget`. Raises as `load_dataset` does."""
        return _loaded(options, self.root, self.download, self.reading)

    def without_effect(self, name: str) -> list[str]:
        """Return a line for each option without effect on the dataset of this name."""
        found = []
        if self.root is not None and name == "sample":
            found.append("--data-root for the dataset sample: it is part of gross_ray")
        if self.download and name not in WITH_FILES:
            found.append(f"--download for the dataset {name}: only {', '.join(WITH_FILES)} can be downloaded")
        return found

    @staticmethod
    def forget() -> None:
        """Drop the cached images."""
        _loaded.cache_clear()


@lru_cache(maxsize=1)
def _loaded(
    options: DataOptions, root: str | None, download: bool, reading: Callable[[], AbstractContextManager[Reading]]
) -> Splits:
    with reading() as (note, progress):
        return load_dataset(options, root=root, download=download, note=note, progress=progress)


def report_damage(store: RunStore, progress: ProgressReporter) -> None:
    """Report the damaged files that were deleted since the last call, and the consequence of each."""
    for file in store.damaged:
        follows = _AFTER_DAMAGE.get(file.split("/")[1], "its stage, asked for as before, makes it anew")
        progress.note(f"damaged file {file}: deleted; {follows}")
    store.damaged.clear()


@contextmanager
def locked(store: RunStore, progress: ProgressReporter) -> Iterator[None]:
    """Lock the run folder, delete leftovers of crashed runs, and report them."""
    with store.lock():
        store.remove_leftovers()
        report_damage(store, progress)
        yield


def redone_after_damage(session: Session, work: Callable[[], Result]) -> Result:
    """Return `work()`, repeated each time that this process or a unit reads a damaged file, which is deleted by then.

    Raises DamagedFileError for a file that is damaged again, and for a file of another run folder.
    """
    store, before = session.run.store, set[str]()
    while True:
        try:
            return work()
        except DamagedFileError:
            found = set(store.damaged)
            if not found - before:
                raise
            before |= found
            session.report_damage()
            session.run.changed()


class _Place(Protocol):
    """Where units run: its capacity and its executors."""

    capacity: Capacity

    def executor(self, job: Job) -> Executor:
        """Return the executor for a job; an executor that is no longer needed ends its processes first."""

    def close(self) -> None:
        """Release all processes and memory."""


class _ThisProcess:
    """Runs everything in this process, without Ray."""

    def __init__(self, run: Run, splits: Splits, resources: Resources) -> None:
        cuda = resources.device == "cuda" or (resources.device == "auto" and torch.cuda.is_available())
        device = str(timed_device("cuda" if cuda else "cpu"))
        node = NodeKind(resources.num_cpus or os.cpu_count() or 1, float(cuda))
        self.capacity = Capacity(nodes=(node,), device=device, gpus_per_unit=float(cuda), one_at_a_time=True)
        self._executor = InProcess(run, splits, device)

    def executor(self, _: Job) -> Executor:
        return self._executor

    def close(self) -> None:
        self._executor.close()


class _OnRay:
    """Joins or starts Ray and puts the images into its object store; runs units on actors, and trials in Ray Tune."""

    def __init__(
        self, run: Run, splits: Splits, resources: Resources, callbacks: Sequence[Any], note: Callable[[str], object]
    ) -> None:
        from pipelines.execution.actors import Actors
        from pipelines.execution.cluster import connected, module_of, put, this_node

        self._stack = ExitStack()
        self._run, self._callbacks = run, callbacks
        own = module_of(run.experiment.model)
        ray = connected(resources, [own] if own else [], note=note, run=run.store.storage.folder)
        self.capacity = self._stack.enter_context(ray)
        try:
            self._packed = put(pack_splits(splits, run.experiment.data, node=this_node()))
            self._actors = Actors(self.capacity, self._packed, run)
        except BaseException:
            self._stack.close()
            raise

    def executor(self, job: Job) -> Executor:
        if not job.trials:
            return self._actors
        from pipelines.execution.tune import Trials  # importing Ray Tune takes a second, which other stages save

        self._actors.close()  # the trials need their cores
        return Trials(self.capacity, self._packed, self._run, self._callbacks)

    def close(self) -> None:
        try:
            self._actors.close()
        finally:
            del self._packed
            self._stack.close()


@dataclass(eq=False)
class Session:
    """Executes the jobs of stages (a `Driver`); loads the images and joins Ray only when a unit is missing.

    Use `opened`, which also closes the session.
    """

    run: Run
    _resources: Resources
    _source: DataSource
    _progress: ProgressReporter
    _callbacks: Sequence[Any]
    _in_process: bool
    _joined: _Place | None = None

    @classmethod
    @contextmanager
    def opened(
        cls,
        store: RunStore,
        resources: Resources,
        source: DataSource,
        progress: ProgressReporter,
        *,
        callbacks: Sequence[Any] = (),
        in_process: bool = False,
    ) -> Iterator[Session]:
        """Lock the run folder, and release everything at the end, also after SIGINT and SIGTERM.

        `callbacks` are `ray.tune.Callback`s, which get the events of every trial. With `in_process`, units run one
        after another in this process, and Ray is never imported.
        """
        with signals.orderly(), signals.closed_in_peace(locked(store, progress)):
            session = cls(Run(store), resources, source, progress, callbacks, in_process)
            try:
                yield session
                store_plans(store, plans(session.run))
            finally:
                with signals.ignored():
                    session._close()

    @property
    def capacity(self) -> Capacity:
        """What can run at the same time."""
        return self._place().capacity

    def note(self, text: str) -> None:
        """Show one line."""
        self._progress.note(text)

    def report_damage(self) -> None:
        """Report the damaged files that were deleted since the last report."""
        report_damage(self.run.store, self._progress)

    def threads(self, kind: str, num_equal: int | None) -> int:
        """Return the CPU threads of units of a kind (`settled_threads`)."""
        return settled_threads(self.run.store, kind, num_equal, self.capacity)

    def do(self, job: Job) -> None:
        """Do the units of a job that are not done; raises UnitsFailedError, naming them, if any is not done then."""
        names = [unit.name for unit in job.units]
        stored = job.done() & set(names)
        self.report_damage()
        todo = [unit for unit in job.units if unit.name not in stored]
        groups = todo if job.together is None else grouped(todo, job.together)
        with self._progress.stage(job.stage, len(stored) + len(groups), len(stored)) as progress:
            if not todo:
                return
            threads = self.threads(job.kind, job.num_equal)
            store_plans(self.run.store, plans(self.run))
            failed = self._execute(job, groups, threads, progress)
        self.run.changed(job.kind)
        stored = job.done()
        missing = [name for name in names if name not in stored]
        if missing:
            first = failed.get(missing[0], "it was interrupted")
            if self.run.store.damaged:  # by units: `redone_after_damage` asks for what is missing again
                raise DamagedFileError(f"{missing[0]}: {first}")
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise UnitsFailedError(
                f"{job.stage}: {len(missing)} of {len(names)} units did not end: {', '.join(missing[:NAMED])}{more} "
                f"({missing[0]}: {first})",
                "All others are stored; the same command again does only what is missing",
            )

    def _execute(self, job: Job, units: Sequence[Any], threads: int, progress: StageProgress) -> dict[str, str]:
        executor = self._place().executor(job)
        if not job.trials:
            failed = executor.do(job, units, threads=threads, progress=progress)
            reasons = [
                (member.name, failed.get(unit.name))
                for unit in units
                for member in (unit.members if isinstance(unit, Group) else [unit])
            ]
            return {name: reason for name, reason in reasons if reason is not None}

        def do_missing() -> dict[str, str]:
            stored = job.done()
            missing = [unit for unit in units if unit.name not in stored]
            return executor.do(job, missing, threads=threads, progress=progress) if missing else {}

        return self.run.store.storage.patiently("write", "tune", do_missing)

    def _place(self) -> _Place:
        """Return where units run; the first call loads the images, joins Ray and records the start."""
        if self._joined is None:
            splits = self._source.load(self.run.experiment.data)
            pin(self.run.store, splits)
            if self._in_process:
                self._joined = _ThisProcess(self.run, splits, self._resources)
            else:
                self._joined = _OnRay(self.run, splits, self._resources, self._callbacks, self.note)
                self._source.forget()
            device = self._joined.capacity.device
            for line in (*self.run.experiment.without_effect(device=device), *self._resources.without_effect(device)):
                self.note(f"without effect: {line}")
            self._record_start(self._joined.capacity)
        return self._joined

    def _record_start(self, capacity: Capacity) -> None:
        started, experiment = datetime.now(UTC), self.run.experiment
        row = {
            "started": started.isoformat(timespec="milliseconds"),
            **{package: version(package) for package in ("torch", "torchvision")},
            "ray": "none, in process" if self._in_process else version("ray"),
            "gross_ray": VERSION,
            "python": platform.python_version(),
            "host": socket.gethostname(),
            "device": capacity.device,
            "num_cpus": capacity.num_cpus,
            "preset": experiment.name,
            "experiment": experiment.to_json(),
            "fingerprint": fingerprint(self.run.store),
        }
        self.run.store.write_table("runs", started.strftime("%Y%m%dT%H%M%S.%f"), [row])

    def _close(self) -> None:
        self.report_damage()
        if self._joined is not None:
            self._joined.close()
            self._joined = None
