"""The range test of the learning rate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import DivergedError, InvalidValueError
from gross_ray.training.loop import EpochRecord
from gross_ray.training.options import Schedule
from gross_ray.training.rates import RATES, STEPS, find_rate
from gross_ray.training.stages import train_network

OPEN = Schedule(epochs=7, lr=0.0, milestones=(2, 5), batch_size=4, augment="none")


@pytest.fixture(scope="module")
def splits() -> Splits:
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        pixels = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.randint(3, (count,), generator=generator))

    return Splits("made up", images(200), images(9), images(8), ("a", "b", "c"))


def recorded(losses: Callable[[float], float], seen: list[tuple[Splits, Schedule]]) -> Callable[..., list[EpochRecord]]:
    """Return a training whose last loss is that of the rate; NaN stands for one that diverges."""

    def training(splits: Splits, schedule: Schedule) -> list[EpochRecord]:
        seen.append((splits, schedule))
        loss = losses(schedule.lr)
        if loss != loss:
            raise DivergedError("the loss became nan")
        return [EpochRecord(epoch, schedule.lr, each, 1.0, None, 1.0, 1.0) for epoch, each in ((1, 9.0), (2, loss))]

    return training


def test_the_rate_of_the_least_loss_after_the_first_steps_is_chosen(splits: Splits) -> None:
    seen: list[tuple[Splits, Schedule]] = []
    losses = dict(zip(RATES, (1.9, 1.8, 1.5, 1.2, 1.0, 1.1, 1.3, 1.7), strict=True))
    found = find_rate(nn.Linear(1, 1), recorded(losses.__getitem__, seen), splits, OPEN)
    assert found.chosen == 1e-2
    assert found.rates == RATES and found.losses == tuple(losses.values())
    for rate, (given, schedule) in zip(RATES, seen, strict=True):
        assert (schedule.lr, schedule.epochs, schedule.milestones) == (rate, 2, ())
        assert schedule.images == STEPS * OPEN.batch_size and schedule.batch_size == OPEN.batch_size
        assert given.train is splits.train and len(given.validation) == 1


def test_of_rates_about_as_good_the_smallest_is_chosen(splits: Splits) -> None:
    # ResNet-20's supernet: after more steps 1e-3 is better than 3e-3, which the next rate shows to be near the edge.
    losses = dict(zip(RATES, (7.03, 6.78, 6.46, 6.38, 10.41, float("nan"), 0.0, 0.0), strict=True))
    found = find_rate(nn.Linear(1, 1), recorded(losses.__getitem__, []), splits, OPEN)
    assert found.chosen == 1e-3


def test_higher_rates_are_not_tried_after_one_that_diverges(splits: Splits) -> None:
    seen: list[tuple[Splits, Schedule]] = []
    losses = {1e-4: 3.0, 3e-4: 2.0, 1e-3: 2.5}
    found = find_rate(nn.Linear(1, 1), recorded(lambda rate: losses.get(rate, float("nan")), seen), splits, OPEN)
    assert found.rates == RATES[:4] and found.losses == (3.0, 2.0, 2.5, None)
    assert found.chosen == 3e-4
    far = find_rate(nn.Linear(1, 1), recorded(lambda rate: 1.0 if rate < 1e-3 else 2.1, []), splits, OPEN)
    assert far.rates == RATES[:3] and far.chosen == 1e-4


def test_if_every_training_diverges_the_tried_rates_are_named(splits: Splits) -> None:
    found = find_rate(nn.Linear(1, 1), recorded(lambda rate: float("nan"), []), splits, OPEN)
    with pytest.raises(DivergedError, match="every training of the range test diverged, .* 0.0001, 0.0003"):
        _ = found.chosen


def test_each_rate_starts_from_the_same_weights_and_the_network_keeps_them(splits: Splits) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    starts: list[Tensor] = []

    def training(given: Splits, schedule: Schedule) -> list[EpochRecord]:
        starts.append(torch.cat([tensor.float().flatten() for tensor in network.state_dict().values()]))
        history = train_network(network, given, schedule, seed=3)
        assert any(not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        return history

    found = find_rate(network, training, splits, OPEN, rates=(1e-3, 1e-2))
    assert len(starts) == 2 and torch.equal(*starts)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    alone = train_network(
        network, splits, Schedule(epochs=2, lr=1e-2, batch_size=4, images=4 * STEPS, augment="none"), seed=3
    )
    assert found.losses[1] == alone[-1].train_loss  # whatever ran before it


def test_a_schedule_without_a_rate_trains_nothing(splits: Splits) -> None:
    with pytest.raises(InvalidValueError, match="lr = 0.0: is not found yet"):
        train_network(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), splits, OPEN, seed=0)
