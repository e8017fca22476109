"""The user's own datasets: read what a function `package.module:function` returns into uint8 images.

Shapes: h and w height and width of an image as an item has it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gross_ray.data.decoding import PIL_ERRORS, as_rgb
from gross_ray.data.identity import SPLITS
from gross_ray.data.image_files import ImageFiles, Reading
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.labelled import Labelled, PassedOver, changes, check_classes, form_of, read_labelled
from gross_ray.data.reading import Form, Part, PartRead
from gross_ray.data.splitting import in_three, repeated_line, validated_on_test
from gross_ray.errors import DatasetError, one_line
from gross_ray.own_code import own_function

LAYOUT = "return (train, test) or (train, validation, test), each with a length and items (image, class number)"
PIXELS = "give PIL images, uint8 arrays (H, W) or (H, W, 3), or tensors (1 or 3, H, W), uint8 or multiples of 1/255"
ITEMS_A_PART = 64
"""How many items a process reads at a time."""
READ_TWICE = 10
"""How many items of each dataset are read twice, to find random transforms."""
EXACT = 1e-3
"""How far, in units of 1/255, a floating-point pixel may be from a whole number; ToTensor's pixels are exact."""


def function_of(name: str) -> Callable[[], Any]:
    """Import and return the function package.module:function; raises DatasetError if it does not exist."""
    return own_function(name, "package.module:function", lambda message: DatasetError(f"{name}: {message}"))


def read_own(how: Reading) -> Splits:
    """Call the function `how.options.name` without arguments and read the two or three datasets that it returns.

    Raises DatasetError if the function fails, and as `read_datasets` does.
    """
    name = how.options.name
    function = function_of(name)
    try:
        datasets = function()
    except Exception as error:  # whatever the user's own code raises
        raise DatasetError(f"{name}: the function fails: {one_line(error)}") from error
    return read_datasets(name, datasets, how)


def read_datasets(name: str, datasets: Any, how: Reading) -> Splits:
    """Read datasets, (train, test) or (train, validation, test), into the three splits; `name` is for errors.

    Single-channel images are repeated to three channels, and PIL images are converted by `decoding.as_rgb`; they are
    not turned as EXIF says, because the networks that torchvision's loaders feed were not trained so. The class names
    are the first dataset's `classes`, or else the class numbers. Each item is read once, in order, if memory holds the
    images; if not, the images are read into files, and before that the labels, from the datasets' `targets` or else
    from all items. Raises DatasetError, naming the dataset and item, for an item that fails, that has the wrong form,
    or that differs between two readings.
    """
    if not isinstance(datasets, tuple | list) or len(datasets) not in (2, 3):
        found = f"{len(datasets)} values" if isinstance(datasets, tuple | list) else type(datasets).__name__
        raise DatasetError(f"{name}: the function returned {found}; {LAYOUT}")
    parts = SPLITS if len(datasets) == 3 else ("train", "test")
    sets = {part: _Items(f"{name}, {part}", dataset) for part, dataset in zip(parts, datasets, strict=True)}
    named = _class_names(name, {part: items.classes for part, items in sets.items() if items.classes is not None})
    samples = {part: items.read_twice() for part, items in sets.items()}
    form = form_of([part for items in sets.values() for part in items.parts], how.options)
    if how.fits(sum(items.count for items in sets.values()) * math.prod(form.shape)):
        return _in_memory(name, sets, named, form, how)
    key = {"own": [name, samples, named, how.options.validation_from], "form": [*form.shape, *form.sizes.size]}
    files = ImageFiles.of(how.root, key)
    with files.locked(how.note):
        if files.complete(how.note):
            again = f"if the dataset has changed: gross data {files.key} --clear"
            how.note(f"{name}: the images as they were read at {files.read_at()}; {again}")
            return files.splits(name)
    labelled = {part: Labelled(part, items.labels(how.note), items.parts, tuple) for part, items in sets.items()}
    classes = _classes(name, named, max(max(each.labels) for each in labelled.values()))
    return read_labelled(name, labelled, classes, PassedOver("image"), how, files)


def _in_memory(name: str, sets: Mapping[str, _Items], named: tuple[str, ...], form: Form, how: Reading) -> Splits:
    """Read each item once; the checks of the classes and the notes are those of `read_labelled`."""
    reads = {part: PartRead() for part in sets}
    pools = {part: items.image_set(form, reads[part]) for part, items in sets.items()}
    classes = _classes(name, named, max(int(pool.labels.max()) for pool in pools.values()))
    labelled = {part: Labelled(part, pool.labels.tolist(), (), tuple) for part, pool in pools.items()}
    missing = check_classes(name, labelled, classes)
    splits = in_three(name, pools, classes)
    splits = validated_on_test(splits) if how.options.validation_from == "test" else splits
    read = f"read {sum(map(len, pools.values())):,} images of {len(classes)} classes"
    notes = (read, *changes([*reads.values()], form), *missing, *splits.notes, *repeated_line(splits))
    return replace(splits, notes=notes, sizes=form.resized_by)


class _Items:
    """The items of one of the datasets; `where` is what errors call it."""

    def __init__(self, where: str, dataset: Any) -> None:
        self._where, self._dataset, self._targets = where, dataset, list[int]()
        try:
            self.count = len(dataset)
        except TypeError:
            raise DatasetError(f"{where}: a {type(dataset).__name__} has no length; {LAYOUT}") from None
        if self.count == 0:
            raise DatasetError(f"{where}: the dataset is empty; {LAYOUT}")
        classes = getattr(dataset, "classes", None)
        self.classes = None if classes is None else tuple(map(str, classes))
        self.parts = [
            Part(min(ITEMS_A_PART, self.count - start), partial(self._images, start))
            for start in range(0, self.count, ITEMS_A_PART)
        ]

    def item(self, index: int) -> tuple[np.ndarray, int]:
        """Return the pixels (h, w, 3), uint8, and the class of an item."""
        item = f"{self._where}, item {index}"
        try:
            found = self._dataset[index]
            if isinstance(found, dict):
                raise TypeError(f"the item is a dict with the keys {', '.join(map(str, found))}")
            image, label = found
        except Exception as error:  # whatever the user's own code raises
            raise DatasetError(f"{item}: {one_line(error)}; {LAYOUT}") from error
        return _pixels(item, image), _label(item, label)

    def read_twice(self) -> str:
        """Return a hash of some of the items; raises DatasetError if one differs between two readings."""
        known = [self.count, self.targets(), [*_stamps(self._dataset)]]
        digest = hashlib.sha256(json.dumps(known).encode())
        for index in self._some():
            (pixels, label), (again, other) = self.item(index), self.item(index)
            if not np.array_equal(pixels, again):
                differs = f"{self._where}, item {index} differs between two readings"
                rule = "leave random transforms out of the dataset: trainings draw crops and flips (training.augment)"
                raise DatasetError(f"{differs}; {rule}")
            self._check_class(index, label, other)
            digest.update(json.dumps([index, pixels.shape, label]).encode() + np.ascontiguousarray(pixels).tobytes())
        return digest.hexdigest()

    def targets(self) -> list[int]:
        """Return the dataset's `targets`, if they are the classes of some items; else an empty list."""
        targets: Any = getattr(self._dataset, "targets", None)
        try:
            found = [int(each) for each in targets]
        except (TypeError, ValueError):
            return []
        if len(found) != self.count or any(self.item(index)[1] != found[index] for index in self._some()):
            return []
        return found

    def labels(self, note: Callable[[str], object]) -> list[int]:
        """Return the class of each item: the dataset's `targets`, or what its items say."""
        self._targets = self.targets()
        if not self._targets:
            twice = "so they are read twice, first for their classes"
            note(f"{self._where}: it has no targets that its items agree with, {twice}")
            self._targets = [self.item(index)[1] for index in range(self.count)]
        return self._targets

    def _some(self) -> list[int]:
        return sorted({round(step * (self.count - 1) / (READ_TWICE - 1)) for step in range(READ_TWICE)})

    def image_set(self, form: Form, read: PartRead) -> ImageSet:
        """Return all items, read once, in order; count in `read` those that are resized."""
        images, labels = np.empty((self.count, *form.shape), np.uint8), torch.empty(self.count, dtype=torch.int64)
        for index in range(self.count):
            pixels, labels[index] = self.item(index)
            read.count(pixels, form.sizes)
            images[index] = form.of(f"{self._where}, item {index}", pixels)
        return ImageSet.centred(torch.from_numpy(images), form.sizes.size, labels)

    def _images(self, start: int) -> Iterator[tuple[str, np.ndarray]]:
        for index in range(start, min(start + ITEMS_A_PART, self.count)):
            pixels, label = self.item(index)
            if self._targets:
                self._check_class(index, self._targets[index], label)
            yield f"{self._where}, item {index}", pixels

    def _check_class(self, index: int, before: int, label: int) -> None:
        if label != before:
            said = f"has class {label}, and before {before}"
            raise DatasetError(f"{self._where}, item {index} {said}; make its class the same at each reading")


def _stamps(dataset: Any) -> Iterator[list[int]]:
    """Yield the size and time of each file that a dataset of torchvision, or a part of one, names as its samples."""
    for inner in (getattr(dataset, "dataset", None), *getattr(dataset, "datasets", ())):  # of Subset, ConcatDataset
        if inner is not None:
            yield from _stamps(inner)
    samples = getattr(dataset, "samples", ())
    for sample in samples if isinstance(samples, list) else ():
        path = sample[0] if isinstance(sample, tuple) else sample
        if isinstance(path, str | Path) and (file := Path(path)).is_file():
            stat = file.stat()
            yield [stat.st_size, stat.st_mtime_ns]


def _pixels(item: str, image: Any) -> np.ndarray:
    """Return an image as uint8 (h, w, 3)."""
    if isinstance(image, Image.Image):
        try:
            values = as_rgb(image)[0].transpose(2, 0, 1)
        except PIL_ERRORS as error:
            raise DatasetError(f"{item}: an image of mode {image.mode}: {one_line(error)}; {PIXELS}") from error
    elif isinstance(image, Tensor):
        values = image.detach().cpu().numpy()
        values = values[None] if values.ndim == 2 else values
    elif isinstance(image, np.ndarray):
        values = image[None] if image.ndim == 2 else image.transpose(2, 0, 1) if image.ndim == 3 else image
    else:
        raise DatasetError(f"{item}: a {type(image).__name__} is not an image; {PIXELS}")
    if values.ndim != 3 or values.shape[0] not in (1, 3):
        raise DatasetError(f"{item}: an image of shape {tuple(image.shape)}; {PIXELS}")
    if values.dtype.kind == "f":
        scaled = values * 255.0
        rounded = np.rint(scaled)
        if not (np.abs(scaled - rounded).max() <= EXACT and rounded.min() >= 0 and rounded.max() <= 255):
            found = f"values from {values.min():.4g} to {values.max():.4g} that are not multiples of 1/255 from 0 to 1"
            raise DatasetError(f"{item}: {found}: leave the normalisation to data.mean and data.std; {PIXELS}")
        values = rounded.astype(np.uint8)
    elif values.dtype != np.uint8:
        raise DatasetError(f"{item}: an image of {values.dtype}; {PIXELS}")
    return np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0)


def _label(item: str, label: Any) -> int:
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or number != label:
        raise DatasetError(f"{item}: the class is {label!r}; must be a whole number, 0 or more")
    return number


def _class_names(name: str, of_datasets: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names of the classes that the datasets give; none if train gives none."""
    for part, classes in of_datasets.items():
        if classes != of_datasets.get("train", classes):
            differing = f"{part} has the classes {', '.join(classes)}, train {', '.join(of_datasets['train'])}"
            raise DatasetError(f"{name}: {differing}; give all datasets the same, because labels are class numbers")
    return of_datasets.get("train", ())


def _classes(name: str, named: tuple[str, ...], highest: int) -> tuple[str, ...]:
    """Return the names of the classes, or else their numbers, for class numbers up to `highest`."""
    classes = named or tuple(map(str, range(highest + 1)))
    if highest >= len(classes):
        raise DatasetError(
            f"{name}: an image has class {highest}, but only {len(classes)} classes have names; name all"
        )
    return classes
