"""CIFAR-10, CIFAR-100, SVHN and STL-10, read by torchvision from their original files."""

from __future__ import annotations

import http.client
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.splitting import split
from gross_ray.errors import DatasetError, one_line

DOWNLOAD_ERRORS = (RuntimeError, OSError, http.client.HTTPException)
"""What torchvision raises if a download fails."""


def read_torchvision_dataset(name: str, root: Path, download: bool) -> Splits:
    """Read cifar10, cifar100, svhn or stl10 from `root`, where torchvision stores it; `download` fetches missing files.

    A fifth of the training images is the validation split. SVHN's extra training images and STL-10's unlabelled images
    are not used. Raises DatasetError for a failed download, for a missing file, and for one with another MD5, which is
    never opened: the files of CIFAR are pickles.
    """
    # Imported here, because torchvision takes seconds to import.
    from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN

    class LabelledSTL10(STL10):
        train_list = STL10.train_list[:2]  # without the unlabelled images (2.8 GB)
        test_list = [*STL10.test_list, [STL10.class_names_file, None]]  # STL10 itself does not require this file

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100, "svhn": SVHN, "stl10": LabelledSTL10}[name]
    is_cifar = issubclass(dataset, CIFAR10)
    if name == "svhn":
        urls, names, md5s = zip(*(SVHN.split_list[part] for part in ("train", "test")), strict=True)
        folder, files = root, [*zip(names, md5s, strict=True)]
        by_hand = f"save {' and '.join(urls)} in {root}"
    else:
        folder, files = root / dataset.base_folder, [*dataset.train_list, *dataset.test_list]
        by_hand = f"unpack {dataset.url} in {root}"
    if is_cifar:
        files.append((dataset.meta["filename"], dataset.meta["md5"]))
    remedy = f"check the network, or {by_hand}" if download else f"{by_hand}, or add --download"
    if not download:
        _check_files(name, folder, files, remedy)
    try:
        learn, report = (
            dataset(str(root), part == "train" if is_cifar else part, download=download) for part in ("train", "test")
        )
    except ImportError as error:  # torchvision reads SVHN with scipy
        raise DatasetError(f"{name}: cannot be read ({one_line(error)}); pip install scipy") from error
    except (*DOWNLOAD_ERRORS, UnicodeDecodeError) as error:
        raise DatasetError(f"{name}: cannot be loaded into {root} ({one_line(error)}); {remedy}") from error
    classes = tuple(map(str, range(10)) if name == "svhn" else learn.classes)
    pool, tested = _image_set(learn, is_cifar), _image_set(report, is_cifar)
    if len(classes) != pool.labels.max() + 1:  # torchvision knows no MD5 of STL-10's class names
        wrong = f"has {len(classes)} class names in {folder} for {int(pool.labels.max()) + 1} classes"
        raise DatasetError(f"{name}: {wrong}; {remedy}")
    train, validation = split(pool, (4, 1))
    (test,) = split(tested, (1,))
    return Splits(name, train, validation, test, classes)


def _check_files(name: str, folder: Path, files: Iterable[tuple[str, str | None]], remedy: str) -> None:
    """Raise DatasetError for a file that is missing or has another MD5; None: it has no known MD5."""
    from torchvision.datasets.utils import check_integrity

    for file, md5 in files:
        if not (folder / file).is_file():
            raise DatasetError(f"{name}: no {file} in {folder}; {remedy}")
        if not check_integrity(str(folder / file), md5):
            raise DatasetError(f"{name}: {folder / file} is damaged, its MD5 is not {md5}; {remedy}")


def _image_set(part: Any, is_cifar: bool) -> ImageSet:
    """Return a torchvision dataset's images and labels; only CIFAR's images are (N, H, W, 3) there."""
    images = torch.from_numpy(part.data)
    if is_cifar:
        return ImageSet(images.permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
    return ImageSet(images.contiguous(), torch.from_numpy(part.labels).long())
