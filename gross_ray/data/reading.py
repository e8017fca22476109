"""Reading of images into arrays of one size, part by part: here, or by processes on all cores.

Shapes: n images in a part, C channels (3, or 1 for grey), RH and RW height and width of a stored image.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from gross_ray.data.decoding import PIL_ERRORS, decoded, fitted
from gross_ray.data.sizes import Sizes
from gross_ray.errors import DatasetError, one_line

Source = Path | bytes | np.ndarray
"""An image: its file, the content of its file, or its pixels (h, w, 3), uint8 RGB."""
SET_A_SIZE = "set the size to which all are resized, like data.image_size="


@dataclass(frozen=True)
class Part:
    """Images that one process reads one after another, not decoded yet."""

    count: int
    """How many images it has."""
    images: Callable[[], Iterable[tuple[str, Source]]]
    """Returns where each image is, for errors, and the image."""


@dataclass(frozen=True)
class Form:
    """What each stored image is."""

    channels: int
    """3 (RGB) or 1 (grey)."""
    sizes: Sizes
    """Its size, and the size that networks take."""
    resizes: bool = True
    """Whether images are resized; else each has to have the size already."""

    @property
    def resized_by(self) -> Sizes | None:
        """The sizes, if images are resized."""
        return self.sizes if self.resizes else None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, RH, RW)."""
        return self.channels, *self.sizes.stored

    def of(self, where: str, pixels: np.ndarray) -> np.ndarray:
        """Return an image (h, w, 3), uint8, as it is stored: (C, RH, RW); raises DatasetError for another size."""
        if self.resizes:
            pixels = fitted(pixels, self.sizes)
        elif pixels.shape[:2] != self.sizes.stored:
            (height, width), (tall, wide) = pixels.shape[:2], self.sizes.stored
            sizes = f"{where} has {height}x{width} pixels (height x width), the first image {tall}x{wide}"
            raise DatasetError(f"{sizes}; {SET_A_SIZE}{min(tall, wide)}")
        if self.channels == 1:
            return np.asarray(Image.fromarray(pixels).convert("L"))[None]
        return pixels.transpose(2, 0, 1)


@dataclass
class PartRead:
    """What happened as a part was read."""

    conversions: Counter[str] = field(default_factory=Counter)
    """How many images were converted, by the kind of conversion."""
    resized: int = 0
    """How many images had another size than they are stored in."""
    enlarged: int = 0
    """How many of these were smaller."""
    damaged: dict[int, str] = field(default_factory=dict)
    """Where the damaged images are, by their position in the part."""
    problem: str = ""
    """Why the reading has to stop; empty: it need not."""

    def count(self, pixels: np.ndarray, sizes: Sizes) -> None:
        """Count an image (h, w, 3) that is resized."""
        self.resized += pixels.shape[:2] != sizes.stored
        self.enlarged += any(size < stored for size, stored in zip(pixels.shape, sizes.stored, strict=False))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "conversions": dict(self.conversions),
            "resized": self.resized,
            "enlarged": self.enlarged,
            "damaged": list(self.damaged.items()),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PartRead:
        """Return what `to_dict` converted."""
        return cls(Counter(values["conversions"]), values["resized"], values["enlarged"], dict(values["damaged"]))


class Reader:
    """Reads parts into the arrays of the splits."""

    def __init__(
        self, name: str, parts: Sequence[Part], form: Form, rows: Sequence[np.ndarray], skip_damaged: bool
    ) -> None:
        """Prepare the reading of `parts`.

        `name` is the dataset's, for errors; `rows` are the images of each split in its order, (N_split,) indices into
        the images of all parts.
        """
        self._name, self._parts, self._form, self._skip_damaged = name, parts, form, skip_damaged
        self.starts = np.cumsum([0, *(part.count for part in parts)])
        """Number of images before each part."""
        self._split, self._position = (np.empty(self.starts[-1], np.int64) for _ in range(2))
        for split, indices in enumerate(rows):
            self._split[indices], self._position[indices] = split, np.arange(len(indices))

    def here(self, arrays: Sequence[np.ndarray]) -> list[PartRead]:
        """Read all parts, one after another; raises DatasetError for what cannot be read."""
        return [self._checked(self.read(number, arrays)) for number in range(len(self._parts))]

    def on_all_cores(self, numbers: Sequence[int], arrays: Sequence[np.ndarray]) -> Generator[tuple[int, PartRead]]:
        """Read parts in as many processes as there are cores; yield each when it is read, in the order of `numbers`.

        Close the generator after an error, so that the processes end. `arrays` are on memory that forked processes
        share, like that of a file. Raises as `here`.
        """
        reads = DataLoader(
            _Reads(self, numbers, arrays),
            batch_size=None,
            num_workers=(workers := min(processes(), len(numbers))),
            multiprocessing_context="fork" if workers else None,
            collate_fn=_unchanged,
        )
        iterator = iter(reads)
        try:
            for number, read in zip(numbers, iterator, strict=True):
                yield number, self._checked(read)
        finally:  # an error keeps the iterator alive, and with it the other processes
            if workers:
                iterator._shutdown_workers()  # type: ignore[attr-defined]

    def read(self, number: int, arrays: Sequence[np.ndarray]) -> PartRead:
        """Read one part; each image goes to its place in the array of its split, (N_split, C, RH, RW), uint8."""
        part, read, first = self._parts[number], PartRead(), int(self.starts[number])
        try:
            for position, (where, source) in enumerate(part.images()):
                try:
                    pixels, conversions = (source, []) if isinstance(source, np.ndarray) else decoded(source)
                except PIL_ERRORS as error:
                    if not self._skip_damaged:
                        remedy = "replace it, remove it, or pass over damaged images with data.skip_damaged=true"
                        raise DatasetError(
                            f"{self._name}: {where} cannot be read ({one_line(error)}); {remedy}"
                        ) from error
                    read.damaged[position] = where
                    continue
                read.conversions.update(conversions)
                read.count(pixels, self._form.sizes)
                row = first + position
                arrays[self._split[row]][self._position[row]] = self._form.of(self._named(where), pixels)
        except DatasetError as error:
            read.problem = str(error)
        return read

    def _checked(self, read: PartRead) -> PartRead:
        if read.problem:
            raise DatasetError(read.problem)
        return read

    def _named(self, where: str) -> str:
        return where if where.startswith(f"{self._name}, ") else f"{self._name}: {where}"

    def rearranged(
        self, arrays: Sequence[np.ndarray], rows: np.ndarray, target: np.ndarray | None = None
    ) -> np.ndarray:
        """Return, in `target` or new, the images at `rows`, indices into those of all parts: (N_rows, C, RH, RW)."""
        target = np.empty((len(rows), *self._form.shape), np.uint8) if target is None else target
        for position, row in enumerate(rows):
            target[position] = arrays[self._split[row]][self._position[row]]
        return target

    def kept(self, reads: Sequence[PartRead]) -> np.ndarray:
        """Return for each image whether it was read, (N,) bool."""
        kept = np.ones(self.starts[-1], bool)
        for start, read in zip(self.starts, reads, strict=False):
            kept[[start + position for position in read.damaged]] = False
        return kept


def processes() -> int:
    """Return how many processes read images: one for each core; 0 (this process reads) where none can be forked.

    Only forked processes write into the arrays of this one, and only on Linux can any process be forked safely.
    """
    if sys.platform != "linux":
        return 0
    try:
        multiprocessing.Semaphore()
    except OSError:  # a machine without shared memory for semaphores
        return 0
    return len(os.sched_getaffinity(0))


@contextmanager
def killed_processes(name: str) -> Iterator[None]:
    """Raise DatasetError if a process of `on_all_cores` is killed while the block runs; `name` is the dataset's.

    torch raises its RuntimeError from a signal handler, so anywhere in the block. A full memory kills a process.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        remedy = "look at the free memory and disk space, and load the dataset again: it goes on where it ended"
        raise DatasetError(f"{name}: a process that reads images was killed ({one_line(error)}); {remedy}") from error


class _Reads(Dataset[PartRead]):
    """The parts to read, as DataLoader takes them."""

    def __init__(self, reader: Reader, numbers: Sequence[int], arrays: Sequence[np.ndarray]) -> None:
        self._reader, self._numbers, self._arrays = reader, numbers, arrays

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> PartRead:
        return self._reader.read(self._numbers[index], self._arrays)


def _unchanged(value: Any) -> Any:
    return value
