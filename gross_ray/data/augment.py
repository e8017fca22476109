"""Augmentation (section 4.2 of the paper) of a whole batch at once, on the device of the images.

Each image is zero-padded on every side; all (2 padding + 1)^2 crops of its own size are equally likely, and it is
flipped from left to right with probability 0.5. Shapes: N images, H height, W width; images are (N, 3, H, W).
"""

import torch
from torch import Tensor
from torch.nn import functional


def draw_crops(num_images: int, generator: torch.Generator, *, padding: int = 2) -> Tensor:
    """Draw each image's crop (top and left, 0 to 2 padding) and whether it is flipped: (3, N) int64, on the CPU."""
    num_offsets = 2 * padding + 1
    highs = (num_offsets, num_offsets, 2)
    return torch.stack([torch.randint(high, (num_images,), generator=generator) for high in highs])


def cropped_and_flipped(images: Tensor, crops: Tensor, *, padding: int = 2) -> Tensor:
    """Return zero-padded `images`, cropped and flipped by `crops` of `draw_crops` on the same device."""
    num_images, _, height, width = images.shape
    top_N, left_N, flip_N = crops
    padded = functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (N, 3, offset, offset, H, W): nothing is copied
    chosen = windows[torch.arange(num_images, device=images.device), :, top_N, left_N]
    return torch.where(flip_N.bool()[:, None, None, None], chosen.flip(3), chosen)
