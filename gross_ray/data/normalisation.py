"""Normalisation of pixels. Imports no torch, because options are checked with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gross_ray.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor

MEAN = 0.5
DEVIATION = 0.225


@dataclass(frozen=True)
class Normalisation:
    """Normalises each channel of uint8 pixels x to (x / 255 - mean) / std.

    The paper (section 4.2) gives a mean of 0.5 and a "variance" of 0.225 for every channel. We read the latter as the
    standard deviation, as is common: ImageNet's are 0.229, 0.224 and 0.225.
    """

    mean: tuple[float, ...] = (MEAN,)
    """One mean for all channels, or one for each; 0 is black, 1 is white."""
    std: tuple[float, ...] = (DEVIATION,)
    """One standard deviation for all channels, or one for each; above 0."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, 3):
                rule = "must be one number, or one for each of the three channels"
                raise InvalidValueError(f"{name} = {getattr(self, name)}: {rule}")
        if not all(0 <= mean <= 1 for mean in self.mean):
            raise InvalidValueError(f"mean = {self.mean}: must be from 0 (black) to 1 (white)")
        if not all(0 < deviation < math.inf for deviation in self.std):  # refuses nan too
            raise InvalidValueError(f"std = {self.std}: must be above 0, and finite")

    def __call__(self, images: Tensor) -> Tensor:
        """Return uint8 images (N, 3, H, W) normalised: float32, same shape and device."""
        normalised = images.float().div_(255)
        if len(self.mean) == len(self.std) == 1:
            return normalised.sub_(self.mean[0]).div_(self.std[0])
        for channel in range(3):  # Python numbers, because copying a tensor of them to the device would block
            mean, std = (values[channel % len(values)] for values in (self.mean, self.std))
            normalised[:, channel].sub_(mean).div_(std)
        return normalised


THE_PAPERS = Normalisation()
"""The default: the paper's normalisation."""
