"""The three splits from whatever splits a dataset has.

Shapes: N images. Every split has a fixed random order that interleaves the classes, so its first n images are as
balanced by class as possible.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gross_ray.data.identity import SPLITS
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import DatasetError

SPLIT_NAMES = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
"""The names that folders, files and splits of a dataset may have, in lower case, and the split that each means."""
_TENSORS = ("stored", "labels")
_SPLITS = "splits: "


def balanced_split(labels: Tensor, proportions: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    """Split images at random into disjoint parts with equal proportions of the classes.

    `labels` is (N,), int64. `proportions` are the relative sizes of the parts: (4, 1) makes parts of 80 % and 20 %,
    to the nearest whole number. Returns for each part the indices of its images, (N_part,) int64. Within a part the
    classes alternate, in a random order each turn, for as long as they have images.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    classes = labels[shuffled]
    progress = (_ranks(classes) + 0.5) / torch.bincount(classes)[classes]  # of each image within its class, 0 to 1
    by_share = shuffled[torch.argsort(progress, stable=True)]
    ends = [round(len(labels) * sum(proportions[: i + 1]) / sum(proportions)) for i in range(len(proportions))]
    parts = [by_share[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [part[torch.argsort(_ranks(labels[part]), stable=True)] for part in parts]


def split(pool: ImageSet, proportions: tuple[int, ...]) -> list[ImageSet]:
    """Split images by `balanced_split`, always in the same way."""
    generator = torch.Generator().manual_seed(0)  # which image is in which split is part of the dataset, not of a run
    return [pool.part(indices) for indices in balanced_split(pool.labels, proportions, generator)]


def in_three(
    name: str, pools: Mapping[str, ImageSet], classes: tuple[str, ...], names: Mapping[str, str] | None = None
) -> Splits:
    """Make train, validation and test from the splits that a dataset has: a training split, and any of the others.

    Without a validation split, a fifth of the training images is it; without a test split, half of the validation
    images is it; without both, the training images are split 3:1:1. `names` are the splits' names in the dataset, for
    the note that says so.
    """
    named = dict(zip(SPLITS, SPLITS, strict=True)) | dict(names or {})
    train, validation, test = (pools.get(each) for each in SPLITS)
    assert train is not None
    if validation is not None and test is not None:
        sets = [split(each, (1,))[0] for each in (train, validation, test)]
        how = "" if named["validation"] == "validation" else f"; {named['validation']} is the validation split"
    elif test is not None:
        sets = [*split(train, (4, 1)), *split(test, (1,))]
        how = f"; a fifth of {named['train']} became the validation split, because there is none"
    elif validation is not None:
        sets = [*split(train, (1,)), *split(validation, (1, 1))]
        how = f"; half of {named['validation']} became the test split, because there is none"
    else:
        sets = split(train, (3, 1, 1))
        how = "; all images were split 3:1:1, because there is no other split"
    return Splits(name, sets[0], sets[1], sets[2], classes, (f"{_counts(sets)}{how}",))


def validated_on_test(splits: Splits) -> Splits:
    """Make half of the test split the validation split; the images that were the validation split join the training."""
    stored, labels = ([getattr(part, name) for part in (splits.train, splits.validation)] for name in _TENSORS)
    (train,) = split(splits.train.with_stored(torch.cat(stored), torch.cat(labels)), (1,))
    validation, test = split(splits.test, (1, 1))
    how = "; half of the test split selects, and the validation images are for training (data.validation_from=test)"
    notes = (
        *(line for line in splits.notes if not line.startswith(_SPLITS)),
        f"{_counts([train, validation, test])}{how}",
    )
    return replace(splits, train=train, validation=validation, test=test, notes=notes)


def repeated_line(splits: Splits) -> list[str]:
    """Return a line that counts the images which are in two splits, pixel for pixel; no line if there is none."""
    hashes = {}
    for each in SPLITS:
        images: ImageSet = getattr(splits, each)
        pixels = images.stored.flatten(1).numpy()
        hashes[each] = [hashlib.blake2b(image, digest_size=16).digest() for image in pixels]
    found = []
    for one, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        known = set(hashes[other])
        if count := sum(image in known for image in hashes[one]):
            found.append(f"{count:,} of {one} {'is' if count == 1 else 'are'} also in {other}")
    return [f"the same image is in two splits: {', '.join(found)}; accuracies on such images mislead"] if found else []


def split_of(name: str) -> str | None:
    """Return which split a folder or a file of this name has, or None."""
    return SPLIT_NAMES.get(name.lower())


def one_each(name: str, found: Mapping[str, list[str]]) -> dict[str, str]:
    """Return the one name of each split; raises DatasetError for two of the same split and for no training split."""
    for each, names in found.items():
        if len(names) > 1:
            raise DatasetError(f"{name}: {' and '.join(names)} are each the {each} split; keep one of them")
    if "train" not in found:
        there = ", ".join(names[0] for names in found.values())
        raise DatasetError(f"{name}: has {there}, and no train, from which networks learn; add it")
    return {each: names[0] for each, names in found.items()}


def _counts(sets: Sequence[ImageSet]) -> str:
    return _SPLITS + ", ".join(f"{len(images):,} {each}" for each, images in zip(SPLITS, sets, strict=True))


def _ranks(classes: Tensor) -> Tensor:
    """Return for each position how many positions before it have the same class."""
    order = torch.argsort(classes, stable=True)
    counts = torch.bincount(classes)
    ranks = torch.empty_like(classes)
    ranks[order] = torch.arange(len(classes)) - (counts.cumsum(0) - counts)[classes[order]]
    return ranks
