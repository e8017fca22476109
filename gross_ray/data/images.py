"""Datasets as uint8 tensors: the embedded sample, Fashion-MNIST, CIFAR-10, and the user's own.

Shapes: N images, H height, W width; images are (N, 3, H, W).
"""

from __future__ import annotations

import gzip
import http.client
import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from gross_ray.data.decoding import PIL_ERRORS
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
from gross_ray.data.splitting import in_three, repeated_line, split, validated_on_test
from gross_ray.errors import DatasetError, InvalidValueError, one_line

SAMPLE_FILE = Path(__file__).with_name("sample.parquet")
SAMPLE_SCHEMA = pa.schema([("split", pa.string()), ("label", pa.int8()), ("png", pa.binary())])
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
DOWNLOAD_ERRORS = (RuntimeError, OSError, http.client.HTTPException)


def load_dataset(options: DataOptions, *, root: str | Path | None = None, download: bool = False) -> Splits:
    """Load a dataset onto the CPU, cut to the limits of `options`, always in the same order.

    Images are (N, 3, H, W), uint8, or (N, 1, H, W) if `options.channels` is 1 (`grey`). The splits' `notes` say what
    was read of images of the user's own, and whether the same image is in two splits. fashion-mnist and its sample
    are zero-padded from 28x28 to 32x32, and their grey channel is repeated. `root` (default ~/.cache/gross_ray) is the
    folder of the files of fashion-mnist and cifar10; `download` fetches missing ones.

    Raises InvalidValueError for an unknown name or a limit above the split's size, and DatasetError for a file that is
    missing, damaged or of the wrong kind.
    """
    check_dataset_name(options.name)
    folder = Path("~/.cache/gross_ray" if root is None else root).expanduser()
    if options.name == "sample":
        splits = read_sample(SAMPLE_FILE, options if options.validation_from == "train" else DataOptions())
    elif options.name == "fashion-mnist":
        splits = _load_fashion_mnist(folder, download)
    elif options.name == "cifar10":
        splits = _load_cifar10(folder, download)
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


def read_sample(path: Path, limits: DataOptions) -> Splits:
    """Read a file that scripts/make_sample.py wrote; raises DatasetError if it is damaged.

    Of each split, only the images within its limit are decoded.
    """
    remedy = "reinstall gross_ray, or make the file with scripts/make_sample.py"
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"sample: {path} cannot be read ({one_line(error)}); {remedy}") from error
    metadata = table.schema.metadata or {}
    if table.schema.remove_metadata() != SAMPLE_SCHEMA or b"classes" not in metadata:
        expected = ", ".join(f"{field.name} {field.type}" for field in SAMPLE_SCHEMA)
        found = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        raise DatasetError(f"sample: {path} has the columns {found}, not {expected} and class names; {remedy}")
    names, labels = (table[column].to_pylist() for column in ("split", "label"))
    rows = {split: [row for row, name in enumerate(names) if name == split] for split in SPLITS}
    kept = {split: indices[: getattr(limits, f"limit_{split}") or None] for split, indices in rows.items()}
    pngs = table["png"].take(pa.array([row for indices in kept.values() for row in indices], pa.int64())).to_pylist()
    try:
        classes = tuple(json.loads(metadata[b"classes"]))
        images = [_grey_pixels(png) for png in pngs]
    except PIL_ERRORS as error:
        wrong = f"holds an unreadable image or class names ({one_line(error)})"
        raise DatasetError(f"sample: {path} {wrong}; {remedy}") from error
    size = (FASHION_SIZE, FASHION_SIZE)
    strange = {*names} - {*SPLITS} | {*labels} - {*range(len(classes))} | {image.shape for image in images} - {size}
    if strange or not images:
        wrong = f"has {len(images)} images and the unknown splits, labels or image sizes {strange or 'none'}"
        raise DatasetError(f"sample: {path} {wrong}; {remedy}")
    pixels = _fashion_images(torch.from_numpy(np.stack(images))).split([len(indices) for indices in kept.values()])
    train, validation, test = (
        ImageSet(images, torch.tensor(labels)[indices]) for images, indices in zip(pixels, kept.values(), strict=True)
    )
    return Splits("sample", train, validation, test, classes)


def _limited(splits: Splits, split: str, limit: int) -> ImageSet:
    images: ImageSet = getattr(splits, split)
    size = len(images)
    if size == 0:
        raise DatasetError(f"{splits.name}: too few images, the {split} split is empty; add images")
    if limit > size:
        rule = f"the {split} split of {splits.name} has {size} images; use at most {size}, or 0 for all"
        raise InvalidValueError(f"data.limit_{split} = {limit}: {rule}")
    return images.first(limit)


def _grey_pixels(png: bytes) -> np.ndarray:
    """Return uint8 pixels (H, W); raises one of PIL_ERRORS."""
    with Image.open(BytesIO(png)) as image:
        return np.asarray(image.convert("L"))


def _fashion_images(grey: Tensor) -> Tensor:
    """Return images (N, 28, 28) padded and repeated to (N, 3, 32, 32)."""
    padded = functional.pad(grey, (FASHION_PADDING,) * 4)
    return padded.unsqueeze(1).repeat(1, 3, 1, 1)


def _load_fashion_mnist(root: Path, download: bool) -> Splits:
    folder = _fashion_folder(root, download)
    train_images, train_labels, test_images, test_labels = (folder / file for file in FASHION_FILES)
    # 40,000 and 10,000 of the 60,000, the paper's sizes for CIFAR-10; the last 10,000 are unused.
    train, validation, _ = split(_read_idx_pair(train_images, train_labels), (4, 1, 1))
    (test,) = split(_read_idx_pair(test_images, test_labels), (1,))
    train, validation, test = (ImageSet(_fashion_images(x.images), x.labels) for x in (train, validation, test))
    return Splits("fashion-mnist", train, validation, test, FASHION_CLASSES)


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


def _load_cifar10(root: Path, download: bool) -> Splits:
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
