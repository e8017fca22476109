"""Images and their classes in memory, and batches of them on a device.

Shapes: N images, B in a batch, H height, W width, RH and RW height and width with a margin around; images are
(N, 3, H, W).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gross_ray.data.normalisation import THE_PAPERS, Normalisation
from gross_ray.data.sizes import Sizes
from gross_ray.errors import InvalidValueError

T = TypeVar("T")

AHEAD = 2
"""How many batches of streamed images are prepared while the device works on one."""


@dataclass(frozen=True)
class MappedSplit:
    """The file of a split whose images are not in memory but mapped from it (`gross_ray.data.image_files`)."""

    root: str
    """Folder of datasets, like ~/.cache/gross_ray, on each machine."""
    key: str
    """Name of the folder with the dataset's files."""
    split: str
    """The split."""
    hash: str
    """The hash of the whole split (`gross_ray.data.identity`)."""
    count: int
    """Number of images of the whole split."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their classes, stored on a device or streamed to it from main memory."""

    images: Tensor
    """(N, 3, H, W), uint8, as networks take them."""
    labels: Tensor
    """(N,), int64: indices into `Splits.classes`, on the device of the images."""
    wider: Tensor | None = field(default=None, kw_only=True)
    """(N, 3, RH, RW), uint8: the same images with the margin from which trainings draw crops; `images` is its centre,
    a view. None: the images have no margin."""
    mapped: MappedSplit | None = field(default=None, kw_only=True)
    """The file whose first images these are; None: they are in memory."""
    normalisation: Normalisation = field(default=THE_PAPERS, kw_only=True)
    """Applied to the images in `as_inputs`."""
    streamed_to: torch.device | None = field(default=None, kw_only=True)
    """The device to which batches are copied; None if the images are already there."""
    memory_format: torch.memory_format = field(default=torch.channels_last, kw_only=True)
    """The memory format of `as_inputs`: torch.channels_last or torch.contiguous_format."""

    @classmethod
    def centred(cls, wider: Tensor, size: tuple[int, int], labels: Tensor) -> ImageSet:
        """Return the set of images of height and width `size` at the centre of `wider`, (N, 3, RH, RW), uint8."""
        if tuple(wider.shape[2:]) == size:
            return cls(wider, labels)
        return cls(centre(wider, size), labels, wider=wider)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def stored(self) -> Tensor:
        """The images with their margin, if they have one: (N, 3, RH, RW), uint8."""
        return self.images if self.wider is None else self.wider

    def with_stored(self, stored: Tensor, labels: Tensor) -> ImageSet:
        """Return a set of the same kind with other images, `stored` with the same margin, and labels."""
        if self.wider is None:
            return replace(self, images=stored, labels=labels, mapped=None)
        height, width = self.images.shape[2:]
        return replace(self, images=centre(stored, (height, width)), wider=stored, labels=labels, mapped=None)

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self.images.device if self.streamed_to is None else self.streamed_to

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the same set, stored on `device`."""
        return replace(self.with_stored(self.stored.to(device), self.labels.to(device)), streamed_to=None)

    def stream_to(self, device: torch.device | str) -> ImageSet:
        """Return the same set, streamed to `device` in batches, for images that do not fit its memory."""
        return replace(self, streamed_to=torch.device(device))

    def first(self, n: int) -> ImageSet:
        """Return the first `n` images, or all for 0; raises InvalidValueError if the set has fewer than `n`."""
        if not 0 <= n <= len(self):
            raise InvalidValueError(f"n = {n}: must be 0 (all) to {len(self)}, the number of images")
        if not n:
            return self
        return replace(self.with_stored(self.stored[:n], self.labels[:n]), mapped=self.mapped)

    def part(self, indices: Tensor) -> ImageSet:
        """Return the images at `indices`, (N_part,) int64, in that order."""
        return self.with_stored(self.stored[indices], self.labels[indices])

    def batches(
        self, size: int, order: Tensor | None = None, *, wider: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, 3, H, W), uint8, and labels (B,) on `device`; B is `size`, or less in the last batch.

        `order`, (M,) int64, lists the indices of the images; by default, all in their stored order. With `wider`, the
        images have their margin, if they have one: (B, 3, RH, RW). A thread gathers streamed batches ahead of the
        device, at most AHEAD of them.
        """
        source = self.stored if wider else self.images
        indices = None if order is None else order.to(source.device)
        array = None if self.streamed_to is None else source.numpy()

        def gather(number: int) -> tuple[Tensor, Tensor]:
            chosen: slice | Tensor = slice(number * size, (number + 1) * size)
            if indices is not None:
                chosen = indices[chosen]
            if array is not None and isinstance(chosen, Tensor):
                # By NumPy: torch would use as many threads again as the step does, and the step would wait for them.
                return torch.from_numpy(array[chosen.numpy()]), self.labels[chosen]
            return source[chosen], self.labels[chosen]

        count = -(-len(self if indices is None else indices) // size)
        if self.streamed_to is None:
            yield from map(gather, range(count))
            return
        pinned = self.streamed_to.type == "cuda"  # only copies from pinned memory overlap with the device's work

        def gather_for_copy(number: int) -> tuple[Tensor, Tensor]:
            images, labels = gather(number)
            return (images.pin_memory(), labels.pin_memory()) if pinned else (images, labels)

        for images, labels in ahead(gather_for_copy, count):
            yield images.to(self.streamed_to, non_blocking=pinned), labels.to(self.streamed_to, non_blocking=pinned)

    def as_inputs(self, images: Tensor) -> Tensor:
        """Return uint8 images (B, 3, H, W) as network inputs: normalised, in `memory_format`."""
        return self.normalisation(images).contiguous(memory_format=self.memory_format)


@dataclass(frozen=True, eq=False)
class Splits:
    """The three disjoint splits of a dataset: validation selects, test is only reported."""

    name: str
    """The dataset's name, as in `DataOptions.name`."""
    train: ImageSet
    """Images for training."""
    validation: ImageSet
    """Images for selection."""
    test: ImageSet
    """Images for the report only."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    notes: tuple[str, ...] = ()
    """Lines for the user about what was read, converted and passed over."""
    sizes: Sizes | None = None
    """How images are resized; None: they have the size that they had."""


def tensor_of(array: np.ndarray) -> Tensor:
    """Return an array that must not be written to, of a file or Ray's object store, as a tensor on the same memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def centre(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the view of height and width `size` at the centre of `images` (..., H, W), as torchvision's CenterCrop."""
    top, left = (round((there - wanted) / 2) for there, wanted in zip(images.shape[-2:], size, strict=True))
    return images[..., top : top + size[0], left : left + size[1]]


def ahead(make: Callable[[int], T], count: int) -> Iterator[T]:
    """Yield make(0) to make(count - 1) in order, computed by a thread up to AHEAD results in advance.

    An error of `make` is raised in place of its result; the thread ends with the iteration.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="images") as maker:
        made: deque[Future[T]] = deque(maker.submit(make, number) for number in range(min(AHEAD, count)))
        for number in range(count):
            result = made.popleft().result()
            if number + AHEAD < count:
                made.append(maker.submit(make, number + AHEAD))
            yield result
