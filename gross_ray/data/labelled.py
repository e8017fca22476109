"""Labelled images, from files or rows of tables, read into splits of uint8 images of one size.

Shapes: N images, C channels, RH and RW height and width of a stored image; stored images are (N, C, RH, RW).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gross_ray.data.decoding import PIL_ERRORS, decoded
from gross_ray.data.identity import SPLITS
from gross_ray.data.image_files import ImageFiles, Reading
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.options import DataOptions, check_limit
from gross_ray.data.reading import Form, Part, PartRead, Reader, Source
from gross_ray.data.sizes import Sizes, parse_size, usual_resize
from gross_ray.data.splitting import Arrangement, arranged, repeated_line
from gross_ray.errors import DatasetError

NAMED = 5
"""Maximum number of files, folders and classes that a line names."""
LOOKED_AT = 100
"""How many images decide whether images are larger than the network's input."""


@dataclass(frozen=True)
class Labelled:
    """The images of one split, not decoded yet."""

    name: str
    """The split's name in the dataset, like val."""
    labels: Sequence[int]
    """The class of each image, an index into the names of the classes."""
    parts: Sequence[Part]
    """The images, in the order of the labels."""
    signature: Callable[[], Any]
    """Returns plain values for JSON that change if the images do, like the files' sizes and times."""


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
    name: str,
    found: Mapping[str, Labelled],
    classes: Sequence[str],
    passed_over: PassedOver,
    how: Reading,
    files: ImageFiles | None = None,
) -> Splits:
    """Decode the images of each split, in the size of the options, and make the three splits, with notes.

    `found` has the key train, and any of validation and test. What memory holds is read by this process; more than that
    is read into files once, by all cores (`Reading`); with `files`, all is read into these. A damaged image is passed
    over if the options say so. Raises DatasetError, naming the file, for a damaged image and for one of another size,
    for classes on which nothing can be learnt, and for files that cannot be written.
    """
    dataset = _Dataset(name, found, tuple(classes), passed_over, how.options)
    if files is None and how.fits(dataset.nbytes):
        return dataset.in_memory()
    return dataset.in_files(files or ImageFiles.of(how.root, dataset.key()), how)


class _Dataset:
    """The images of all splits, not decoded yet, and how they become the three splits."""

    def __init__(
        self,
        name: str,
        found: Mapping[str, Labelled],
        classes: tuple[str, ...],
        passed_over: PassedOver,
        options: DataOptions,
    ) -> None:
        self._missing = check_classes(name, found, classes)
        self._name, self._classes, self._passed_over, self._options = name, classes, passed_over, options
        self._found = {split: found[split] for split in SPLITS if split in found}
        labels = {split: torch.tensor(each.labels, dtype=torch.int64) for split, each in self._found.items()}
        self._labels = torch.cat([*labels.values()])
        self._order = self._arranged(labels)
        for split, rows in self._order.rows.items():
            check_limit(name, split, len(rows), options)  # before the reading, which may take hours
        parts = [part for each in self._found.values() for part in each.parts]
        self._form = form_of(parts, options)
        arrays = [each.numpy() for each in self._order.rows.values()]
        self._reader = Reader(name, parts, self._form, arrays, options.skip_damaged)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the stored images."""
        return len(self._labels) * math.prod(self._form.shape)

    def in_memory(self) -> Splits:
        """Read all images in this process."""
        arrays = [np.empty((len(rows), *self._form.shape), np.uint8) for rows in self._order.rows.values()]
        order, notes = self._summary(self._reader.here(arrays))
        if order is not self._order:
            arrays = [self._reader.rearranged(arrays, rows.numpy()) for rows in order.rows.values()]
        train, validation, test = (
            ImageSet.centred(torch.from_numpy(array), self._form.sizes.size, self._labels[rows])
            for array, rows in zip(arrays, order.rows.values(), strict=True)
        )
        splits = Splits(self._name, train, validation, test, self._classes, sizes=self._form.resized_by)
        return replace(splits, notes=(*notes, *repeated_line(splits)))

    def in_files(self, files: ImageFiles, how: Reading) -> Splits:
        """Read all images into files in processes on all cores, if the files are not there yet."""
        with files.locked(how.note):
            if not files.complete(how.note):
                counts = {split: len(rows) for split, rows in self._order.rows.items()}
                order, notes = self._summary(files.read(self._name, self._reader, counts, self._form, how))
                if order is not self._order:
                    files.rearrange(self._reader, {split: rows.numpy() for split, rows in order.rows.items()})
                labels = {split: self._labels[rows] for split, rows in order.rows.items()}
                files.finish(labels, self._classes, notes)
        return files.splits(self._name)

    def key(self) -> dict[str, Any]:
        """Return what the stored images depend on."""
        return {
            "images": {split: each.signature() for split, each in self._found.items()},
            "labels": {split: list(each.labels) for split, each in self._found.items()},
            "classes": self._classes,
            "form": [*self._form.shape, *self._form.sizes.size],
            "options": [self._options.validation_from, self._options.skip_damaged],
        }

    def _summary(self, reads: Sequence[PartRead]) -> tuple[Arrangement, list[str]]:
        """Return the arrangement of the images that were read, and the notes.

        It is that of the same dataset without the damaged images. Raises DatasetError if nothing can be learnt from it.
        """
        kept = torch.from_numpy(self._reader.kept(reads))
        self._passed_over.damaged = [where for read in reads for where in read.damaged.values()]
        order, missing = self._order, self._missing
        if self._passed_over.damaged:
            order, missing = self._without_damaged(kept)
        read = f"read {int(kept.sum()):,} images of {len(self._classes)} classes{self._passed_over.text()}"
        return order, [read, *changes(reads, self._form), *missing, order.note]

    def _without_damaged(self, kept: Tensor) -> tuple[Arrangement, list[str]]:
        counts = [len(each.labels) for each in self._found.values()]
        of_splits = zip(self._found, kept.split(counts), self._labels.split(counts), strict=True)
        labels = {split: labels[read] for split, read, labels in of_splits}
        left = {split: replace(each, labels=labels[split].tolist()) for split, each in self._found.items()}
        for each in left.values():
            if not each.labels:
                text = f"all images of {each.name} are damaged ({listed(self._passed_over.damaged)}); replace them"
                raise DatasetError(f"{self._name}: {text}")
        order, read = self._arranged(labels), kept.nonzero().flatten()
        moved = replace(order, rows={split: read[rows] for split, rows in order.rows.items()})
        return moved, check_classes(self._name, left, self._classes)

    def _arranged(self, labels: Mapping[str, Tensor]) -> Arrangement:
        names = {split: each.name for split, each in self._found.items()}
        return arranged(labels, names, validation_from=self._options.validation_from)


def changes(reads: Sequence[PartRead], form: Form) -> list[str]:
    """Return a line about images that were converted, and one about images that were resized, if there were any."""
    conversions = sum((read.conversions for read in reads), Counter[str]())
    converted = [f"{count:,} {kind}" for kind, count in conversions.most_common()]
    resized, enlarged = (sum(getattr(read, name) for read in reads) for name in ("resized", "enlarged"))
    notes = [f"converted to 8-bit RGB: {', '.join(converted)}"] if converted else []
    return [*notes, form.sizes.note(resized, enlarged)] if resized else notes


def form_of(parts: Sequence[Part], options: DataOptions) -> Form:
    """Return the form of the stored images, by the options and the first images that can be decoded."""
    size = parse_size(options.image_size)
    if size is not None and options.resize:
        return Form(options.channels, Sizes.of(size, options.resize))
    images = chain.from_iterable(part.images() for part in parts)
    shapes = [*islice(_shapes(images), 1 if size is None else LOOKED_AT)] or [(1, 1)]  # all damaged: reported later
    if size is None:
        return Form(options.channels, Sizes(shapes[0], shapes[0]), resizes=False)
    return Form(options.channels, Sizes.of(size, usual_resize(size, [min(shape) for shape in shapes])))


def _shapes(images: Iterable[tuple[str, Source]]) -> Iterator[tuple[int, int]]:
    for _, source in images:
        try:
            height, width = (source if isinstance(source, np.ndarray) else decoded(source)[0]).shape[:2]
        except PIL_ERRORS:  # reported, or passed over, when all images are read
            continue
        yield height, width


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
