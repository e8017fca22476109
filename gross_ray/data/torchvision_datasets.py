"""Datasets that torchvision reads from their original files."""

from __future__ import annotations

import http.client
from pathlib import Path

import torch

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.splitting import split
from gross_ray.errors import DatasetError, one_line

DOWNLOAD_ERRORS = (RuntimeError, OSError, http.client.HTTPException)
"""What torchvision raises if a download fails."""


def read_cifar10(root: Path, download: bool) -> Splits:
    """Read CIFAR-10 from `root`, where torchvision keeps it; raises DatasetError for a missing or damaged file."""
    # Imported here, because torchvision takes seconds to import.
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    folder = root / CIFAR10.base_folder
    remedy = f"unpack {CIFAR10.url} in {root}, or add --download"
    try:
        if not download:
            for file, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])):
                if not (folder / file).is_file():
                    raise DatasetError(f"cifar10: no {file} in {folder}; {remedy}")
                if not check_integrity(str(folder / file), md5):
                    raise DatasetError(f"cifar10: {folder / file} is damaged, its MD5 is not {md5}; {remedy}")
        learn, report = (CIFAR10(str(root), train=part, download=download) for part in (True, False))
    except DOWNLOAD_ERRORS as error:
        remedy = f"check the network, or unpack {CIFAR10.url} in {root}"
        raise DatasetError(f"cifar10: cannot be loaded into {root} ({one_line(error)}); {remedy}") from error
    pools = [
        ImageSet(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (learn, report)
    ]
    train, validation = split(pools[0], (4, 1))
    (test,) = split(pools[1], (1,))
    return Splits("cifar10", train, validation, test, tuple(learn.classes))
