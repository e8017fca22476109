"""Augmentation and normalisation of a whole batch at once, on the device where the images are.

Shapes: N images, H height, W width; images are (N, 3, H, W).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gross_ray.errors import InvalidValueError

MEAN = 0.5
DEVIATION = 0.225


@dataclass(frozen=True)
class Normalisation:
    """How pixels become what a network takes, channel by channel: (x / 255 - mean) / std.

    The paper (section 4.2) gives a mean of 0.5 and a "variance" of 0.225 for every channel. The latter is read as the
    standard deviation, as in common use: ImageNet's are 0.229, 0.224 and 0.225.
    """

    mean: tuple[float, ...] = (MEAN,)
    """One for all channels, or one for each; 0 is black, 1 is white."""
    std: tuple[float, ...] = (DEVIATION,)
    """One for all channels, or one for each; above 0."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, 3):
                rule = "must be one number, or one for each of the three channels"
                raise InvalidValueError(f"{name} = {getattr(self, name)}: {rule}")
        if not all(0 <= mean <= 1 for mean in self.mean):
            raise InvalidValueError(f"mean = {self.mean}: must be from 0 (black) to 1 (white)")
        if not all(0 < deviation < math.inf for deviation in self.std):  # this refuses nan too
            raise InvalidValueError(f"std = {self.std}: must be above 0, and finite")

    def __call__(self, images: Tensor) -> Tensor:
        """Return uint8 images (N, 3, H, W) normalised: of the same shape, float32, on the same device."""
        normalised = images.to(torch.float32).div_(255)
        if len(self.mean) == len(self.std) == 1:
            return normalised.sub_(self.mean[0]).div_(self.std[0])
        for channel in range(3):  # by numbers: a tensor of them would be copied to the device, and waited for
            mean, std = (values[channel % len(values)] for values in (self.mean, self.std))
            normalised[:, channel].sub_(mean).div_(std)
        return normalised


THE_PAPERS = Normalisation()
"""What holds where nothing else is said."""


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
