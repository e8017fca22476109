"""Psi: the weight of a grouped convolution, rewritten for a larger group-size (Eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gross_ray.errors import InvalidValueError


def expand_grouped_weight(weight: Tensor, target_group_size: int) -> Tensor:
    """Return Psi of `weight`: the same convolution with fewer, larger groups (Eq. 5).

    `weight` is (C, g, kH, kW), of a grouped convolution with as many input as output channels (C) and group-size g.
    The result is (C, h, kH, kW) with h = `target_group_size`, zero for every pair of channels that the original does
    not connect. Linear and differentiable. Raises InvalidValueError unless g divides h and h divides C.
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
    # The old groups of one new group lie on the diagonal of a (merged x merged) grid of blocks.
    blocks = weight.reshape(channels // target_group_size, merged, group_size, group_size, *kernel)
    grid = torch.diag_embed(blocks.movedim(1, -1), dim1=1, dim2=3)
    return grid.reshape(channels, target_group_size, *kernel)


def sum_of_expansions(weights: Sequence[Tensor]) -> Tensor:
    """Return the sum of grouped weights (C, g_k, kH, kW), each expanded to the largest group-size by Psi (Eq. 6).

    Group-sizes ascend, and each divides the next. Linear and differentiable. Ten weights take as many kernels as two:
    on a GPU a loop over the weights would cost more than the convolution.
    """
    if len(weights) == 1:
        return weights[0]
    channels = weights[0].shape[0]
    sizes = tuple(weight.shape[1] for weight in weights)
    columns, seen = _layout(channels, sizes, weights[0].device)
    copies = torch.cat(list(weights), dim=1).index_select(1, columns)
    copies = copies.view(channels, len(sizes), sizes[-1], *weights[0].shape[2:])
    return torch.where(seen, copies, 0).sum(dim=1)


@lru_cache(maxsize=256)
def _layout(channels: int, sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the columns to copy and the mask to apply in `sum_of_expansions` (G: the largest group-size).

    The columns (K G,) are indices into the concatenated weights, one for each weight k and input channel a. The mask
    (C, K, G, 1, 1) says whether output channel c sees input channel a in weight k. Channels count within their group.
    """
    with torch.inference_mode(False):  # cached for later calls, which may need gradients
        largest = sizes[-1]
        size_K1 = torch.tensor(sizes)[:, None]
        input_G = torch.arange(largest)
        starts_K1 = size_K1.cumsum(0) - size_K1
        columns = (starts_K1 + input_G % size_K1).flatten()
        output_C11 = (torch.arange(channels) % largest)[:, None, None]
        seen = output_C11 // size_K1 == input_G // size_K1
        return columns.to(device), seen[..., None, None].to(device)
