"""Statistics of batch-norm: those of a whole network do not fit each of the configurations that share its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gross_ray.nn.modes import evaluating
from gross_ray.nn.precision import products_at

CALIBRATION_IMAGES = 512
"""Images of the training split from which statistics are taken."""
CALIBRATION_BATCH = 128
"""Of them, how many make a batch: its statistics are those of one forward pass in training, and memory is bounded."""


class TrainingImages(Protocol):
    """What `calibration_images` needs of the training split (an `ImageSet`)."""

    @property
    def images(self) -> Tensor:
        """(N, 3, H, W), uint8."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that takes its batches."""
        ...


def calibration_images(train: TrainingImages) -> Tensor:
    """Return the images, uint8 (N, 3, H, W), from which statistics are taken: the first of the training split."""
    return train.images[:CALIBRATION_IMAGES].to(train.device)


def calibration_batches(images: Tensor) -> tuple[Tensor, ...]:
    """Return calibration images (N, ...) as batches of about equal size, at most CALIBRATION_BATCH images each."""
    return images.chunk(-(-len(images) // CALIBRATION_BATCH))


def has_statistics(module: nn.Module) -> bool:
    """Return whether a module is a batch-norm that keeps statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the statistics of every batch-norm by those of the responses to `batches`, as a network takes them.

    Each batch (N, C, H, W) counts alike; all else of the network, its modes too, is left as it is. Products are those
    of float32, as where accuracies are counted, unless autocast is on.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and has_statistics(module)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        with evaluating(network), torch.no_grad(), products_at("float32", next(norms[0].buffers()).device):
            for norm in norms:
                for name, buffer in norm.named_buffers(recurse=False):
                    setattr(norm, name, torch.zeros_like(buffer))  # not in place: weights may be shared, and read-only
                norm.momentum = None  # the plain mean over batches
                norm.train()
            for batch in batches:
                network(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def statistics_of(network: nn.Module) -> list[dict[str, Tensor]]:
    """Return the statistics of every batch-norm of `network`, in its order, by the names of their buffers."""
    return [dict(norm.named_buffers(recurse=False)) for norm in network.modules() if has_statistics(norm)]


@contextmanager
def with_statistics(network: nn.Module, statistics: list[dict[str, Tensor]]) -> Iterator[None]:
    """Put what `statistics_of` gave into `network` while it is open, and what it had before at the end."""
    before = statistics_of(network)
    _set(network, statistics)
    try:
        yield
    finally:
        _set(network, before)


@contextmanager
def recalibrated(network: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Have the statistics that `recalibrate` gives while it is open, and those of before again at the end."""
    with with_statistics(network, statistics_of(network)):
        recalibrate(network, batches)
        yield


def _set(network: nn.Module, statistics: list[dict[str, Tensor]]) -> None:
    norms = [module for module in network.modules() if has_statistics(module)]
    for norm, buffers in zip(norms, statistics, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer)
