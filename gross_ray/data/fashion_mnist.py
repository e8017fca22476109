"""Fashion-MNIST, from its four gzipped files.

Shapes: N images, padded from 28x28 to 32x32 and repeated to three channels.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.splitting import split
from gross_ray.data.torchvision_datasets import DOWNLOAD_ERRORS
from gross_ray.errors import DatasetError, one_line

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_SIZE = 28
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_PADDING = 2  # to 32x32, as CIFAR-10
FASHION_FILES = tuple(
    f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def read_fashion_mnist(root: Path, download: bool) -> Splits:
    """Read the files in `root`, in torchvision's folder in it, or in Debian's; `download` fetches missing ones.

    Raises DatasetError, naming the file, for one that is missing or damaged, and for a failed download.
    """
    folder = _fashion_folder(root, download)
    train_images, train_labels, test_images, test_labels = (folder / file for file in FASHION_FILES)
    # 40,000 and 10,000 of the 60,000, the paper's sizes for CIFAR-10; the last 10,000 are unused.
    train, validation, _ = split(_read_idx_pair(train_images, train_labels), (4, 1, 1))
    (test,) = split(_read_idx_pair(test_images, test_labels), (1,))
    train, validation, test = (ImageSet(padded_rgb(x.images), x.labels) for x in (train, validation, test))
    return Splits("fashion-mnist", train, validation, test, FASHION_CLASSES)


def padded_rgb(grey: Tensor) -> Tensor:
    """Return images (N, 28, 28) padded and repeated to (N, 3, 32, 32)."""
    padded = functional.pad(grey, (FASHION_PADDING,) * 4)
    return padded.unsqueeze(1).repeat(1, 3, 1, 1)


def _fashion_folder(root: Path, download: bool) -> Path:
    torchvision_folder = root / "FashionMNIST" / "raw"
    folders = (root, torchvision_folder, DEBIAN_FOLDER)
    # The first folder with any of the files, so that an incomplete set is reported and not skipped.
    folder = next((each for each in folders if any((each / file).is_file() for file in FASHION_FILES)), None)
    missing = [file for file in FASHION_FILES if folder is None or not (folder / file).is_file()]
    if folder is not None and not missing:
        return folder
    if not download:
        where = " or ".join(map(str, [folder] if folder else (root, DEBIAN_FOLDER)))
        remedy = "install Debian's dataset-fashion-mnist, or add --download"
        raise DatasetError(f"fashion-mnist: no {missing[0]} in {where}; {remedy}")
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)
    except DOWNLOAD_ERRORS as error:
        remedy = f"check the network, or copy the four files into {root}"
        raise DatasetError(f"fashion-mnist: download into {root} failed ({one_line(error)}); {remedy}") from error
    return torchvision_folder


def _read_idx_pair(images_path: Path, labels_path: Path) -> ImageSet:
    images = _read_idx(images_path, (FASHION_SIZE, FASHION_SIZE))
    labels = _read_idx(labels_path, ()).to(torch.int64)
    if len(images) != len(labels):
        raise _damaged(labels_path, f"has {len(labels)} labels for the {len(images)} images of {images_path.name}")
    if labels.max() >= len(FASHION_CLASSES):
        raise _damaged(labels_path, f"has the label {int(labels.max())}, above {len(FASHION_CLASSES) - 1}")
    return ImageSet(images, labels)


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Return the uint8 tensor (N, *shape) of a gzipped IDX file."""
    # torchvision.datasets.mnist.read_image_file opens no gzipped file, and of damaged ones it raises errors of many
    # kinds, without the file's name. MD5s cannot stand in for these checks: Debian compresses the files differently.
    try:
        content = bytearray(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"cannot be read ({one_line(error)})") from error
    num_dimensions = 1 + len(shape)
    magic = bytes((0, 0, 8, num_dimensions))  # 8: uint8
    header = struct.Struct(f">4s{num_dimensions}I")
    if len(content) <= header.size or content[:4] != magic:
        raise _damaged(path, f"is no IDX file of uint8 in {num_dimensions} dimensions")
    _, *sizes = header.unpack_from(content)
    if tuple(sizes[1:]) != shape or header.size + math.prod(sizes) != len(content):
        held = len(content) - header.size
        raise _damaged(path, f"declares {tuple(sizes)} values, but holds {held} for (N, *{shape})")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header.size).reshape(sizes)


def _damaged(path: Path, problem: str) -> DatasetError:
    remedy = "replace it by the file of https://github.com/zalandoresearch/fashion-mnist"
    if path.parent == DEBIAN_FOLDER:
        remedy = "reinstall Debian's dataset-fashion-mnist"
    return DatasetError(f"fashion-mnist: {path} {problem}; {remedy}")
