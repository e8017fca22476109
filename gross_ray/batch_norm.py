"""Statistics of batch-norm: those of a whole network do not fit each of the configurations that share its layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gross_ray.data.images import Splits

CALIBRATION_IMAGES = 512
"""Images of the training split from which statistics are taken."""


def calibration_images(splits: Splits) -> Tensor:
    """Return the images, uint8 (N, 3, H, W), from which statistics are taken: the first of the training split."""
    return splits.train.images[:CALIBRATION_IMAGES]


def has_statistics(module: nn.Module) -> bool:
    """Return whether a module is a batch-norm that keeps statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the statistics of every batch-norm by those of the responses to `batches`, as a network takes them.

    Each batch (N, C, H, W) counts alike; all else of the network, its modes too, is left as it is.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and has_statistics(module)]
    if not norms:
        return
    modes = {module: module.training for module in network.modules()}
    momenta = [norm.momentum for norm in norms]
    network.eval()
    try:
        for norm in norms:
            for name, buffer in norm.named_buffers(recurse=False):
                setattr(norm, name, torch.zeros_like(buffer))  # not in place: weights may be shared, and read-only
            norm.momentum = None  # the plain mean over batches
            norm.train()
        with torch.no_grad():
            for batch in batches:
                network(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
