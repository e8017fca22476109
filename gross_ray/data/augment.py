"""Augmentation and normalisation of a whole batch at once, on the device where the images are.

Shapes: N images, H height, W width; images are (N, 3, H, W).
"""

import torch
from torch import Tensor
from torch.nn import functional


def augment(images: Tensor, generator: torch.Generator, *, padding: int = 2) -> Tensor:
    """Return a random crop of each zero-padded image, flipped from left to right with probability 0.5.

    `images` is (N, 3, H, W), uint8, on any device; the result has the same shape, type and device. Each image is
    padded by `padding` on every side, and all of its (2 padding + 1)^2 crops of HxW are equally likely. `generator`,
    the source of all randomness, is on the CPU, so that every device sees the same crops. The paper's section 4.2.
    """
    crops = draw_crops(len(images), generator, padding=padding)
    return cropped_and_flipped(images, crops.to(images.device), padding=padding)


def draw_crops(num_images: int, generator: torch.Generator, *, padding: int = 2) -> Tensor:
    """Draw each image's crop, top and left from 0 to 2 padding, and whether it is flipped: (3, N) int64."""
    num_offsets = 2 * padding + 1
    highs = (num_offsets, num_offsets, 2)
    return torch.stack([torch.randint(high, (num_images,), generator=generator) for high in highs])


def cropped_and_flipped(images: Tensor, crops: Tensor, *, padding: int = 2) -> Tensor:
    """Return the crops (3, N), as `draw_crops` gives them, of zero-padded `images` (N, 3, H, W), on their device."""
    num_images, _, height, width = images.shape
    top_N, left_N, flip_N = crops
    padded = functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (N, 3, offset, offset, H, W): nothing is copied
    chosen = windows[torch.arange(num_images, device=images.device), :, top_N, left_N]
    return torch.where(flip_N.bool()[:, None, None, None], chosen.flip(3), chosen)
