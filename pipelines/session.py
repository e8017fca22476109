"""One driver's work on one run folder: planned units, those still to do, and the cluster, joined only when needed."""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from math import ceil
from typing import Any, TypeVar

import ray

from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import DamagedFileError, UnitsFailedError
from gross_ray.experiment import DataOptions
from gross_ray.results.store import RunStore
from pipelines import signals
from pipelines.cluster import Cluster, Resources, connected, module_of
from pipelines.progress import Reporter, StageProgress
from pipelines.threads import threads_of_stage
from pipelines.tuning import Tuning
from pipelines.units import Unit, Work, grouped, members_of, pack_splits
from pipelines.workers import Shared, WorkerPool

Result = TypeVar("Result")

_MEASURE = "measure again with `gross latency` or `gross search --latency`"
_AFTER_DAMAGE = {"runs": "that start is on record no more", "latencies": _MEASURE, "latency_models": _MEASURE}
"""What follows from the loss of a unit of a table that no stage completes."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where the images are found on this machine."""

    root: str | None = None
    """Folder of the dataset's files; None: ~/.cache/gross_ray."""
    download: bool = False
    """Fetch what is missing."""

    def load(self, options: DataOptions) -> Splits:
        """Return the images; those that were loaded last are kept until `forget`. Raises as `load_dataset` does."""
        return _loaded(options, self.root, self.download)

    @staticmethod
    def forget() -> None:
        """Let go of the images."""
        _loaded.cache_clear()


@lru_cache(maxsize=1)
def _loaded(options: DataOptions, root: str | None, download: bool) -> Splits:
    return load_dataset(options, root=root, download=download)


def tell_of_damage(store: RunStore, reporter: Reporter) -> None:
    """Name the damaged files that were deleted since this was asked last, and what follows."""
    for file in store.damaged:
        what_follows = _AFTER_DAMAGE.get(file.split("/")[1], "its stage, asked for as before, makes it anew")
        reporter.note(f"damaged file {file}: deleted; {what_follows}")
    store.damaged.clear()


@contextmanager
def held(store: RunStore, reporter: Reporter) -> Iterator[None]:
    """Hold the run folder's lock, with what killed drivers and bad disks left cleared away and told."""
    with store.lock():
        store.remove_leftovers()
        tell_of_damage(store, reporter)
        yield


def redone_after_damage(store: RunStore, reporter: Reporter, work: Callable[[], Result]) -> Result:
    """Do work under the run folder's lock; repeat it each time it found damaged files, which are deleted then.

    Raises DamagedFileError for a file that is damaged again, and for one of another run folder.
    """
    before: set[str] = set()
    while True:
        try:
            return work()
        except DamagedFileError:
            found = set(store.damaged)
            if not found - before:
                raise
            before |= found
            tell_of_damage(store, reporter)


class Session:
    """Joins Ray and loads the images when the first unit has to be done, and not before."""

    def __init__(
        self,
        store: RunStore,
        resources: Resources,
        source: DataSource,
        reporter: Reporter,
        callbacks: Sequence[Any] = (),
    ) -> None:
        """Use `opened`, which also closes the session."""
        self.store, self.reporter = store, reporter
        self._callbacks = callbacks
        self._resources, self._source = resources, source
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self._packed: ray.ObjectRef | None = None
        self._pool: WorkerPool | None = None

    @classmethod
    @contextmanager
    def opened(
        cls,
        store: RunStore,
        resources: Resources,
        source: DataSource,
        reporter: Reporter,
        *,
        callbacks: Sequence[Any] = (),
    ) -> Iterator[Session]:
        """Hold the run folder's lock, and close everything at the end, after SIGINT and SIGTERM too.

        `callbacks` are `ray.tune.Callback`s, told of the trials of every stage that runs on Ray Tune.
        """
        with signals.orderly(), signals.closed_in_peace(held(store, reporter)):
            session = cls(store, resources, source, reporter, callbacks)
            try:
                yield session
            finally:
                with signals.ignored():
                    session._close()

    def run(
        self,
        stage: str,
        units: Sequence[Unit],
        work: Work,
        finished: Callable[[], set[str]],
        *,
        tuning: Tuning | None = None,
        shared: Shared | None = None,
        together: int | None = None,
    ) -> None:
        """Do those of a stage's `units` that `finished` lacks: on actors, or with `tuning` as trials of Ray Tune.

        On actors, `shared` loads what units share, by name (`Unit.shared`), and with `together`, `work` is given groups
        of up to so many of them (`members_of`).

        Raises UnitsFailedError, naming them, unless every unit is finished afterwards.
        """
        names = [unit.name for unit in units]
        done = finished() & set(names)
        tell_of_damage(self.store, self.reporter)
        todo = [unit for unit in units if unit.name not in done]
        groups = todo if together is None else grouped(todo, together)
        with self.reporter.stage(stage, len(done) + len(groups), len(done)) as progress:
            if not todo:
                return
            threads = threads_of_stage(self.store, stage, self.cluster(), ceil(len(units) / (together or 1)))
            if tuning is not None:

                def those_missing() -> dict[str, str]:
                    done = finished()
                    missing = [unit for unit in todo if unit.name not in done]
                    return self._run_trials(stage, missing, work, threads, progress, tuning) if missing else {}

                failed = self.store.storage.patiently("write", "tune", those_missing)
            else:
                failed = self._workers().run(
                    work, self.store, groups, threads=threads, progress=progress, shared=shared
                )
                if together is not None:
                    reasons = [(unit.name, failed.get(group.name)) for group in groups for unit in members_of(group)]
                    failed = {name: reason for name, reason in reasons if reason is not None}
        done = finished()
        missing = [name for name in names if name not in done]
        if missing:
            first = failed.get(missing[0], "it was interrupted")
            raise UnitsFailedError(
                f"{stage}: {len(missing)} of {len(names)} units did not end: {', '.join(missing)} "
                f"({missing[0]}: {first}). All others are stored; the same command again does only what is missing"
            )

    def _run_trials(
        self, stage: str, units: Sequence[Unit], work: Work, threads: int, progress: StageProgress, tuning: Tuning
    ) -> dict[str, str]:
        """Do the units as trials of Ray Tune (`run_trials`)."""
        from pipelines.trials import run_trials  # Ray Tune takes a second that other stages need not wait

        cluster = self.cluster()
        self._release_workers()
        assert self._packed is not None
        return run_trials(
            stage,
            work,
            self.store,
            units,
            cluster=cluster,
            packed_splits=self._packed,
            threads=threads,
            progress=progress,
            tuning=tuning,
            callbacks=self._callbacks,
        )

    def _workers(self) -> WorkerPool:
        if self._pool is None:
            cluster = self.cluster()
            assert self._packed is not None
            self._pool = WorkerPool(cluster, self._packed)
        return self._pool

    def cluster(self) -> Cluster:
        """Return the cluster, joined now if it is not yet, with the images laid out on it."""
        if self._cluster is None:
            splits = self._source.load(self.store.experiment.data)
            own = module_of(self.store.experiment.model)
            self._cluster = self._stack.enter_context(connected(self._resources, [own] if own else []))
            self._packed = ray.put(pack_splits(splits))
            self._source.forget()
            self._record_start(self._cluster)
        return self._cluster

    def _record_start(self, cluster: Cluster) -> None:
        started = datetime.now(UTC)
        experiment = self.store.experiment
        row = {
            "started": started.isoformat(timespec="milliseconds"),
            **{package: version(package) for package in ("torch", "torchvision", "ray")},
            "gross_ray": version("gross-ray"),
            "python": platform.python_version(),
            "host": socket.gethostname(),
            "device": cluster.device,
            "num_cpus": cluster.num_cpus,
            "preset": experiment.name,
            "experiment": experiment.to_json(),
            "fingerprint": experiment.fingerprint(),
        }
        self.store.write_table("runs", started.strftime("%Y%m%dT%H%M%S.%f"), [row])

    def _release_workers(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _close(self) -> None:
        tell_of_damage(self.store, self.reporter)  # found since the last stage began
        self._release_workers()
        self._packed = None
        self._stack.close()
