"""Images that memory does not hold: decoded once into files, which every process of a machine maps into its memory.

ROOT/images/KEY has for each split one file, SPLIT.u8, with its images one after another; read.jsonl, the parts that are
read, until all are; and then complete.json, with the labels, the notes and the hash of each split. Shapes: N images,
C channels, RH and RW height and width of a stored image; a file is (N, C, RH, RW), uint8.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from torch import Tensor

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.data.identity import SPLITS, identity_of
from gross_ray.data.image_set import ImageSet, MappedSplit, Splits, tensor_of
from gross_ray.data.memory import free_memory
from gross_ray.data.options import DataOptions
from gross_ray.data.reading import Form, PartRead, Reader, killed_processes
from gross_ray.data.sizes import Sizes
from gross_ray.data.splitting import repeated_line
from gross_ray.errors import DatasetError, one_line

ROOT = "~/.cache/gross_ray"
"""The folder of datasets, unless another one is named."""
_FORMAT = 1
_COMPLETE, _BEGUN, _READ = "complete.json", "begun.json", "read.jsonl"
_SECONDS_TO_FLUSH = 5.0
"""How often what was read is written to the disk, so that a crash costs no more."""


def ignore(*_: object) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Reading:
    """How images are read: the options, and where those go that memory does not hold."""

    options: DataOptions
    """Sizes, columns, damaged images, and the memory that images may take."""
    root: str = ROOT
    """Folder of datasets; its folder `images` gets the files."""
    note: Callable[[str], object] = ignore
    """Shows one line."""
    progress: Callable[[int, int], object] = ignore
    """Called with the numbers of images that are read into files and of all, again and again."""

    def fits(self, nbytes: int) -> bool:
        """Return whether images of `nbytes` are kept in memory."""
        return nbytes <= (self.options.memory or free_memory() // 4)


@dataclass(frozen=True)
class ImageFiles:
    """The files of one dataset with one set of options."""

    root: str
    """Folder of datasets, like ~/.cache/gross_ray."""
    key: str
    """Name of their folder: a hash of what the images depend on."""

    @classmethod
    def of(cls, root: str, depends_on: Mapping[str, Any]) -> ImageFiles:
        """Return the files for images that depend on these plain values, and on the version of Pillow."""
        values = json.dumps([_FORMAT, PIL.__version__, depends_on], sort_keys=True)
        return cls(root, hashlib.sha256(values.encode()).hexdigest()[:16])

    @property
    def folder(self) -> Path:
        """The folder on this machine."""
        return folder_of(self.root) / self.key

    @contextmanager
    def locked(self, note: Callable[[str], object] = ignore) -> Iterator[None]:
        """Lock the files while the block runs, after another process that has locked them has ended."""
        with _errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note(f"waiting for another process, which reads the same images into {self.folder}")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it with a forked process
            os.close(descriptor)

    def complete(self, note: Callable[[str], object] = ignore) -> bool:
        """Return whether the files are there and unchanged; files that were changed are deleted. Call it `locked`.

        A file whose size and time are those of its last check counts as unchanged; else its hash is computed.
        """
        described = self.description()
        if described is None:
            return False
        if all(self._stamp(split) == each["stamp"] for split, each in described["splits"].items()):
            return True
        if not self.verify():
            note(f"the files in {self.folder} have changed, so the images are read again")
            shutil.rmtree(self.folder)
            return False
        self._describe(described)
        return True

    def verify(self) -> bool:
        """Return whether the files have the images that were read, by their hashes."""
        described = self.description()
        if described is None:
            return False
        for split, each in described["splits"].items():
            stamp = self._stamp(split)
            if stamp is None or stamp[0] != math.prod(each["shape"]):
                return False
        found = identity_of(self._opened(described, hashes={}))
        return all(getattr(found, split).hash == each["hash"] for split, each in described["splits"].items())

    def description(self) -> dict[str, Any] | None:
        """Return what complete.json says, or None if the files are not complete."""
        path = self.folder / _COMPLETE
        try:
            described = json.loads(path.read_text())
            known = set(described["splits"]) == {*SPLITS} and "resizes" in described
            return described if known else None
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # a damaged description: all is read again
            return None
        except OSError as error:
            raise DatasetError(f"{path} cannot be read ({one_line(error)}); allow it, or use --data-root") from error

    def hashes(self) -> dict[str, str]:
        """Return the hash of each split of complete files; nothing if they are not complete."""
        described = self.description()
        return {} if described is None else {split: each["hash"] for split, each in described["splits"].items()}

    def stamp(self) -> None:
        """Store the times that the files have now, after they were verified."""
        if (described := self.description()) is not None:
            self._describe(described)

    def splits(self, name: str) -> Splits:
        """Return the images of complete files as the dataset `name`; raises DatasetError if they are not complete."""
        described = self.description()
        if described is None:
            raise DatasetError(f"there are no complete files of images in {self.folder}; load the dataset again")
        hashes = {split: each["hash"] for split, each in described["splits"].items()}
        return replace(self._opened(described, hashes), name=name)

    def read(self, name: str, reader: Reader, counts: Mapping[str, int], form: Form, how: Reading) -> list[PartRead]:
        """Read all parts into files with room for `counts` images, and go on where an earlier reading ended."""
        sizes = np.diff(reader.starts)
        with _errors(self.folder), killed_processes(name):
            shapes = {split: [count, *form.shape] for split, count in counts.items()}
            about = {"name": name, "size": form.sizes.size, "resizes": form.resizes}
            done = self._begun({**about, "shapes": shapes, "images": int(sum(sizes))})
            arrays = [_mapped(self._file(split), shape, "r+") for split, shape in shapes.items()]
            missing = [number for number in range(len(sizes)) if number not in done]
            num_read, total = int(sum(sizes)) - int(sum(sizes[missing])), int(sum(sizes))
            how.progress(num_read, total)
            with (
                _Journal(self.folder / _READ, arrays) as journal,
                closing(reader.on_all_cores(missing, arrays)) as reads,
            ):
                for number, read in reads:
                    done[number] = read
                    journal.add(number, int(sizes[number]), read)
                    num_read += int(sizes[number])
                    how.progress(num_read, total)
        return [done[number] for number in range(len(sizes))]

    def rearrange(self, reader: Reader, order: Mapping[str, np.ndarray]) -> None:
        """Rewrite the files with `order`, (N_split,) indices into the images of all parts, of those that were read."""
        with _errors(self.folder):
            begun = json.loads((self.folder / _BEGUN).read_text())
            arrays = [_mapped(self._file(split), shape, "r") for split, shape in begun["shapes"].items()]
            for split, rows in order.items():
                shape = [len(rows), *begun["shapes"][split][1:]]
                _allocate(self._file(f"new-{split}"), math.prod(shape))
                _flush(reader.rearranged(arrays, rows, _mapped(self._file(f"new-{split}"), shape, "r+")))
            (self.folder / _READ).unlink()  # after an interruption from here on, all images are read again
            for split in order:
                os.replace(self._file(f"new-{split}"), self._file(split))

    def finish(self, labels: Mapping[str, Tensor], classes: Sequence[str], notes: Sequence[str]) -> None:
        """Complete the files of images with these labels, (N_split,) int64: store labels, hashes and notes."""
        with _errors(self.folder):
            begun = json.loads((self.folder / _BEGUN).read_text())
            described = {key: begun[key] for key in ("name", "size", "resizes")} | {
                "classes": [*classes],
                "notes": [*notes],
            }
            described["splits"] = {
                split: {"shape": [len(of_split), *begun["shapes"][split][1:]], "labels": of_split.tolist()}
                for split, of_split in labels.items()
            }
            splits = self._opened(described, hashes={})
            identity = identity_of(splits)
            for split, each in described["splits"].items():
                each["hash"] = getattr(identity, split).hash
            described["notes"] += repeated_line(splits)
            self._describe(described)
            for file in (_READ, _BEGUN):
                (self.folder / file).unlink(missing_ok=True)

    def read_at(self) -> str:
        """Return when complete files were read, like 2026-12-01 10:30."""
        seconds = (self.folder / _COMPLETE).stat().st_mtime
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")

    def progress(self) -> tuple[str, int, int]:
        """Return the dataset's name, the number of images that are read, and that of all."""
        if (described := self.description()) is not None:
            number = sum(each["shape"][0] for each in described["splits"].values())
            return described["name"], number, number
        try:
            begun = json.loads((self.folder / _BEGUN).read_text())
        except (OSError, ValueError):
            return "unknown", 0, 0
        return begun["name"], sum(number for _, number, _ in _journal(self.folder / _READ)), begun["images"]

    def _begun(self, begins: dict[str, Any]) -> dict[int, PartRead]:
        """Create the files, or return the parts that are read, by their numbers."""
        begins = json.loads(json.dumps(begins))
        with suppress(OSError, ValueError):  # nothing is begun, or nothing of use
            if json.loads((self.folder / _BEGUN).read_text()) == begins:
                return {number: PartRead.from_dict(read) for number, _, read in _journal(self.folder / _READ)}
        shutil.rmtree(self.folder, ignore_errors=True)
        needed = sum(map(math.prod, begins["shapes"].values()))
        free = shutil.disk_usage(self.folder.parent).free
        if needed > free:
            rule = f"the images take {needed / 1e9:.1f} GB, and only {free / 1e9:.1f} GB are free"
            raise DatasetError(f"{self.folder}: {rule}; name a folder on another disk with --data-root")
        self.folder.mkdir()
        for split, shape in begins["shapes"].items():
            _allocate(self._file(split), math.prod(shape))
        with whole_or_not_at_all(self.folder / _BEGUN) as path:
            path.write_text(json.dumps(begins))
        return {}

    def _describe(self, described: dict[str, Any]) -> None:
        for split, each in described["splits"].items():
            each["stamp"] = self._stamp(split)
        with whole_or_not_at_all(self.folder / _COMPLETE) as path:
            path.write_text(json.dumps(described))

    def _opened(self, described: Mapping[str, Any], hashes: Mapping[str, str]) -> Splits:
        """Return the images; those of a split without a hash do not know that they are in a file."""
        sets = []
        for split in SPLITS:
            each = described["splits"][split]
            with _errors(self.folder):
                images = tensor_of(_mapped(self._file(split), each["shape"], "r"))
            part = ImageSet.centred(images, tuple(described["size"]), torch.tensor(each["labels"]))
            of_file = MappedSplit(self.root, self.key, split, hashes[split], each["shape"][0]) if hashes else None
            sets.append(replace(part, mapped=of_file))
        train, validation, test = sets
        notes = tuple(described["notes"])
        (height, width), (tall, wide) = described["size"], train.stored.shape[2:]
        sizes = Sizes((height, width), (tall, wide)) if described["resizes"] else None
        return Splits(described["name"], train, validation, test, tuple(described["classes"]), notes, sizes)

    def _file(self, split: str) -> Path:
        return self.folder / f"{split}.u8"

    def _stamp(self, split: str) -> list[int] | None:
        return size_and_time(self._file(split))


class _Journal:
    """The parts that were read: a line each, written after its images are on the disk."""

    def __init__(self, path: Path, arrays: Sequence[np.ndarray]) -> None:
        self._arrays, self._waiting, self._flushed = arrays, list[bytes](), time.monotonic()
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        self._file.seek(0)
        if self._file.read()[-1:] not in (b"", b"\n"):  # a line that a crash has cut off
            self._file.write(b"\n")

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def add(self, number: int, num_images: int, read: PartRead) -> None:
        """Add a part, written with the next flush."""
        self._waiting.append(json.dumps([number, num_images, read.to_dict()]).encode() + b"\n")
        if time.monotonic() - self._flushed > _SECONDS_TO_FLUSH:
            self._flush()

    def _flush(self) -> None:
        for array in self._arrays:
            _flush(array)
        self._file.writelines(self._waiting)
        self._file.flush()
        self._waiting.clear()
        self._flushed = time.monotonic()


def _journal(path: Path) -> list[tuple[int, int, dict[str, Any]]]:
    """Return the number, the number of images and the record of each part that was read."""
    found = []
    with suppress(OSError), open(path) as lines:
        for line in lines:
            with suppress(ValueError):  # a line that a crash has cut off
                number, num_images, read = json.loads(line)
                found.append((number, num_images, read))
    return found


def size_and_time(path: Path) -> list[int] | None:
    """Return the size and the time (ns) of a file, which change if it does, or None if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def folder_of(root: str) -> Path:
    """Return the folder in the root of datasets that has all files of images."""
    return Path(root).expanduser() / "images"


def all_files(root: str) -> list[ImageFiles]:
    """Return the files of all datasets below `root`, complete or not."""
    folder = folder_of(root)
    return (
        [ImageFiles(root, path.name) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    )


def _allocate(path: Path, size: int) -> None:
    """Make a file with room on the disk: writing to a mapped file for which there is none would kill the process."""
    with open(path, "wb") as file:
        if size and sys.platform == "linux":
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _flush(array: np.ndarray) -> None:
    if isinstance(array, np.memmap):  # an empty one is not
        array.flush()


def _mapped(path: Path, shape: Sequence[int], mode: Literal["r", "r+"]) -> np.ndarray:
    if not math.prod(shape):  # an empty file cannot be mapped
        return np.empty(tuple(shape), np.uint8)
    return np.memmap(path, np.uint8, mode, shape=tuple(shape))


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        remedy = "make room there, or name another folder with --data-root"
        raise DatasetError(f"the images' files in {folder} cannot be used ({one_line(error)}); {remedy}") from error
