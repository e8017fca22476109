"""Sizes of images: what networks take, and the larger size with a margin that is stored. Imports no torch.

Shapes: h and w height and width of an image as it was decoded, H and W of the network's input, RH and RW of the stored
image, of which the input is the centre or, in trainings, a crop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gross_ray.errors import InvalidValueError

_SIZE = re.compile(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?")
_MARGIN = 256 / 224
"""Stored size over input size, as is usual for ImageNet."""


@dataclass(frozen=True)
class Sizes:
    """The size of the network's input, and that of the stored images."""

    size: tuple[int, int]
    """Height and width (H, W) of the input."""
    stored: tuple[int, int]
    """Height and width (RH, RW) of the stored images: at least those of the input."""

    @classmethod
    def of(cls, size: tuple[int, int], resize: int) -> Sizes:
        """Return the sizes for inputs of `size` and a shorter side of the stored images of `resize` pixels."""
        shorter = min(size)
        height, width = (round(side * resize / shorter) for side in size)
        return cls(size, (height, width))

    @property
    def preparation(self) -> str:
        """How an image becomes an input of the network, for who uses it."""
        (tall, wide), (height, width) = self.stored, self.size
        centre = f"; then its centre of {height}x{width}" if self.stored != self.size else ", and its centre taken"
        return f"resized (bilinear, antialiased) until it just covers {tall}x{wide} pixels (height x width){centre}"

    def note(self, num_images: int, num_enlarged: int) -> str:
        """Return a line for the user about images that were resized, of which some were enlarged."""
        (tall, wide), (height, width) = self.stored, self.size
        crops = f", of which networks take {height}x{width}" if self.stored != self.size else ""
        order = " (height x width)" if tall != wide else ""
        enlarged = f"; {num_enlarged:,} of them were smaller" if num_enlarged else ""
        return f"resized {num_images:,} images to {tall}x{wide} pixels{order}{crops}{enlarged}"

    def kept(self, size: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
        """Return the size to which an image of `size` (h, w) is resized, and top and left of what is stored of it.

        The resized image just covers RH x RW pixels, and its centre of H x W pixels is also that of what is stored.
        """
        grid = _covering(size, self.stored)
        top, left = (
            _start(whole, wanted) - _start(stored, wanted)
            for whole, wanted, stored in zip(grid, self.size, self.stored, strict=True)
        )
        return grid, top, left


def parse_size(text: str) -> tuple[int, int] | None:
    """Return height and width of a size like 224 or 224x160, or None for an empty text; raises InvalidValueError."""
    if not text:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidValueError(
            f"data.image_size = {text!r}: must be a number of pixels like 224, or HEIGHTxWIDTH, each up to 99999"
        )
    height = int(match[1])
    return height, int(match[2] or height)


def size_text(size: Any) -> Any:
    """Return a size as its one text: 224 for 224, "224x224" and (224, 224). Other values are returned unchanged."""
    if isinstance(size, int) and not isinstance(size, bool):
        return str(size)
    if isinstance(size, tuple | list):
        size = "x".join(map(str, size))
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        return match[1] if match[2] in (None, match[1]) else f"{match[1]}x{match[2]}"
    return size


def usual_resize(size: tuple[int, int], shorter_sides: list[int]) -> int:
    """Return the shorter side for stored images, by the shorter sides of some images before they are resized.

    It is that of the input times 256/224; where none of the images is larger than the input, there is no margin.
    """
    shorter = min(size)
    return shorter if max(shorter_sides) <= shorter else round(shorter * _MARGIN)


def _covering(size: tuple[int, ...], stored: tuple[int, int]) -> tuple[int, int]:
    """Return the size to which an image of `size` is resized to cover `stored`, rounded down as torchvision does."""
    (height, width), (least_height, least_width) = size, stored
    if height * least_width <= width * least_height:
        return least_height, max(least_width, int(least_height * width / height))
    return max(least_height, int(least_width * height / width)), least_width


def _start(whole: int, wanted: int) -> int:
    return round((whole - wanted) / 2)
