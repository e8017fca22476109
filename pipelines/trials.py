"""Ray Tune: one trial a unit of work. Resuming is by units and their epoch checkpoints, never by Tune's pickles."""

from __future__ import annotations

import contextlib
import logging
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
from ray.tune.stopper import NoopStopper

from gross_ray.errors import DivergedError, GrossRayError
from gross_ray.results.store import RunStore
from pipelines import signals
from pipelines.cluster import Cluster
from pipelines.progress import Furthest, Patience, StageProgress
from pipelines.tuning import Ended, Tuning, trial_config
from pipelines.units import Context, Unit, Work, done, room_for_images, unpack_splits
from pipelines.versions import Versions

MAX_FAILURES = 2
"""How often a trial is started again whose process died, without that it comes any further than it was before.

It goes on from its last epoch. Tune does not count a machine that its owner took back.
"""


def run_trials(
    name: str,
    work: Work,
    store: RunStore,
    units: Sequence[Unit],
    *,
    cluster: Cluster,
    packed_splits: ray.ObjectRef,
    threads: int,
    progress: StageProgress,
    tuning: Tuning | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, str]:
    """Do each unit as a trial of one Tune experiment, and return why those failed that did, by name.

    Under a search the units only say how many trials are asked for and by which names: it proposes what each one does.
    `callbacks` are the user's. Tune's own files (results, TensorBoard events) are under RUN/tune; raises OSError where
    it cannot write them. What is not in the returned failures may still be missing, if Tune was interrupted: the caller
    looks at what is stored.
    """
    tuning = tuning or Tuning()
    gpus = cluster.gpus_per_unit if cluster.device == "cuda" else 0
    setup = _Setup(work, store, cluster.device, threads, tuning.first_metrics, Versions.here())
    trainable = tune.with_parameters(_trial, packed=_Reference(packed_splits), setup=setup)
    with _quiet(progress), signals.noted() as interrupted:
        watch = _Watch(progress, tuning, interrupted, Patience(progress, autoscales=cluster.autoscales))
        space, config = _asked(tuning, units, cluster.slots(threads))
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": threads, "gpu": gpus}),
            param_space=space,
            tune_config=config,
            run_config=tune.RunConfig(
                name=f"{name}-{time.strftime('%Y%m%dT%H%M%S')}",
                storage_path=store.storage.path("tune"),
                storage_filesystem=store.storage.filesystem,
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                callbacks=[watch, *callbacks],
                stop=_Interruption(interrupted),
                verbose=0,
            ),
        )
        results = tuner.fit()
    if watch.error is not None:
        raise watch.error
    failed = dict(watch.failed)
    for result in (results[place] for place in range(len(results))):
        if result.error is not None and result.config:
            failed.setdefault(_account(result.config), str(result.error).strip().splitlines()[-1])
    return failed


def _asked(tuning: Tuning, units: Sequence[Unit], slots: int) -> tuple[dict[str, Any], tune.TuneConfig]:
    """Return what Tune takes its trials from: the units as a grid, or a search for as many."""
    space: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    if tuning.search is None:
        space = {"unit": tune.grid_search([trial_config(unit) for unit in _longest_first(units)])}
    else:
        search = tuning.search([unit.name for unit in units])
        asked = {"search_alg": search, "num_samples": len(units), "max_concurrent_trials": slots}
    scheduler = None if tuning.scheduler is None else tuning.scheduler()
    return space, tune.TuneConfig(
        reuse_actors=True,
        scheduler=scheduler,
        trial_name_creator=_trial_name,
        trial_dirname_creator=_trial_name,
        **asked,
    )


class _Reference:
    """Hides an object reference from Tune, which would fetch it on the driver."""

    def __init__(self, reference: ray.ObjectRef) -> None:
        self.reference = reference


@dataclass(frozen=True)
class _Setup:
    """What all trials of an experiment share."""

    work: Work
    store: RunStore
    device: str
    threads: int
    first_metrics: dict[str, float]
    versions: Versions


def _trial(config: dict[str, Any], packed: _Reference, setup: _Setup) -> None:
    torch.set_num_threads(setup.threads)
    last: dict[str, Any] = {"share": 0.0, **setup.first_metrics}

    def report(share: float, text: str, **metrics: float) -> None:
        last.update(share=share, **metrics)
        tune.report({**last, "state": text})

    try:
        setup.versions.check()
        setup.store.require_here()
        splits = unpack_splits(ray.get(packed.reference), setup.device, room_for_images(setup.device))
        text = done(setup.work, Context(setup.store, splits, setup.device, report), _unit(config))
    except ray.exceptions.RayError:  # a node or process is gone, not an error of the work: tried again
        raise
    except Exception as error:  # a repetition would meet the same
        failure = {"state": "failed", "failed": _told(error), "diverged": isinstance(error, DivergedError)}
        if not isinstance(error, GrossRayError):
            failure["traceback"] = traceback.format_exc()
        tune.report({**last, **failure})
    else:
        tune.report({**last, "share": 1.0, "state": text})


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, GrossRayError) else f"{type(error).__name__}: {error}"


def _unit(config: dict[str, Any]) -> Unit:
    arguments = dict(config["unit"])
    return Unit(arguments.pop("name"), arguments)


def _account(config: dict[str, Any]) -> str:
    """Return the name under which the stage asked for a trial: its unit's, unless a search proposed that."""
    return config.get("trial", config["unit"]["name"])


class _Interruption(tune.Stopper):
    """Stops all trials once a signal came."""

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self._interrupted = interrupted

    def __reduce__(self) -> tuple[type[tune.Stopper], tuple[()]]:
        """Tune pickles it for a restoration that we never ask for."""
        return NoopStopper, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._interrupted()


class _Watch(Callback):
    """Turns Tune's events into progress, and tells the stage of each trial's end."""

    def __init__(
        self, progress: StageProgress, tuning: Tuning, interrupted: Callable[[], bool], patience: Patience
    ) -> None:
        self._progress, self._tuning, self._interrupted, self._patience = progress, tuning, interrupted, patience
        self._states: dict[str, tuple[float, str]] = {}
        self._furthest = Furthest()
        self.failed: dict[str, str] = {}
        self.error: GrossRayError | None = None
        """What the stage's account of a trial met: raised in here, Tune would do that trial again."""

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        """Tune pickles its callbacks for a restoration that we never ask for; a bar on a terminal cannot be pickled."""
        return Callback, ()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        name, share = trial.config["unit"]["name"], float(result["share"])
        self._states[name] = (share, str(result["state"]))
        if self._furthest.came_on(name, share):
            trial.run_metadata.num_failures = 0  # it comes further: what it died of before does not count
        self._progress.under_way({unit: state for unit, state in self._states.items() if state[0] < 1})

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._patience.look(under_way=any(trial.status == Trial.RUNNING for trial in trials))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        unit, result = _unit(trial.config), trial.last_result
        if "share" not in result:  # taken from the queue before it began
            return
        if self._interrupted() and result["share"] < 1 and "failed" not in result:  # nobody's judgement of the trial
            return
        self._states.pop(unit.name, None)
        failed = result.get("failed")
        stopped = failed is None and result["share"] < 1
        name = _account(trial.config)
        try:
            self._tuning.on_end(Ended(name, unit, result, stopped, failed, result.get("diverged", False)))
        except GrossRayError as error:
            self.error = self.error or error
        if failed is not None:
            self.failed[name] = failed
            self._progress.note(f"{unit.name}: failed: {result.get('traceback', failed)}")
        elif stopped:
            self._progress.unit_done(unit.name, f"stopped early, after {result['state']}")
        else:
            self._progress.unit_done(unit.name, result["state"])


def _longest_first(units: Sequence[Unit]) -> list[Unit]:
    return sorted(units, key=lambda unit: -unit.cost)


def _trial_name(trial: Any) -> str:
    return f"{trial.config['unit']['name']}_{trial.trial_id}"


class _Told(logging.Handler):
    """Turns Tune's log into notes: what the disk, the network or a lost process did is one line there, told once."""

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
    """Keep Tune's own advice off the terminal; what happens to the trials is told by the progress, and its errors."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    told = _Told(progress)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        logger.addHandler(told)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(told)
            logger.propagate = propagate
            logger.setLevel(level)
