"""Every option refuses NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from gross_ray.btd.options import BTDOptions
from gross_ray.data.normalisation import Normalisation
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import DataOptions, Schedule, SupernetOptions, SweepOptions
from gross_ray.search.budgets import Budget
from gross_ray.search.options import EvaluationOptions, LatencyOptions
from gross_ray.training.sampling import sampling_probabilities
from pipelines.resources import Resources

MAKERS: dict[str, Callable[[Any], object]] = {
    "mean": lambda value: Normalisation(mean=(value,)),
    "std": lambda value: Normalisation(std=(value,)),
    "third std": lambda value: Normalisation(std=(0.5, 0.5, value)),
    "data.std": lambda value: DataOptions(std=(0.2, 0.2, value)),
    **{
        name: lambda value, name=name: BTDOptions(**{name: value})
        for name in ("tolerance", "ridge", "max_steps", "restarts")
    },
    **{
        name: lambda value, name=name: Schedule(**{"epochs": 3, "lr": 0.1, name: value})
        for name in ("epochs", "lr", "gamma", "momentum", "weight_decay", "batch_size", "images")
    },
    "alpha": lambda value: SupernetOptions(alpha=value),
    "alphas": lambda value: SweepOptions(alphas=(0.0, value)),
    "sampled alpha": lambda value: sampling_probabilities(3, value),
    "num_group_sizes": lambda value: sampling_probabilities(value, 1.0),
    "limit": lambda value: Budget("macs", value),
    "evaluation batch_size": lambda value: EvaluationOptions(batch_size=value),
    "evaluation memory_budget": lambda value: EvaluationOptions(memory_budget=value),
    **{
        f"latency {name}": lambda value, name=name: LatencyOptions(**{name: value})
        for name in ("batch_size", "threads", "repeats", "num_sampled")
    },
    "gpus_per_unit": lambda value: Resources(gpus_per_unit=value),
    "num_cpus": lambda value: Resources(num_cpus=value),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", MAKERS)
def test_nan_and_infinity_are_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidValueError) as caught:
        MAKERS[name](value)
    assert len(str(caught.value).splitlines()) == 1
