"""Psi: the weight of a grouped convolution, rewritten for a larger group-size (Eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from gross_ray.errors import InvalidValueError


def expand_grouped_weight(weight: Tensor, target_group_size: int) -> Tensor:
    """Return Psi of `weight`: the same convolution with fewer, larger groups (Eq. 5).

    `weight` is (C, g, kH, kW), of a grouped convolution with as many input as output channels (C) and group-size g.
    The result is (C, h, kH, kW) with h = `target_group_size`, zero wherever an output channel did not see an input
    channel before. Linear and differentiable. Raises InvalidValueError unless g divides h and h divides C.
    """
    channels, group_size, *kernel = weight.shape
    if target_group_size < 1 or target_group_size % group_size or channels % target_group_size:
        raise InvalidValueError(
            f"target_group_size (={target_group_size}) must be a multiple of the weight's group-size (={group_size}) "
            f"and divide its channels (={channels})"
        )
    if target_group_size == group_size:
        return weight
    merged = target_group_size // group_size
    # The old groups that share a new group stand on the diagonal of a (merged x merged) grid of blocks.
    blocks = weight.reshape(channels // target_group_size, merged, group_size, group_size, *kernel)
    grid = torch.diag_embed(blocks.movedim(1, -1), dim1=1, dim2=3)
    return grid.reshape(channels, target_group_size, *kernel)
