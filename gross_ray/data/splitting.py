"""The three splits from whatever splits a dataset has.

Shapes: N images. Every split has a fixed random order that interleaves the classes, so its first n images are as
balanced by class as possible.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
    return [pool.part(rows) for rows in _split_rows(torch.arange(len(pool)), pool.labels, proportions)]


@dataclass(frozen=True)
class Arrangement:
    """Which images each of the three splits has, in its order."""

    rows: Mapping[str, Tensor]
    """By the name in SPLITS: (N_split,) int64, indices into all images of the dataset, one pool after another."""
    how: str
    """How the splits came about, for a note; empty if they are those of the dataset."""

    @property
    def note(self) -> str:
        """The line for the user: the number of images in each split, and how the splits came about."""
        return _SPLITS + ", ".join(f"{len(rows):,} {split}" for split, rows in self.rows.items()) + self.how


def arranged(
    labels: Mapping[str, Tensor], names: Mapping[str, str] | None = None, *, validation_from: str = "train"
) -> Arrangement:
    """Make train, validation and test from the pools that a dataset has: a training pool, and any of the others.

    `labels` are those of each pool, (N_pool,) int64, in the order of SPLITS. Without a validation pool, a fifth of the
    training images is that split; without a test pool, half of the validation images is it; without both, the training
    images are split 3:1:1. `names` are the pools' names in the dataset, for the note. With `validation_from` = test,
    half of the test split then becomes the validation split, and what was that joins the training images.
    """
    named, start = dict(zip(SPLITS, SPLITS, strict=True)) | dict(names or {}), 0
    every = torch.cat([labels[each] for each in SPLITS if each in labels])
    pools: dict[str, Tensor] = {}
    for each in SPLITS:
        if each in labels:
            pools[each] = torch.arange(start, start + len(labels[each]))
            start += len(labels[each])
    train, validation, test = (pools.get(each) for each in SPLITS)
    assert train is not None
    if validation is not None and test is not None:
        rows = [_split_rows(each, every, (1,))[0] for each in (train, validation, test)]
        how = "" if named["validation"] == "validation" else f"; {named['validation']} is the validation split"
    elif test is not None:
        rows = [*_split_rows(train, every, (4, 1)), *_split_rows(test, every, (1,))]
        how = f"; a fifth of {named['train']} became the validation split, because there is none"
    elif validation is not None:
        rows = [*_split_rows(train, every, (1,)), *_split_rows(validation, every, (1, 1))]
        how = f"; half of {named['validation']} became the test split, because there is none"
    else:
        rows = _split_rows(train, every, (3, 1, 1))
        how = "; all images were split 3:1:1, because there is no other split"
    found = Arrangement(dict(zip(SPLITS, rows, strict=True)), how)
    return _validated_on_test(found, every) if validation_from == "test" else found


def in_three(
    name: str, pools: Mapping[str, ImageSet], classes: tuple[str, ...], names: Mapping[str, str] | None = None
) -> Splits:
    """Make the three splits from the pools of a dataset, as `arranged` says."""
    found = arranged({split: pool.labels for split, pool in pools.items()}, names)
    return _taken(name, [pools[each] for each in SPLITS if each in pools], found, classes)


def validated_on_test(splits: Splits) -> Splits:
    """Make half of the test split the validation split; the images that were the validation split join the training."""
    pools: list[ImageSet] = [getattr(splits, each) for each in SPLITS]
    rows = torch.arange(sum(map(len, pools))).split([len(pool) for pool in pools])
    before = Arrangement(dict(zip(SPLITS, rows, strict=True)), "")
    found = _validated_on_test(before, torch.cat([pool.labels for pool in pools]))
    taken = _taken(splits.name, pools, found, splits.classes)
    return replace(taken, notes=(*(line for line in splits.notes if not line.startswith(_SPLITS)), *taken.notes))


def _validated_on_test(found: Arrangement, labels: Tensor) -> Arrangement:
    (train,) = _split_rows(torch.cat([found.rows["train"], found.rows["validation"]]), labels, (1,))
    validation, test = _split_rows(found.rows["test"], labels, (1, 1))
    how = "; half of the test split selects, and the validation images are for training (data.validation_from=test)"
    return Arrangement({"train": train, "validation": validation, "test": test}, how)


def _split_rows(rows: Tensor, labels: Tensor, proportions: tuple[int, ...]) -> list[Tensor]:
    """Split the images at `rows` by `balanced_split`; `labels` are those of all images."""
    generator = torch.Generator().manual_seed(0)  # which image is in which split is part of the dataset, not of a run
    return [rows[part] for part in balanced_split(labels[rows], proportions, generator)]


def _taken(name: str, pools: Sequence[ImageSet], found: Arrangement, classes: tuple[str, ...]) -> Splits:
    """Return the images of the pools in the arrangement's order."""
    ends = torch.tensor([0, *map(len, pools)]).cumsum(0)

    def taken(rows: Tensor) -> ImageSet:
        if not len(rows):
            return pools[0].part(rows)
        first, last = (int(torch.bucketize(row, ends[1:], right=True)) for row in (rows.min(), rows.max()))
        used, start = pools[first : last + 1], ends[first]
        if len(used) == 1:
            return used[0].part(rows - start)
        stored, labels = (torch.cat([getattr(pool, each) for pool in used]) for each in ("stored", "labels"))
        return used[0].with_stored(stored, labels).part(rows - start)

    train, validation, test = (taken(found.rows[split]) for split in SPLITS)
    return Splits(name, train, validation, test, classes, (found.note,))


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


def _ranks(classes: Tensor) -> Tensor:
    """Return for each position how many positions before it have the same class."""
    order = torch.argsort(classes, stable=True)
    counts = torch.bincount(classes)
    ranks = torch.empty_like(classes)
    ranks[order] = torch.arange(len(classes)) - (counts.cumsum(0) - counts)[classes[order]]
    return ranks
