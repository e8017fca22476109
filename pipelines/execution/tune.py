"""Execution in Ray Tune, one trial for each unit. A run resumes from units and epochs, not from Tune's pickles."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.stopper import NoopStopper

from gross_ray.errors import GrossRayError, RunFolderError, StorageError, VersionMismatchError, one_line
from gross_ray.run.opened import Run
from pipelines.capacity import Capacity
from pipelines.execution import signals
from pipelines.execution.actors import gpu_share
from pipelines.execution.base import do_unit, report_failure
from pipelines.execution.fetching import Fetcher
from pipelines.execution.versions import Versions
from pipelines.packing import room_for_images, unpack_splits
from pipelines.units import Context, Job, Unit, Work
from pipelines.watching import Furthest, Patience, StageProgress

MAX_FAILURES = 2
"""How often a trial is restarted if its process dies each time before the trial has got any further.

A restarted trial continues from its last epoch. Tune does not count a spot machine that was taken back.
"""


_REFUSALS = (VersionMismatchError, RunFolderError, StorageError)
"""Errors of a worker that cannot do any unit."""


class Trials:
    """Does each unit as a trial of one Tune experiment (an `Executor`)."""

    starts_the_most_costly_first = True
    survives_deaths = True

    def __init__(
        self, capacity: Capacity, packed_splits: ray.ObjectRef, run: Run, callbacks: Sequence[Callback] = ()
    ) -> None:
        """Start nothing yet; the user's `callbacks` get every event of the trials."""
        self._capacity, self._packed, self._run, self._callbacks = capacity, packed_splits, run, callbacks

    def do(self, job: Job, units: Sequence[Unit], *, threads: int, progress: StageProgress) -> dict[str, str]:
        """Do the units (see `Executor`).

        Tune writes its own files (results, TensorBoard events) under RUN/tune; raises OSError if it cannot. Raises
        VersionMismatchError if a worker runs other versions than this driver, and RunFolderError or StorageError if it
        cannot reach the run folder.
        """
        store, capacity = self._run.store, self._capacity
        gpus = capacity.gpus_per_unit if capacity.device == "cuda" else 0
        by_name = {unit.name: unit for unit in units}
        by_cost = sorted(units, key=lambda unit: -unit.cost)
        setup = _Setup(job.work, by_name, self._run, capacity.device, threads, Versions.here())
        trainable = tune.with_parameters(_trial, packed=_Reference(self._packed), setup=setup)
        with _quiet(progress), signals.noted() as interrupted:
            watch = _Watch(progress, Patience(progress, autoscales=capacity.autoscales), self._run)
            tuner = tune.Tuner(
                tune.with_resources(trainable, {"cpu": threads, "gpu": gpus}),
                # Callbacks and Tune's files show this configuration; the trial takes the unit itself from `_Setup`.
                param_space={"unit": tune.grid_search([{"name": unit.name, **unit.values()} for unit in by_cost])},
                tune_config=tune.TuneConfig(
                    reuse_actors=True, trial_name_creator=_trial_name, trial_dirname_creator=_trial_name
                ),
                run_config=tune.RunConfig(
                    name=f"{job.stage}-{time.strftime('%Y%m%dT%H%M%S')}",
                    storage_path=store.storage.path("tune"),
                    storage_filesystem=store.storage.filesystem,
                    failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                    callbacks=[watch, *_instead_of_tensorboard(progress), *self._callbacks],
                    stop=_Interruption(lambda: interrupted() or watch.refusal is not None),
                    verbose=0,
                ),
            )
            results = tuner.fit()
        if watch.refusal is not None:
            raise watch.refusal
        failed = dict(watch.failed)
        for result in (results[index] for index in range(len(results))):
            if result.error is not None and result.config:
                failed.setdefault(_name_of(result.config), str(result.error).strip().splitlines()[-1])
        return failed

    def close(self) -> None:
        """Do nothing: an experiment's processes end with the experiment."""


class _NoTensorBoard(TBXLoggerCallback):
    """Takes the place of Tune's logger for TensorBoard, and writes nothing."""

    def __init__(self) -> None:
        """Import nothing."""

    def log_trial_start(self, trial: Trial) -> None:
        """Do nothing."""

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        """Do nothing."""

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        """Do nothing."""


def _instead_of_tensorboard(progress: StageProgress) -> list[Callback]:
    """Return a callback without which Tune would fail, and report it, where no semaphores can be made; else nothing.

    The writer of TensorBoard's files needs them, and they lie in the shared memory.
    """
    try:
        multiprocessing.Lock()
    except OSError as error:
        progress.note(f"no files for TensorBoard are written: no semaphore can be made ({one_line(error)})")
        return [_NoTensorBoard()]
    return []


class _Reference:
    """Hides an object reference from Tune, which would fetch the object on the driver."""

    def __init__(self, reference: ray.ObjectRef) -> None:
        self.reference = reference


@dataclass(frozen=True)
class _Setup:
    """The arguments that all trials of an experiment share."""

    work: Work
    units: dict[str, Unit]
    run: Run
    device: str
    threads: int
    versions: Versions


def _trial(config: dict[str, Any], packed: _Reference, setup: _Setup) -> None:
    torch.set_num_threads(setup.threads)
    last: dict[str, Any] = {"share": 0.0}

    def report(share: float, text: str, **metrics: float) -> None:
        last.update(share=share, **metrics)
        tune.report({**last, "state": text})

    try:
        setup.versions.check()
        setup.run.store.require_here()
    except _REFUSALS as error:  # every trial there would end in the same way
        tune.report({**last, "state": "refused", "failed": str(error), "refused": type(error).__name__})
        return
    try:
        images, room = ray.get(packed.reference), room_for_images(setup.device, gpu_share())
        splits = unpack_splits(images, setup.device, room, Fetcher(images.node))
        context = Context(setup.run, splits, setup.device, report)
        text = do_unit(setup.work, context, setup.units[_name_of(config)])
    except ray.exceptions.RayError:  # a node or process was lost: Tune tries again
        raise
    except Exception as error:  # the work failed, and would fail again
        text = str(error) if isinstance(error, GrossRayError) else one_line(error)
        failure = {"state": "failed", "failed": text, "deleted": list(getattr(error, "deleted", ()))}
        if not isinstance(error, GrossRayError):
            failure["traceback"] = traceback.format_exc()
        tune.report({**last, **failure})
    else:
        tune.report({**last, "share": 1.0, "state": text})


def _name_of(config: dict[str, Any]) -> str:
    return str(config["unit"]["name"])


class _Interruption(tune.Stopper):
    """Stops all trials once a signal has come."""

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self._interrupted = interrupted

    def __reduce__(self) -> tuple[type[tune.Stopper], tuple[()]]:
        """Tune pickles its stopper for a restoration that we never ask for."""
        return NoopStopper, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._interrupted()


class _Watch(Callback):
    """Turns Tune's events into progress."""

    def __init__(self, progress: StageProgress, patience: Patience, run: Run) -> None:
        self._progress, self._patience, self._run = progress, patience, run
        self._states: dict[str, tuple[float, str]] = {}
        self._furthest = Furthest()
        self.failed: dict[str, str] = {}
        self.refusal: GrossRayError | None = None
        """The error of a worker that cannot do any unit."""

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        """Tune pickles its callbacks for a restoration that we never ask for; a bar on a terminal cannot be pickled."""
        return Callback, ()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        for error in _REFUSALS:
            if result.get("refused") == error.__name__:
                self.refusal = error(result["failed"])
                return
        name, share = _name_of(trial.config), float(result["share"])
        self._states[name] = (share, str(result["state"]))
        if self._furthest.advanced(name, share):
            trial.run_metadata.num_failures = 0  # earlier deaths do not count for a trial that gets further
        self._progress.under_way({unit: state for unit, state in self._states.items() if state[0] < 1})

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._patience.look(under_way=any(trial.status == Trial.RUNNING for trial in trials))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name, result = _name_of(trial.config), trial.last_result
        not_begun = "share" not in result or "refused" in result
        if not_begun or (result["share"] < 1 and "failed" not in result):  # the latter: interrupted
            return
        self._states.pop(name, None)
        failed = result.get("failed")
        if failed is None:
            self._progress.unit_done(name, result["state"])
        else:
            self.failed[name] = failed
            deleted = result.get("deleted", ())
            report_failure(self._progress, name, failed, result.get("traceback"), self._run, deleted)


def _trial_name(trial: Any) -> str:
    return f"{_name_of(trial.config)}_{trial.trial_id}"


class _Notes(logging.Handler):
    """Turns Tune's log into notes: an error of the disk, the network or a lost process is one line, shown once."""

    def __init__(self, progress: StageProgress) -> None:
        super().__init__(logging.ERROR)
        self._progress = progress
        self._before: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ray.exceptions.RayError):
            text = f"{record.getMessage().strip()}: {str(error).strip().splitlines()[0]}"
        elif isinstance(error, OSError):
            text = f"{record.getMessage().strip()} {' '.join(str(error).split())}"
        else:
            text = self.format(record)
        if text not in self._before:
            self._before.add(text)
            self._progress.note(f"Ray Tune: {text}")


@contextlib.contextmanager
def _quiet(progress: StageProgress) -> Iterator[None]:
    """Keep Tune's advice off the terminal; `progress` shows its errors and the state of the trials."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    notes = _Notes(progress)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        logger.addHandler(notes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(notes)
            logger.propagate = propagate
            logger.setLevel(level)
