"""The user's own datasets: read what a function `package.module:function` returns into uint8 images.

Shapes: N images, H height, W width; images are (N, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gross_ray.data.decoding import PIL_ERRORS, as_rgb
from gross_ray.data.image_set import ImageSet
from gross_ray.errors import DatasetError, one_line
from gross_ray.own_code import own_function

LAYOUT = "return (train, test) or (train, validation, test), each with a length and items (image, class number)"
PIXELS = "give PIL images, uint8 arrays (H, W) or (H, W, 3), or tensors (1 or 3, H, W), uint8 or multiples of 1/255"
EXACT = 1e-3
"""How far, in units of 1/255, a floating-point pixel may be from a whole number; ToTensor's pixels are exact."""


def function_of(name: str) -> Callable[[], Any]:
    """Import and return the function package.module:function; raises DatasetError if it does not exist."""
    return own_function(name, "package.module:function", lambda message: DatasetError(f"{name}: {message}"))


def read_own(name: str) -> tuple[list[ImageSet], tuple[str, ...]]:
    """Call the function `name` without arguments and read the two or three datasets that it returns.

    Each item is read once, in order, so random augmentations are drawn once. Single-channel images are repeated to
    three channels, and PIL images are converted by `gross_ray.data.decoding.as_rgb`; they are not turned as EXIF says,
    because the networks that torchvision's loaders feed were not trained so. The class names are the first dataset's
    `classes`, or else the class numbers. Raises DatasetError, naming the dataset and item, if the function or an item
    fails or has the wrong form.
    """
    function = function_of(name)
    try:
        datasets = function()
    except Exception as error:  # whatever the user's own code raises
        raise DatasetError(f"{name}: the function fails: {one_line(error)}") from error
    return read_datasets(name, datasets)


def read_datasets(name: str, datasets: Any) -> tuple[list[ImageSet], tuple[str, ...]]:
    """Read datasets, (train, test) or (train, validation, test), as `read_own` does; `name` is for errors."""
    if not isinstance(datasets, tuple | list) or len(datasets) not in (2, 3):
        found = f"{len(datasets)} values" if isinstance(datasets, tuple | list) else type(datasets).__name__
        raise DatasetError(f"{name}: the function returned {found}; {LAYOUT}")
    parts = ("train", "test") if len(datasets) == 2 else ("train", "validation", "test")
    sets = [_read(f"{name}, {part}", dataset) for part, dataset in zip(parts, datasets, strict=True)]
    for (part, images), (other_part, others) in pairwise(zip(parts, sets, strict=True)):
        if images.images.shape[1:] != others.images.shape[1:]:
            sizes = f"{part} has images of {_size(images.images)} pixels, {other_part} of {_size(others.images)}"
            raise DatasetError(f"{name}: {sizes}; resize all images to one size")
    of_each = {part: getattr(dataset, "classes", None) for part, dataset in zip(parts, datasets, strict=True)}
    named = {part: tuple(map(str, classes)) for part, classes in of_each.items() if classes is not None}
    for part, classes in named.items():
        if classes != named.get("train", classes):
            differing = f"{part} has the classes {', '.join(classes)}, train {', '.join(named['train'])}"
            raise DatasetError(f"{name}: {differing}; give all datasets the same, because labels are class numbers")
    return sets, _classes(name, named.get("train"), sets)


def _read(where: str, dataset: Any) -> ImageSet:
    try:
        count = len(dataset)
    except TypeError:
        raise DatasetError(f"{where}: a {type(dataset).__name__} has no length; {LAYOUT}") from None
    if count == 0:
        raise DatasetError(f"{where}: the dataset is empty; {LAYOUT}")
    images: np.ndarray | None = None
    labels = torch.empty(count, dtype=torch.int64)
    for index in range(count):
        item = f"{where}, item {index}"
        try:
            image, label = dataset[index]
        except Exception as error:  # whatever the user's own code raises
            raise DatasetError(f"{item}: {one_line(error)}; {LAYOUT}") from error
        pixels = _pixels(item, image)
        if images is None:
            images = np.empty((count, *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            sizes = f"is {pixels.shape[2]}x{pixels.shape[1]} pixels, those before it {_size(images)}"
            raise DatasetError(f"{item}: {sizes}; resize all images to one size")
        images[index] = pixels
        labels[index] = _label(item, label)
    return ImageSet(torch.from_numpy(images), labels)


def _pixels(item: str, image: Any) -> np.ndarray:
    """Return an image as uint8 (3, H, W)."""
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
    return np.broadcast_to(values, (3, *values.shape[1:]))


def _label(item: str, label: Any) -> int:
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or number != label:
        raise DatasetError(f"{item}: the class is {label!r}; must be a whole number, 0 or more")
    return number


def _classes(name: str, named: Sequence[str] | None, sets: Sequence[ImageSet]) -> tuple[str, ...]:
    highest = max(int(images.labels.max()) for images in sets)
    classes = tuple(map(str, range(highest + 1) if named is None else named))
    if highest >= len(classes):
        raise DatasetError(
            f"{name}: an image has class {highest}, but only {len(classes)} classes have names; name all"
        )
    return classes


def _size(images: Tensor | np.ndarray) -> str:
    return f"{images.shape[-1]}x{images.shape[-2]}"
