"""Labelled images, from files or rows of tables, read into splits of uint8 images of one size.

Shapes: N images, H height, W width; images are (N, 3, H, W).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from gross_ray.data.decoding import PIL_ERRORS, decoded
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.splitting import in_three
from gross_ray.errors import DatasetError, one_line

NAMED = 5
"""Maximum number of files, folders and classes that a line names."""


@dataclass(frozen=True)
class Labelled:
    """The images of one split, not decoded yet."""

    name: str
    """The split's name in the dataset, like val."""
    labels: Sequence[int]
    """The class of each image, an index into the names of the classes."""
    images: Callable[[], Iterable[tuple[str, Path | bytes]]]
    """Returns where each image is, for errors, and its file or the content of its file."""


@dataclass
class PassedOver:
    """What was not read, and why."""

    unit: str
    """What is counted, like file."""
    reasons: Counter[str] = field(default_factory=Counter)
    """How many, by the reason, like .txt."""
    damaged: list[str] = field(default_factory=list)
    """Where the damaged images are."""

    def text(self) -> str:
        """Return the counts and reasons, or nothing if all was read."""
        number = sum(self.reasons.values()) + len(self.damaged)
        if not number:
            return ""
        parts = [f"{count:,} {reason}" for reason, count in self.reasons.most_common()]
        if self.damaged:
            parts.append(f"{len(self.damaged):,} damaged ({listed(self.damaged)})")
        return f"; passed over {number:,} {self.unit}{'s' * (number > 1)}: {', '.join(parts)}"


def read_labelled(
    name: str, found: Mapping[str, Labelled], classes: Sequence[str], passed_over: PassedOver, *, skip_damaged: bool
) -> Splits:
    """Decode the images of each split and make the three splits of them, with notes about all that was done.

    `found` has the key train, and any of validation and test. A damaged image is passed over if `skip_damaged` is true.
    Raises DatasetError, naming the file, for a damaged image and for one of another size, and for classes on which
    nothing can be learnt.
    """
    missing = check_classes(name, found, classes)
    reader = _Reader(name, passed_over, skip_damaged)
    pools = {split: reader.read(labelled) for split, labelled in found.items()}
    if passed_over.damaged:
        kept = {split: replace(found[split], labels=pool.labels.tolist()) for split, pool in pools.items()}
        missing = check_classes(name, kept, classes)
    splits = in_three(name, pools, tuple(classes), {split: each.name for split, each in found.items()})
    number = sum(map(len, pools.values()))
    read = f"read {number:,} images of {len(classes)} classes{passed_over.text()}"
    converted = [f"{count:,} {kind}" for kind, count in reader.conversions.most_common()]
    conversions = [f"converted to 8-bit RGB: {', '.join(converted)}"] if converted else []
    return replace(splits, notes=(read, *conversions, *missing, *splits.notes))


def check_classes(name: str, found: Mapping[str, Labelled], classes: Sequence[str]) -> list[str]:
    """Return a line for each split without images of a class.

    Raises DatasetError for an empty split, for images of one class only, and for a class without training images.
    """
    present = {split: set(each.labels) for split, each in found.items()}
    for split, labels in present.items():
        if not labels:
            raise DatasetError(f"{name}: {found[split].name} has no images; add some, or remove it")
    every = set[int]().union(*present.values())
    if len(every) == 1:
        raise DatasetError(f"{name}: all images are of one class, {classes[every.pop()]}; two or more are needed")
    if unlearnt := sorted(every - present["train"]):
        names, train = _named(classes, unlearnt), found["train"].name
        having = next(found[split].name for split, labels in present.items() if labels & {*unlearnt})
        raise DatasetError(f"{name}: {having} has images of {names}, and {train} has none; add some to {train}")
    missing = {found[split].name: sorted({*range(len(classes))} - labels) for split, labels in present.items()}
    return [f"{split} has no image of {_named(classes, labels)}" for split, labels in missing.items() if labels]


def listed(names: Sequence[str]) -> str:
    """Return the first names and the number of the others."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _named(classes: Sequence[str], labels: Iterable[int]) -> str:
    return listed([classes[label] for label in labels])


class _Reader:
    """Decodes images of one size, and counts their conversions. In one thread: Pillow decodes no faster with two."""

    def __init__(self, name: str, passed_over: PassedOver, skip_damaged: bool) -> None:
        self.conversions: Counter[str] = Counter()
        self._name, self._passed_over, self._skip_damaged = name, passed_over, skip_damaged
        self._shape: tuple[int, ...] = ()

    def read(self, labelled: Labelled) -> ImageSet:
        """Return the images of one split, without damaged ones."""
        kept: list[int] = []
        images = np.empty(0, np.uint8)
        for index, (where, source) in enumerate(labelled.images()):
            try:
                pixels, conversions = decoded(source)
            except PIL_ERRORS as error:
                self._damaged(where, error)
                continue
            self.conversions.update(conversions)
            self._check_size(where, pixels.shape)
            if not kept:
                images = np.empty((len(labelled.labels), 3, *self._shape[:2]), np.uint8)
            images[len(kept)] = pixels.transpose(2, 0, 1)
            kept.append(index)
        if not kept:
            damaged = listed(self._passed_over.damaged)
            raise DatasetError(f"{self._name}: all images of {labelled.name} are damaged ({damaged}); replace them")
        labels = torch.tensor(labelled.labels, dtype=torch.int64)
        return ImageSet(torch.from_numpy(images[: len(kept)]), labels[torch.tensor(kept)])

    def _damaged(self, where: str, error: Exception) -> None:
        if not self._skip_damaged:
            remedy = "replace it, remove it, or pass over damaged images with data.skip_damaged=true"
            raise DatasetError(f"{self._name}: {where} cannot be read ({one_line(error)}); {remedy}") from error
        self._passed_over.damaged.append(where)

    def _check_size(self, where: str, shape: tuple[int, ...]) -> None:
        self._shape = self._shape or shape
        if shape != self._shape:
            (height, width), (before, beside) = shape[:2], self._shape[:2]
            sizes = f"{where} is {width}x{height} pixels, the images before it {beside}x{before}"
            raise DatasetError(f"{self._name}: {sizes}; resize all images to one size")
