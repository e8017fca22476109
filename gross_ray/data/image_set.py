"""Images and their classes in memory, and the batches in which a device takes them.

Shapes: N images, B of a batch, H height, W width; images are (N, 3, H, W).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from gross_ray.data.normalisation import THE_PAPERS, Normalisation
from gross_ray.errors import InvalidValueError

T = TypeVar("T")

AHEAD = 2
"""Batches that are made ready while the device works on one; of streamed images no more than these are on their way."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their classes: residing on a device, or streamed to it from the memory of its machine."""

    images: Tensor
    """(N, 3, H, W), uint8."""
    labels: Tensor
    """(N,), int64: positions in `Splits.classes`. Where the images are."""
    normalisation: Normalisation = field(default=THE_PAPERS, kw_only=True)
    """How a network takes the images."""
    streamed_to: torch.device | None = field(default=None, kw_only=True)
    """The device that takes the batches, where the images do not reside on it."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.images.device if self.streamed_to is None else self.streamed_to

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the same set, residing on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), streamed_to=None)

    def stream_to(self, device: torch.device | str) -> ImageSet:
        """Return the same set, of which only batches go to `device`: for images that are more than its memory."""
        return replace(self, streamed_to=torch.device(device))

    def first(self, n: int) -> ImageSet:
        """Return the first `n` images, or all for 0; raises InvalidValueError where there are fewer than `n`."""
        if not 0 <= n <= len(self):
            raise InvalidValueError(f"n = {n}: must be 0 (all) to {len(self)}, the number of images there are")
        return replace(self, images=self.images[:n], labels=self.labels[:n]) if n else self

    def part(self, places: Tensor) -> ImageSet:
        """Return the images at `places`, (N_part,) int64, in their order."""
        return replace(self, images=self.images[places], labels=self.labels[places])

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, 3, H, W), uint8, and labels (B,) on `device`, B = `size` but for the last.

        `order` is (M,), int64, the places of some images one after the other; without, all as they are. Streamed
        batches are gathered by a thread while the device works on those before, AHEAD of them at most.
        """
        places = None if order is None else order.to(self.images.device)

        def gather(number: int) -> tuple[Tensor, Tensor]:
            chosen: slice | Tensor = slice(number * size, (number + 1) * size)
            if places is not None:
                chosen = places[chosen]
            return self.images[chosen], self.labels[chosen]

        count = -(-len(self if places is None else places) // size)
        if self.streamed_to is None:
            yield from map(gather, range(count))
            return
        # Only from memory that is locked does a copy go on beside the device's work.
        locked = self.streamed_to.type == "cuda"

        def gather_for_copy(number: int) -> tuple[Tensor, Tensor]:
            images, labels = gather(number)
            return (images.pin_memory(), labels.pin_memory()) if locked else (images, labels)

        for images, labels in ahead(gather_for_copy, count):
            yield (
                images.to(self.streamed_to, non_blocking=locked),
                labels.to(self.streamed_to, non_blocking=locked),
            )

    def as_inputs(self, images: Tensor) -> Tensor:
        """Return uint8 images (B, 3, H, W) as a network takes them: normalised, channels last."""
        return self.normalisation(images).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class Splits:
    """A dataset in its three disjoint splits. Validation selects, test is only reported."""

    name: str
    """The dataset's name, as in `DataOptions.name`."""
    train: ImageSet
    """Images to learn from."""
    validation: ImageSet
    """Images to select by."""
    test: ImageSet
    """Images that choose nothing."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""


def ahead(make: Callable[[int], T], count: int) -> Iterator[T]:
    """Yield make(0) to make(count - 1) in order, made by a thread, at most AHEAD of them before they are wanted.

    An error of `make` is raised where its result is wanted; the thread ends with the iteration.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="images") as maker:
        made: deque[Future[T]] = deque(maker.submit(make, number) for number in range(min(AHEAD, count)))
        for number in range(count):
            result = made.popleft().result()
            if number + AHEAD < count:
                made.append(maker.submit(make, number + AHEAD))
            yield result
