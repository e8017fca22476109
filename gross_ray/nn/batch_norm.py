"""Batch-norm statistics: a supernet's do not fit the configurations that share its layers, so recompute them."""

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
"""Number of training images from which statistics are computed."""
CALIBRATION_BATCH = 128
"""Largest batch of them: its statistics are like those of a training step, and memory is bounded."""


class TrainingImages(Protocol):
    """The part of an `ImageSet` that `calibration_images` needs."""

    @property
    def images(self) -> Tensor:
        """(N, 3, H, W), uint8."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of its batches."""
        ...


def calibration_images(train: TrainingImages) -> Tensor:
    """Return the first images of the training split, uint8 (N, 3, H, W): statistics are computed from these."""
    return train.images[:CALIBRATION_IMAGES].to(train.device)


def calibration_batches(images: Tensor) -> tuple[Tensor, ...]:
    """Split calibration images (N, ...) into batches of about equal size, at most CALIBRATION_BATCH images each."""
    return images.chunk(-(-len(images) // CALIBRATION_BATCH))


def has_statistics(module: nn.Module) -> bool:
    """Return whether a module is a batch-norm with running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace every batch-norm's statistics by those of the responses to `batches`, the network's inputs.

    Each batch (N, C, H, W) has the same weight; everything else in the network stays unchanged, also its modes. Unless
    autocast is on, products are in full float32, as in the evaluation of accuracies.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and has_statistics(module)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        with evaluating(network), torch.no_grad(), products_at("float32", next(norms[0].buffers()).device):
            for norm in norms:
                for name, buffer in norm.named_buffers(recurse=False):
                    setattr(norm, name, torch.zeros_like(buffer))  # not in place: buffers may be shared and read-only
                norm.momentum = None  # the plain mean over batches
                norm.train()
            for batch in batches:
                network(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def as_if_trained(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw running means, in place, and return the network: without a shift, an exporter leaves out an addition."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(std=0.1, generator=generator)
    return network


def statistics_of(network: nn.Module) -> list[dict[str, Tensor]]:
    """Return the statistics of every batch-norm of `network`, in layer order, as buffers by name."""
    return [dict(norm.named_buffers(recurse=False)) for norm in network.modules() if has_statistics(norm)]


@contextmanager
def with_statistics(network: nn.Module, statistics: list[dict[str, Tensor]]) -> Iterator[None]:
    """Use `statistics`, from `statistics_of`, in `network` within the block; restore its own afterwards."""
    before = statistics_of(network)
    _set(network, statistics)
    try:
        yield
    finally:
        _set(network, before)


@contextmanager
def recalibrated(network: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Use the statistics that `recalibrate` computes within the block; restore the earlier ones afterwards."""
    with with_statistics(network, statistics_of(network)):
        recalibrate(network, batches)
        yield


def _set(network: nn.Module, statistics: list[dict[str, Tensor]]) -> None:
    norms = [module for module in network.modules() if has_statistics(module)]
    for norm, buffers in zip(norms, statistics, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer)
