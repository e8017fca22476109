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

    `images` (B, C, H, W), `weight` (C_out, C / groups, kH, kW); the result is (B, C_out, H', W'). The pixels under each
    element of the kernel are copied, which takes kH * kW times the memory of the result's positions. Under
    torch.func.vmap, with weights for each member of a stack, the products of all members are one batched product.
    """
    out_channels, kernel = weight.shape[0], (weight.shape[2], weight.shape[3])
    pixels = _under_kernel(_padded(images, kernel, padding, dilation), kernel, stride, dilation)
    size = pixels.shape[-2:]
    columns = pixels.flatten(-2).flatten(1, 2).unflatten(1, (groups, -1))  # (B, groups, C / groups * kH * kW, H' * W')
    products = torch.einsum("gok,bgkp->bgop", weight.reshape(groups, out_channels // groups, -1), columns)
    output = products.flatten(1, 2).unflatten(-1, size)
    return output if bias is None else output + bias[:, None, None]


def _padded(
    images: Tensor, kernel: tuple[int, int], padding: str | tuple[int, ...], dilation: tuple[int, int]
) -> Tensor:
    """Return the images with zeros around them, as F.conv2d pads them."""
    if padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        top, left = (both // 2 for both in total)
        return F.pad(images, (left, total[1] - left, top, total[0] - top))
    height, width = (0, 0) if isinstance(padding, str) else padding
    return F.pad(images, (width, width, height, height)) if height or width else images


def _under_kernel(
    images: Tensor, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Return what each element of the kernel sees, (B, C, kH * kW, H', W').

    F.unfold returns the same, but on CUDA it starts a kernel for each image.
    """
    rows, columns = (
        [slice(step * place, side - step * (size - 1 - place), apart) for place in range(size)]
        for step, size, side, apart in zip(dilation, kernel, images.shape[-2:], stride, strict=True)
    )
    return torch.stack([images[..., row, column] for row in rows for column in columns], dim=-3)
