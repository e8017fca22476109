"""Images on their way from the driver to its workers: arrays, or the name of files that each machine has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from gross_ray.data.identity import SPLITS
from gross_ray.data.image_files import ImageFiles
from gross_ray.data.image_set import ImageSet, MappedSplit, Splits, tensor_of
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.data.sizes import Sizes
from gross_ray.errors import DatasetError, one_line

RESIDENT_SHARE = 0.3
"""Share of a worker's part of a GPU's memory that its images may take; larger images are streamed."""
Fetch = Callable[[ImageFiles], None]
"""Copies files of images from the driver's machine to this one."""


@dataclass(frozen=True)
class PackedSplit:
    """One split on its way."""

    stored: Any
    """The images (N, 3, RH, RW), uint8, as a NumPy array; None: the first N of a file."""
    mapped: MappedSplit | None
    """That file."""
    labels: Any
    """(N,), int64, as a NumPy array."""
    rest: ImageSet
    """The other fields of the set, with no image."""


@dataclass(frozen=True)
class PackedSplits:
    """The three splits on their way; arrays in Ray's object store are shared by the processes of a node."""

    splits: Mapping[str, PackedSplit]
    """By the names in SPLITS."""
    name: str
    """The dataset's name."""
    classes: tuple[str, ...]
    """Names of the classes."""
    sizes: Sizes | None
    """How the images were resized."""
    options: DataOptions
    """From which a machine without the files makes them."""
    node: str
    """Ray's id of the driver's node; empty without Ray."""


def pack_splits(splits: Splits, options: DataOptions | None = None, *, node: str = "") -> PackedSplits:
    """Return the images as arrays, or only by name if they are in a file; `options` are those they were loaded with."""
    packed = {}
    for name in SPLITS:
        part: ImageSet = getattr(splits, name)
        stored = part.stored.numpy() if part.mapped is None else None
        rest = part.with_stored(part.stored[:0].clone(), part.labels[:0].clone())
        packed[name] = PackedSplit(stored, part.mapped, part.labels.numpy(), rest)
    return PackedSplits(packed, splits.name, splits.classes, splits.sizes, options or DataOptions(), node)


def unpack_splits(packed: PackedSplits, device: str, room: int | None = None, fetch: Fetch | None = None) -> Splits:
    """Return the images on `device`, or streamed to it if they are larger than `room` bytes.

    Images in a file are mapped from it, and read ahead also if the device is a CPU. A machine without that file makes
    it; where that is not possible, or gives other images, `fetch` copies it. Raises DatasetError if it cannot.
    """
    mapped = [part.mapped for part in packed.splits.values() if part.mapped is not None]
    files = files_here(mapped, packed.options, fetch).splits(packed.name) if mapped else None
    sets = {}
    for name, part in packed.splits.items():
        stored = tensor_of(part.stored) if part.mapped is None else getattr(files, name).stored[: len(part.labels)]
        sets[name] = part.rest.with_stored(stored, tensor_of(part.labels))
    fits = room is None or sum(each.stored.nbytes for each in sets.values()) <= room
    streamed = not fits or (bool(mapped) and torch.device(device).type == "cpu")
    train, validation, test = (sets[name].stream_to(device) if streamed else sets[name].to(device) for name in SPLITS)
    return Splits(packed.name, train, validation, test, packed.classes, sizes=packed.sizes)


def files_here(mapped: list[MappedSplit], options: DataOptions, fetch: Fetch | None) -> ImageFiles:
    """Return the files of images with the hashes of `mapped` on this machine; make or fetch missing ones."""
    files, hashes = ImageFiles(mapped[0].root, mapped[0].key), {each.split: each.hash for each in mapped}
    with files.locked():
        if _has(files, hashes) and files.complete():
            return files
    why = "other images are decoded there"
    try:
        # A machine with more memory than the driver's has to make the files, too: all its workers share them.
        made = load_dataset(replace(options, memory=1), root=files.root)
        of_files = made.train.mapped
        if of_files is not None and _has(ImageFiles(files.root, of_files.key), hashes):
            return ImageFiles(files.root, of_files.key)
    except DatasetError as error:
        why = one_line(error)
    if fetch is None:
        raise DatasetError(f"{files.folder}: there are no files of this run's images ({why}); load the dataset there")
    with files.locked():
        if not _has(files, hashes):
            fetch(files)
            if not files.verify() or not _has(files, hashes):
                raise DatasetError(f"{files.folder}: the files that were copied have other images; clear the folder")
            files.stamp()
    return files


def _has(files: ImageFiles, hashes: Mapping[str, str]) -> bool:
    """Return whether complete files have the splits with these hashes."""
    return hashes.items() <= files.hashes().items()


def room_for_images(device: str, share: float = 1.0) -> int | None:
    """Return the bytes of `device` that the images of a process with `share` of it may take; None: any number.

    On a CPU, all processes of a node share the images' memory.
    """
    if torch.device(device).type != "cuda":
        return None
    return int(RESIDENT_SHARE * share * torch.cuda.get_device_properties(device).total_memory)
