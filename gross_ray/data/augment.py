"""Random crops and flips of a whole batch at once, on the device of the images.

`draw` draws the random numbers of a whole epoch on the CPU; calling the augmentation applies those of a batch.
Shapes: N images; H, W height and width as networks take them; RH, RW those of the images from which crops are drawn;
images are (N, 3, RH, RW), uint8. In `resampling`, R is RH or RW, and S is H or W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 2
"""Zeros on every side of an image without a margin (section 4.2 of the paper)."""
AREA = (0.08, 1.0)
"""Least and greatest area of a resized crop, as a share of the image's."""
RATIO = (3 / 4, 4 / 3)
"""Least and greatest width of a resized crop, as a multiple of its height."""
TRIES = 10
"""How often a box is drawn until it fits the image; after that, the largest box at the centre with a ratio in RATIO."""
PIXELS_AT_ONCE = 2**20
"""Pixels that are resized at once: it bounds the memory for floating-point images and matrices."""

Size = Sequence[int]
"""Height and width."""


class Augmentation(Protocol):
    """Draws random numbers for images, and changes the images by them."""

    def draw(self, num_images: int, generator: torch.Generator) -> Tensor:
        """Return the random numbers of `num_images` images, (K, N) int64, on the CPU."""
        ...

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return `images` (N, 3, RH, RW) changed by `drawn` (K, N) on the same device: (N, 3, H, W), uint8."""
        ...


@dataclass(frozen=True)
class Crop:
    """A crop of the size that networks take, all positions equally likely, flipped with probability 0.5.

    Images of that very size have no margin to move in, and are zero-padded by PADDING first.
    """

    source: Size
    """RH and RW."""
    size: Size
    """H and W, at most RH and RW."""

    @property
    def padding(self) -> int:
        """The zeros on every side."""
        return PADDING if tuple(self.source) == tuple(self.size) else 0

    def draw(self, num_images: int, generator: torch.Generator) -> Tensor:
        """Draw top and left (in the padded image) and whether it is flipped: (3, N)."""
        offsets = [there + 2 * self.padding - wanted + 1 for there, wanted in zip(self.source, self.size, strict=True)]
        return torch.stack([torch.randint(high, (num_images,), generator=generator) for high in (*offsets, 2)])

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return the images cropped and flipped by `drawn` (3, N)."""
        top_N, left_N, flip_N = drawn
        height, width = self.size
        padded = functional.pad(images, (self.padding,) * 4) if self.padding else images
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (N, 3, top, left, H, W): nothing is copied
        chosen = windows[torch.arange(len(images), device=images.device), :, top_N, left_N]
        return torch.where(flip_N.bool()[:, None, None, None], chosen.flip(3), chosen)


@dataclass(frozen=True)
class ResizedCrop:
    """A crop of random area and aspect ratio, resized with antialiasing, flipped with probability 0.5.

    As torchvision.transforms.v2.RandomResizedCrop, followed by RandomHorizontalFlip, with their default values.
    """

    source: Size
    """RH and RW."""
    size: Size
    """H and W."""

    def draw(self, num_images: int, generator: torch.Generator) -> Tensor:
        """Draw each image's box (top, left, height, width) and whether it is flipped: (5, N)."""
        box_4N = _centred_box(self.source)[:, None].repeat(1, num_images)
        todo = torch.arange(num_images)
        for _ in range(TRIES):
            tried = _boxes(self.source, torch.rand(4, len(todo), generator=generator, dtype=torch.float64))
            sides = tried[2:]
            fits = (sides > 0).all(0) & (sides <= torch.tensor(self.source)[:, None]).all(0)
            box_4N[:, todo[fits]] = tried[:, fits]
            todo = todo[~fits]
        return torch.cat([box_4N, torch.randint(2, (1, num_images), generator=generator)])

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return the crops of `drawn` (5, N), resized and flipped."""
        part = max(1, PIXELS_AT_ONCE // math.prod(self.source))
        resized = [self._resized(*each) for each in zip(images.split(part), drawn.split(part, dim=1), strict=True)]
        return resized[0] if len(resized) == 1 else torch.cat(resized)

    def _resized(self, images: Tensor, drawn: Tensor) -> Tensor:
        top_N, left_N, height_N, width_N, flip_N = drawn
        rows = resampling(top_N, height_N, self.source[0], self.size[0])
        columns = resampling(left_N, width_N, self.source[1], self.size[1], flip_N.bool())
        # Two products of (W, RW) with (RW, 3 RH), and of (W 3, RH) with (RH, H), for each image.
        narrowed = torch.bmm(columns, images.to(columns.dtype).flatten(1, 2).mT)
        resized = torch.bmm(narrowed.unflatten(2, images.shape[1:3]).flatten(1, 2), rows.mT)
        pixels = resized.round_().to(torch.uint8).unflatten(1, (self.size[1], images.shape[1]))
        return pixels.permute(0, 2, 3, 1).contiguous()


def resampling(start: Tensor, length: Tensor, source: int, size: int, mirrored: Tensor | None = None) -> Tensor:
    """Return the matrices (N, `size`, `source`), float32, that resample each `length` pixels from `start` to `size`.

    `start` and `length` are (N,) int64; `mirrored`, (N,) bool, reverses the new pixels. The weights are those of
    bilinear interpolation with antialiasing in Pillow and torch: a triangle around the centre of each new pixel, as
    wide as two pixels of the coarser grid, cut off at the edges of the crop and normalised to a sum of 1.
    """
    index_R = torch.arange(source, device=start.device, dtype=torch.float32)
    new_S = torch.arange(size, device=start.device, dtype=torch.float32)
    start_N1, length_N1 = start.float()[:, None], length.float()[:, None]
    centre_NS = start_N1 + (new_S + 0.5) * length_N1 / size - 0.5
    if mirrored is not None:
        centre_NS = torch.where(mirrored[:, None], centre_NS.flip(1), centre_NS)
    outside_NR = (index_R < start_N1) | (index_R >= start_N1 + length_N1)
    index_NR = torch.where(outside_NR, torch.inf, index_R)  # too far from every centre to have a weight
    reach_N1 = (length_N1 / size).clamp(min=1)
    distance = (index_NR[:, None] - centre_NS[:, :, None]).abs_().div_(reach_N1[:, :, None])
    weights = distance.neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


def _boxes(source: Size, uniform_4N: Tensor) -> Tensor:
    """Return boxes (top, left, height, width), (4, N) int64, from numbers in [0, 1); some do not fit `source`."""
    height, width = source
    low, high = (math.log(ratio) for ratio in RATIO)
    area_N = height * width * (AREA[0] + (AREA[1] - AREA[0]) * uniform_4N[0])
    ratio_N = torch.exp(low + (high - low) * uniform_4N[1])
    height_N, width_N = (area_N / ratio_N).sqrt().round(), (area_N * ratio_N).sqrt().round()
    top_N = (uniform_4N[2] * (height - height_N + 1)).floor()
    left_N = (uniform_4N[3] * (width - width_N + 1)).floor()
    return torch.stack([top_N, left_N, height_N, width_N]).long()


def _centred_box(source: Size) -> Tensor:
    """Return the largest box with a ratio in RATIO at the centre of the image: (4,) int64."""
    height, width = source
    inner_height, inner_width = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return torch.tensor([(height - inner_height) // 2, (width - inner_width) // 2, inner_height, inner_width])
