"""The trials of the sweep over alpha: what a search may propose, when one may be stopped, and their rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pandas as pd

from gross_ray.errors import InvalidValueError, is_whole
from gross_ray.experiment import Experiment
from gross_ray.results.store import RunStore
from pipelines.tuning import METRIC, TIME, Ended
from pipelines.units import Unit

TABLE = "alpha_trials"
SCHEDULERS = ("none", "asha")
DIGITS = 4
"""Significant digits of the alphas that a search proposes."""
REDUCTION_FACTOR = 2
"""ASHA stops the worse half at each rung; at each next one this many times as many epochs are done."""


@dataclass(frozen=True, kw_only=True)
class OptunaOptions:
    """A search by Optuna: alpha continuous in a range, scaling one of the experiment's, its seeds in turn."""

    trials: int = 20
    """How many supernets are trained, those of earlier commands on the run folder among them."""
    alpha_low: float = 0.0
    """Smallest alpha."""
    alpha_high: float = 8.0
    """Largest alpha."""

    def __post_init__(self) -> None:
        if not is_whole(self.trials, 1):
            raise InvalidValueError(f"trials = {self.trials}: must be 1 or more")
        if not 0 <= self.alpha_low < self.alpha_high < math.inf:
            raise InvalidValueError(
                f"alpha from {self.alpha_low:g} to {self.alpha_high:g}: must be a range of 0 or more, like 0 to 8"
            )
        for alpha in (self.alpha_low, self.alpha_high):
            if alpha != rounded(alpha):
                raise InvalidValueError(
                    f"alpha limit {alpha}: must have {DIGITS} digits at most, like {rounded(alpha)}"
                )
        if not _has_optuna():
            raise InvalidValueError("Optuna is not installed; install it with: pip install 'gross-ray[optuna]'")


def rounded(alpha: float) -> float:
    """Return alpha as a search may propose it: of few digits, for it is part of names."""
    return float(f"{alpha:.{DIGITS}g}")


def num_epochs(experiment: Experiment) -> int:
    """Return the epochs of a whole trial."""
    return experiment.reconstruction.epochs + experiment.finetuning.epochs


def grace_period(experiment: Experiment) -> int:
    """Return after how many epochs ASHA may stop a trial first: the reconstruction and a tenth of the fine-tuning.

    Raises InvalidValueError where that is the whole trial.
    """
    epochs = experiment.finetuning.epochs
    if epochs < 2:
        raise InvalidValueError(
            f"scheduler asha, finetuning.epochs = {epochs}: must be 2 or more for it; leave asha out"
        )
    return experiment.reconstruction.epochs + max(1, epochs // 10)


def make_asha(experiment: Experiment) -> Any:
    """Return the scheduler that stops the least promising trials early."""
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr=TIME,
        metric=METRIC,
        mode="max",
        grace_period=grace_period(experiment),
        max_t=num_epochs(experiment) - 1,  # the last rung: at its last epoch there is nothing to stop
        reduction_factor=REDUCTION_FACTOR,
        stop_last_trials=False,
    )


def stored_trials(store: RunStore, search: str) -> pd.DataFrame:
    """Return the rows of a search's trials, in their order; what is damaged is deleted, and done again."""
    rows = store.read_sound(TABLE)
    return rows[rows["search"] == search].sort_values("trial", ignore_index=True)


def store_proposal(store: RunStore, search: str, trial: int, unit: Unit, scheduler: str) -> None:
    """Store a trial before it starts."""
    _store(store, search, trial, unit, scheduler, status="proposed", epochs=0, supernet_accuracy=None, reason=None)


def store_end(store: RunStore, search: str, trial: int, ended: Ended, scheduler: str) -> None:
    """Store what became of a trial; one that failed but did not diverge is left missing: a correction may help it."""
    if ended.failed is not None and not ended.diverged:
        return
    status = "failed" if ended.diverged else "stopped" if ended.stopped else "completed"
    accuracy = float(ended.metrics[METRIC])
    _store(
        store,
        search,
        trial,
        ended.unit,
        scheduler,
        status=status,
        epochs=int(ended.metrics[TIME]),
        supernet_accuracy=None if math.isnan(accuracy) else accuracy,
        reason=ended.failed,
    )


def _has_optuna() -> bool:
    try:
        return find_spec("optuna") is not None
    except ValueError:  # its place in sys.modules is barred
        return False


def _store(store: RunStore, search: str, trial: int, unit: Unit, scheduler: str, **end: Any) -> None:
    row = {"search": search, "trial": trial, "unit": unit.name, **unit.arguments, "scheduler": scheduler, **end}
    store.write_table(TABLE, f"{search},trial={trial}", [row])
