"""A range test of the learning rate: short trainings from the same start, one for each rate (docs/method.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from gross_ray.data.image_set import Splits
from gross_ray.errors import DivergedError
from gross_ray.training.loop import EpochRecord
from gross_ray.training.options import Schedule

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""The rates that are tried, ascending."""
STEPS = 10
"""Steps at each rate before its loss is measured, and as many in which it is."""
NEAR = 1.03
"""The smallest rate whose loss is at most this many times the least one is chosen: a short test favours high rates."""
TOO_MUCH = 2.0
"""Higher rates are not tried after a loss of this many times the least one."""

Training = Callable[[Splits, Schedule], list[EpochRecord]]
"""Trains a network from its present weights, and returns a record for each epoch."""


@dataclass(frozen=True)
class RangeTest:
    """The losses of short trainings at several rates."""

    rates: tuple[float, ...]
    """The rates that were tried, ascending."""
    losses: tuple[float | None, ...]
    """Mean training loss of the last STEPS steps at each rate; None: it diverged."""

    @property
    def chosen(self) -> float:
        """The smallest rate of about the least loss; raises DivergedError if every training diverged."""
        finite = [(loss, rate) for rate, loss in zip(self.rates, self.losses, strict=True) if loss is not None]
        if not finite:
            tried = ", ".join(f"{rate:g}" for rate in self.rates)
            raise DivergedError(f"every training of the range test diverged, at the learning rates {tried}")
        least, _ = min(finite)
        return min(rate for loss, rate in finite if loss <= NEAR * least)


def find_rate(
    network: nn.Module,
    training: Training,
    splits: Splits,
    schedule: Schedule,
    rates: Sequence[float] = RATES,
    *,
    on_rate: Callable[[float, float], object] | None = None,
) -> RangeTest:
    """Train `network` for 2 STEPS steps at each rate, always from the same weights, batches and configurations.

    `training` is that of the stage whose `schedule` lacks a rate, so that loss, mode and draws are its own. Afterwards
    the network has its weights and buffers from before. `on_rate` is called before each rate with the share of
    the rates that were tried and the rate.
    """
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    few = replace(splits, validation=splits.validation.first(1))  # the accuracy after each epoch is not needed
    tried: list[float] = []
    losses: list[float | None] = []
    for rate in rates:
        if on_rate is not None:
            on_rate(len(tried) / len(rates), rate)
        short = replace(schedule, lr=rate, epochs=2, milestones=(), images=STEPS * schedule.batch_size)
        try:
            loss: float | None = training(few, short)[-1].train_loss
        except DivergedError:
            loss = None
        with torch.no_grad():
            network.load_state_dict(start)
        tried.append(rate)
        losses.append(loss)
        known = [each for each in losses if each is not None]
        if known and (loss is None or loss > TOO_MUCH * min(known)):
            break
    return RangeTest(tuple(tried), tuple(losses))
