"""Folders of images: one folder for each class, alone or within folders for the splits (as torchvision's ImageFolder).

Images are found at any depth below a class folder, by the endings of files that Pillow can decode.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from gross_ray.data.decoding import image_endings
from gross_ray.data.identity import SPLITS
from gross_ray.data.image_files import Reading
from gross_ray.data.image_set import Splits
from gross_ray.data.labelled import Labelled, PassedOver, listed, read_labelled
from gross_ray.data.reading import Part
from gross_ray.data.splitting import one_each, split_of
from gross_ray.errors import DatasetError, one_line

_LAYOUT = "make one folder of images a class, like train/cat, validation/cat and test/cat, or only cat"
FILES_A_PART = 64
"""How many files a process reads at a time."""
_JUNK = ("thumbs.db", "desktop.ini", "__macosx")


def is_junk(name: str) -> bool:
    """Return whether a file or folder is hidden, or one that file managers and archives leave behind."""
    return name.startswith(".") or name.lower() in _JUNK


def read_folder(how: Reading, path: Path) -> Splits:
    """Read the images of a folder into the three splits, with notes about what was read and what was passed over.

    Classes and the files of each are sorted by name. Raises DatasetError for a folder without images, and as
    `gross_ray.data.labelled.read_labelled` does.
    """
    name = how.options.name
    if not path.is_dir():
        raise DatasetError(f"{name}: there is no folder {path}; {_LAYOUT}")
    passed_over = PassedOver("file")
    folders = _folders(name, path, passed_over)
    splits = _splits(name, folders)
    of_splits = {split: _folders(name, folder, passed_over) for split, folder in splits.items()} or {"train": folders}
    files = {split: _class_files(name, of_split, passed_over) for split, of_split in of_splits.items()}
    classes = sorted({each for of_split in files.values() for each, found in of_split.items() if found})
    if not classes:
        raise DatasetError(f"{name}: {path} has no images in class folders{passed_over.text()}; {_LAYOUT}")
    if len(classes) == 1:
        deeper = not splits and any(each.is_dir() for each in (path / classes[0]).iterdir())
        remedy = f"; is the dataset folder:{path / classes[0]}?" if deeper else ""
        raise DatasetError(f"{name}: {path} has one class only, {classes[0]}, and two or more are needed{remedy}")
    found = {split: _labelled(splits.get(split, path), classes, each) for split, each in files.items()}
    read = read_labelled(name, found, classes, passed_over, how)
    notes = []
    if empty := sorted({each for of_split in files.values() for each in of_split} - {*classes}):
        notes.append(f"class folders without an image, which are no classes: {listed(empty)}")
    if splits and (beside := [each.name for each in folders if each not in splits.values()]):
        notes.append(f"passed over the folders beside those of the splits: {listed(beside)}")
    return replace(read, notes=(*read.notes, *notes))


def _splits(name: str, folders: Sequence[Path]) -> dict[str, Path]:
    """Return the folder of each split, or nothing if these are the folders of classes.

    A class may be called train or test: such folders are splits only together, or with no other folder beside them.
    """
    found: dict[str, list[Path]] = {}
    for folder in folders:
        if split := split_of(folder.name):
            found.setdefault(split, []).append(folder)
    alone = sum(map(len, found.values())) == len(folders)
    if not alone and ("train" not in found or len(found) == 1):
        return {}
    one_each(name, {split: [folder.name for folder in of_split] for split, of_split in found.items()})
    return {split: found[split][0] for split in SPLITS if split in found}


def _folders(name: str, path: Path, passed_over: PassedOver) -> list[Path]:
    """Return the folders in `path`, sorted; its files are counted as passed over."""
    try:
        paths = sorted(each for each in path.iterdir() if not is_junk(each.name))
    except OSError as error:
        raise _unreadable(name, path, error) from error
    _images((each for each in paths if not each.is_dir()), passed_over, stray=True)
    folders = [each for each in paths if each.is_dir()]
    if not folders:
        raise DatasetError(f"{name}: {path} has no class folders; {_LAYOUT}")
    return folders


def _class_files(name: str, folders: Sequence[Path], passed_over: PassedOver) -> dict[str, list[Path]]:
    """Return the image files of each class, at any depth below its folder, sorted by path."""

    def refuse(error: OSError) -> None:
        raise _unreadable(name, Path(error.filename), error) from error

    classes = {}
    for folder in folders:
        files, seen = [], set()
        for path, inner, names in os.walk(folder, onerror=refuse, followlinks=True):
            if (real := os.path.realpath(path)) in seen:  # a link that makes a circle
                inner.clear()
                continue
            seen.add(real)
            inner[:] = [each for each in inner if not is_junk(each)]
            files += [Path(path, each) for each in names if not is_junk(each)]
        classes[folder.name] = sorted(_images(files, passed_over))
    return classes


def _images(files: Iterable[Path], passed_over: PassedOver, *, stray: bool = False) -> list[Path]:
    """Return the image files among `files`, or none if they are `stray`, and count the others as passed over."""
    endings, images = image_endings(), []
    for file in files:
        ending = file.suffix.lower()
        if ending not in endings:
            passed_over.reasons[ending or "without an ending"] += 1
        elif stray:
            passed_over.reasons["outside of class folders"] += 1
        else:
            images.append(file)
    return images


def _labelled(folder: Path, classes: Sequence[str], files: dict[str, list[Path]]) -> Labelled:
    labels = [label for label, each in enumerate(classes) for _ in files.get(each, ())]
    paths = [file for each in classes for file in files.get(each, ())]

    def part(paths: Sequence[Path]) -> Part:
        return Part(len(paths), lambda: ((str(file), file) for file in paths))

    parts = [part(paths[start : start + FILES_A_PART]) for start in range(0, len(paths), FILES_A_PART)]
    return Labelled(folder.name, labels, parts, lambda: [signature(file, folder) for file in paths])


def signature(file: Path, folder: Path) -> list[str | int]:
    """Return a file's path in a folder, its size and its time."""
    stat = file.stat()
    return [str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns]


def _unreadable(name: str, path: Path, error: OSError) -> DatasetError:
    return DatasetError(f"{name}: the folder {path} cannot be read ({one_line(error)}); allow it, or remove the folder")
