"""Loading of datasets as uint8 tensors, by name.

Shapes: N images, H height, W width; images are (N, 3, H, W).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from gross_ray.data.fashion_mnist import read_fashion_mnist
from gross_ray.data.folders import read_folder
from gross_ray.data.grey import grey
from gross_ray.data.hub import read_hub
from gross_ray.data.identity import SPLITS
from gross_ray.data.image_files import ROOT, Reading, ignore
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.names import WITH_FILES, check_dataset_name
from gross_ray.data.normalisation import Normalisation
from gross_ray.data.options import DataOptions, check_limit
from gross_ray.data.own import read_datasets, read_own
from gross_ray.data.parquet import read_parquet
from gross_ray.data.resizing import resized
from gross_ray.data.sample import SAMPLE_FILE, read_sample
from gross_ray.data.splitting import validated_on_test
from gross_ray.data.torchvision_datasets import read_torchvision_dataset
from gross_ray.errors import DatasetError


def load_dataset(
    options: DataOptions,
    *,
    root: str | Path | None = None,
    download: bool = False,
    note: Callable[[str], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Splits:
    """Load a dataset onto the CPU, cut to the limits of `options`, always in the same order.

    Images are (N, 3, H, W), uint8, or (N, 1, H, W) if `options.channels` is 1 (`grey`). With `options.image_size`,
    they are resized, and H and W are that size. The splits' `notes` say what was read of images of the user's own, and
    whether the same image is in two splits. fashion-mnist and its sample are zero-padded from 28x28 to 32x32, and
    their grey channel is repeated. `root` (default ~/.cache/gross_ray) is the folder of the files of the datasets in
    WITH_FILES, and of the files into which images of the user's own are read that memory does not hold; `download`
    fetches missing files. `note` shows a line, and `progress` is called with the numbers of images that are read into
    files and of all.

    Raises InvalidValueError for an unknown name or a limit above the split's size, and DatasetError for a file that is
    missing, damaged or of the wrong kind.
    """
    check_dataset_name(options.name)
    how = Reading(options, _from_anywhere(ROOT if root is None else str(root)), note or ignore, progress or ignore)
    if options.name == "sample" or options.name in WITH_FILES:
        return _settled(_known(how, download), options)
    return _settled(_users_own(how), options)


def _from_anywhere(root: str) -> str:
    """Return a folder so that workers find it, which may run in another one; ~ is the home of each machine."""
    return root if root.startswith("~") else os.path.abspath(root)


def _known(how: Reading, download: bool) -> Splits:
    """Load images that many know."""
    options, folder = how.options, Path(how.root).expanduser()
    if options.name == "sample":
        splits = read_sample(SAMPLE_FILE, options if options.validation_from == "train" else DataOptions())
    elif options.name == "fashion-mnist":
        splits = read_fashion_mnist(folder, download)
    else:
        splits = read_torchvision_dataset(options.name, folder, download)
    if options.validation_from == "test":
        splits = validated_on_test(splits)
    return resized(splits, options)


def _users_own(how: Reading) -> Splits:
    """Load images that are not part of gross_ray."""
    kind, _, place = how.options.name.partition(":")
    path = Path(place).expanduser()
    if kind == "folder":
        return read_folder(how, path)
    if kind == "parquet":
        return read_parquet(how, path)
    if kind == "hf":
        return read_hub(how)
    return read_own(how)


def splits_of(name: str, datasets: Sequence[Dataset[Any]], options: DataOptions) -> Splits:
    """Return datasets, (train, test) or (train, validation, test), as splits called `name`.

    Raises DatasetError, naming the dataset and item, for one of the wrong form (`gross_ray.data.own`).
    """
    return _settled(read_datasets(name, tuple(datasets), Reading(options)), options)


def _settled(splits: Splits, options: DataOptions) -> Splits:
    """Return the splits, cut to the limits of `options`, with its normalisation."""
    normalisation = Normalisation(options.mean, options.std)
    sets = [replace(_limited(splits, split, options), normalisation=normalisation) for split in SPLITS]
    train, validation, test = (grey(each) if options.channels < each.images.shape[1] else each for each in sets)
    return replace(splits, train=train, validation=validation, test=test)


def _limited(splits: Splits, split: str, options: DataOptions) -> ImageSet:
    images: ImageSet = getattr(splits, split)
    if len(images) == 0:
        raise DatasetError(f"{splits.name}: too few images, the {split} split is empty; add images")
    check_limit(splits.name, split, len(images), options)
    return images.first(getattr(options, f"limit_{split}"))
