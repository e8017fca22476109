"""Grey images, for networks that take one channel."""

from __future__ import annotations

import torch
from torch import Tensor

from gross_ray.data.image_set import ImageSet

_WEIGHTS = (19595, 38470, 7471)
"""Those of ITU-R 601, 0.299 R + 0.587 G + 0.114 B, in units of 1/65536, as Pillow takes them for its mode L."""
_IMAGES_AT_A_TIME = 4096


def grey(images: ImageSet) -> ImageSet:
    """Return the same images in grey, (N, 1, H, W), uint8."""
    stored = torch.cat([luminance(part) for part in images.stored.split(_IMAGES_AT_A_TIME)])
    return images.with_stored(stored, images.labels)


def luminance(images: Tensor) -> Tensor:
    """Return the luminance (N, 1, H, W) of RGB images (N, 3, H, W), both uint8, bit for bit as Pillow's mode L.

    The luminance of an image whose channels are equal is that channel.
    """
    weights = torch.tensor(_WEIGHTS, dtype=torch.int32, device=images.device)[:, None, None]
    return (((images * weights).sum(1, keepdim=True, dtype=torch.int32) + 32768) >> 16).to(torch.uint8)
