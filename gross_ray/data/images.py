"""Loading of datasets as uint8 tensors, by name.

Shapes: N images, H height, W width; images are (N, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from gross_ray.data.fashion_mnist import read_fashion_mnist
from gross_ray.data.folders import read_folder
from gross_ray.data.grey import grey
from gross_ray.data.hub import read_hub
from gross_ray.data.identity import SPLITS
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.names import WITH_FILES, check_dataset_name
from gross_ray.data.normalisation import Normalisation
from gross_ray.data.options import DataOptions
from gross_ray.data.own import read_datasets, read_own
from gross_ray.data.parquet import read_parquet
from gross_ray.data.sample import SAMPLE_FILE, read_sample
from gross_ray.data.splitting import in_three, repeated_line, validated_on_test
from gross_ray.data.torchvision_datasets import read_torchvision_dataset
from gross_ray.errors import DatasetError, InvalidValueError


def load_dataset(options: DataOptions, *, root: str | Path | None = None, download: bool = False) -> Splits:
    """Load a dataset onto the CPU, cut to the limits of `options`, always in the same order.

    Images are (N, 3, H, W), uint8, or (N, 1, H, W) if `options.channels` is 1 (`grey`). The splits' `notes` say what
    was read of images of the user's own, and whether the same image is in two splits. fashion-mnist and its sample
    are zero-padded from 28x28 to 32x32, and their grey channel is repeated. `root` (default ~/.cache/gross_ray) is the
    folder of the files of the datasets in WITH_FILES; `download` fetches missing ones.

    Raises InvalidValueError for an unknown name or a limit above the split's size, and DatasetError for a file that is
    missing, damaged or of the wrong kind.
    """
    check_dataset_name(options.name)
    folder = Path("~/.cache/gross_ray" if root is None else root).expanduser()
    if options.name == "sample":
        splits = read_sample(SAMPLE_FILE, options if options.validation_from == "train" else DataOptions())
    elif options.name == "fashion-mnist":
        splits = read_fashion_mnist(folder, download)
    elif options.name in WITH_FILES:
        splits = read_torchvision_dataset(options.name, folder, download)
    else:
        splits = _users_own(options)
    if options.validation_from == "test":
        splits = validated_on_test(splits)
    if options.name not in ("sample", *WITH_FILES):
        splits = replace(splits, notes=(*splits.notes, *repeated_line(splits)))
    return _settled(splits, options)


def _users_own(options: DataOptions) -> Splits:
    """Load images that are not part of gross_ray."""
    kind, _, place = options.name.partition(":")
    path = Path(place).expanduser()
    if kind == "folder":
        return read_folder(options.name, path, skip_damaged=options.skip_damaged)
    if kind == "parquet":
        return read_parquet(options, path)
    if kind == "hf":
        return read_hub(options)
    return _of_datasets(options.name, *read_own(options.name))


def splits_of(name: str, datasets: Sequence[Dataset[Any]], options: DataOptions) -> Splits:
    """Return datasets in memory, (train, test) or (train, validation, test), as splits called `name`.

    Raises DatasetError, naming the dataset and item, for one of the wrong form (`gross_ray.data.own`).
    """
    return _settled(_of_datasets(name, *read_datasets(name, tuple(datasets))), options)


def _of_datasets(name: str, sets: Sequence[ImageSet], classes: tuple[str, ...]) -> Splits:
    """Make the splits from (train, test) or (train, validation, test)."""
    names = SPLITS if len(sets) == 3 else ("train", "test")
    return in_three(name, dict(zip(names, sets, strict=True)), classes)


def _settled(splits: Splits, options: DataOptions) -> Splits:
    """Return the splits, cut to the limits of `options`, with its normalisation."""
    limits = (options.limit_train, options.limit_validation, options.limit_test)
    normalisation = Normalisation(options.mean, options.std)
    sets = [
        replace(_limited(splits, split, limit), normalisation=normalisation)
        for split, limit in zip(SPLITS, limits, strict=True)
    ]
    train, validation, test = map(grey, sets) if options.channels == 1 else sets
    return replace(splits, train=train, validation=validation, test=test)


def _limited(splits: Splits, split: str, limit: int) -> ImageSet:
    images: ImageSet = getattr(splits, split)
    size = len(images)
    if size == 0:
        raise DatasetError(f"{splits.name}: too few images, the {split} split is empty; add images")
    if limit > size:
        rule = f"the {split} split of {splits.name} has {size} images; use at most {size}, or 0 for all"
        raise InvalidValueError(f"data.limit_{split} = {limit}: {rule}")
    return images.first(limit)
