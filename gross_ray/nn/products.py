"""A convolution as products of matrices, for stacks of networks, whose convolutions have very many groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d_by_products(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: str | tuple[int, ...] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return F.conv2d of the same arguments up to rounding: one product for each group.

    `images` (B, C, H, W), `weight` (C_out, C / groups, kH, kW); the result is (B, C_out, H', W'). The patches under the
    kernel are copied: kH * kW times the memory of the images. Under torch.func.vmap, with weights for each member of a
    stack, the products are those of one batched product.
    """
    out_channels, kernel = weight.shape[0], (weight.shape[2], weight.shape[3])
    images, sides = _padded(images, kernel, padding, dilation)
    height, width = (
        (images.shape[axis] + 2 * side - step * (size - 1) - 1) // apart + 1
        for axis, side, step, size, apart in zip((-2, -1), sides, dilation, kernel, stride, strict=True)
    )
    patches = F.unfold(images, kernel, dilation, sides, stride)  # (B, C * kH * kW, H' * W')
    of_groups = weight.reshape(groups, out_channels // groups, -1)
    products = torch.einsum("gok,bgkp->bgop", of_groups, patches.unflatten(1, (groups, -1)))
    output = products.flatten(1, 2).unflatten(-1, (height, width))
    return output if bias is None else output + bias[:, None, None]


def _padded(
    images: Tensor, kernel: tuple[int, int], padding: str | tuple[int, ...], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Return the images, padded if F.unfold cannot, and the zeros that F.unfold must add at each side."""
    if padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        top, left = (both // 2 for both in total)
        return F.pad(images, (left, total[1] - left, top, total[0] - top)), (0, 0)
    height, width = (0, 0) if isinstance(padding, str) else padding
    return images, (height, width)
