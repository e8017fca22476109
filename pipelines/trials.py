"""Ray Tune: one trial a unit of work. Resuming is by units and their epoch checkpoints, never by Tune's pickles."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray import tune
from ray.tune import Callback

from gross_ray.errors import GrossRayError
from gross_ray.results.store import RunStore
from pipelines.cluster import Cluster
from pipelines.progress import StageProgress
from pipelines.units import Context, Unit, Work, unpack_splits
from pipelines.versions import Versions

MAX_FAILURES = 2
"""How often a trial is started again whose process died; it goes on from its last epoch."""


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
) -> dict[str, str]:
    """Do each unit as a trial of one Tune experiment, and return why those failed that did, by name.

    Tune's own files (results, TensorBoard events) are under RUN/tune. What is not in the returned failures may still
    be missing, if Tune was interrupted: the caller looks at what is stored.
    """
    gpus = cluster.gpus_per_unit if cluster.device == "cuda" else 0
    trainable = tune.with_parameters(
        _trial,
        packed=_Reference(packed_splits),
        setup=(work, store, cluster.device, threads),
        versions=Versions.here(),
    )
    watch = _Watch(progress)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": threads, "gpu": gpus}),
        param_space={
            "unit": tune.grid_search([{"name": unit.name, **unit.arguments} for unit in _longest_first(units)])
        },
        tune_config=tune.TuneConfig(
            reuse_actors=True, trial_name_creator=_trial_name, trial_dirname_creator=_trial_name
        ),
        run_config=tune.RunConfig(
            name=f"{name}-{time.strftime('%Y%m%dT%H%M%S')}",
            storage_path=str(store.path / "tune"),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[watch],
            verbose=0,
        ),
    )
    with _quiet():
        results = tuner.fit()
    failed = dict(watch.failed)
    for result in (results[place] for place in range(len(results))):
        if result.error is not None:
            unit = (result.config or {}).get("unit", {}).get("name", "a trial")
            failed.setdefault(unit, str(result.error).strip().splitlines()[-1])
    return failed


class _Reference:
    """Hides an object reference from Tune, which would fetch it on the driver."""

    def __init__(self, reference: ray.ObjectRef) -> None:
        self.reference = reference


def _trial(
    config: dict[str, Any], packed: _Reference, setup: tuple[Work, RunStore, str, int], versions: Versions
) -> None:
    work, store, device, threads = setup
    torch.set_num_threads(threads)
    arguments = dict(config["unit"])
    unit = Unit(arguments.pop("name"), arguments)
    splits = unpack_splits(ray.get(packed.reference), device)
    last: dict[str, float] = {"share": 0.0}

    def report(share: float, text: str, **metrics: float) -> None:
        last.update(share=share, **metrics)
        tune.report({**last, "state": text})

    try:
        versions.check()
        text = work(Context(store, splits, device, report), unit)
    except GrossRayError as error:  # a repetition would meet the same
        tune.report({**last, "state": "failed", "failed": str(error)})
    else:
        tune.report({**last, "share": 1.0, "state": text})


class _Watch(Callback):
    """Turns Tune's events into progress."""

    def __init__(self, progress: StageProgress) -> None:
        self._progress = progress
        self._states: dict[str, tuple[float, str]] = {}
        self.failed: dict[str, str] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        name = trial.config["unit"]["name"]
        if "failed" in result:
            self.failed[name] = result["failed"]
        self._states[name] = (float(result["share"]), str(result["state"]))
        self._progress.under_way({unit: state for unit, state in self._states.items() if state[0] < 1})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = trial.config["unit"]["name"]
        text = self._states.pop(name, (1.0, ""))[1]
        if name in self.failed:
            self._progress.note(f"{name}: failed: {self.failed[name]}")
        else:
            self._progress.unit_done(name, text)


def _longest_first(units: Sequence[Unit]) -> list[Unit]:
    return sorted(units, key=lambda unit: -unit.cost)


def _trial_name(trial: Any) -> str:
    return f"{trial.config['unit']['name']}_{trial.trial_id}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Tune's own advice off the terminal; what happens to the trials is told by the progress."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
