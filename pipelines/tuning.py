"""What a stage asks of Ray Tune beside its units, and is told of each trial; Ray Tune itself is imported later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipelines.units import Unit

METRIC = "supernet_accuracy"
"""By which trials are compared, where a scheduler or a search does: higher is better."""
TIME = "trial_epoch"
"""Epochs of the whole trial, over all its trainings."""


@dataclass(frozen=True)
class Ended:
    """A trial that ended or was stopped; one whose process died too often is not told of, nor accounted for."""

    name: str
    """The trial's name in the stage's accounts."""
    unit: Unit
    metrics: dict[str, Any]
    """What it reported last."""
    stopped: bool = False
    """Whether the scheduler stopped it before its end."""
    failed: str | None = None
    """Why it failed, if it did."""
    diverged: bool = False
    """Whether it failed because a loss is not finite: a repetition would meet the same."""


def _nothing(_: Ended) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a stage's trials are chosen, stopped and accounted for; by default each unit is one, and done whole."""

    scheduler: Callable[[], Any] | None = None
    """Makes a `ray.tune` scheduler that compares trials by `METRIC` at times `TIME`."""
    search: Callable[[list[str]], Any] | None = None
    """Makes a `ray.tune` Searcher, given the names of the trials to do; it proposes {"trial": name, "unit": ...}."""
    on_end: Callable[[Ended], object] = field(default=_nothing)
    """Told of each trial that ended, on the driver, before the next one is proposed."""

    first_metrics: dict[str, float] = field(default_factory=dict)
    """What a trial reports that fails before its first epoch: Tune insists on the metrics that it compares by."""


def trial_config(unit: Unit) -> dict[str, Any]:
    """Return a unit as Tune's configuration holds it."""
    return {"name": unit.name, **unit.arguments}
