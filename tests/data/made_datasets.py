"""The same made-up images as a folder, as Parquet files, of the library datasets, and of a function."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gross_ray.data import folders, hub, own
from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions

KINDS = ("folder", "parquet", "hf", "function")
CLASSES = ("ant", "bee", "cow")
A_PART = 7
"""Images that a process reads at a time; no split is a multiple of it."""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Split = list[tuple[bytes, int]]
"""The content of the file of each image, and its class."""


def png(number: int, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> bytes:
    """Return a random image (h, w) as PNG: another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def pictures(first: int = 0, count: int = 30, *, sizes: Sequence[tuple[int, int]] = ((6, 5),)) -> Split:
    """Return images of the classes in turn, each third of them grey, of the sizes in turn."""
    modes = ("RGB", "RGB", "L")
    return [
        (png(first + i, sizes[i % len(sizes)], modes[i // 3 % 3]), (first + i) % len(CLASSES)) for i in range(count)
    ]


def write_folder(path: Path, splits: dict[str, Split]) -> str:
    """Write a folder, and return its name as a dataset."""
    for split, images in splits.items():
        for i, (content, label) in enumerate(images):
            (path / split / CLASSES[label]).mkdir(parents=True, exist_ok=True)
            (path / split / CLASSES[label] / f"{i:03}.png").write_bytes(content)
    return f"folder:{path}"


def table(images: Split) -> pa.Table:
    values = [{"bytes": content, "path": None} for content, _ in images]
    return pa.table({"image": pa.array(values, IMAGE), "label": [CLASSES[label] for _, label in images]})


def write_parquet(path: Path, splits: dict[str, Split]) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        pq.write_table(table(images), path / f"{split}.parquet", row_group_size=A_PART)
    return f"parquet:{path}"


class Features(dict):  # type: ignore[type-arg]
    def __init__(self, schema: pa.Schema) -> None:
        self.arrow_schema = schema


class HubDataset:
    """What is used of datasets.Dataset."""

    def __init__(self, made: pa.Table) -> None:
        self.table, self.features, self._fingerprint = made, Features(made.schema), str(hash(str(made)))

    def __len__(self) -> int:
        return len(self.table)

    def select(self, rows: range) -> HubDataset:
        return HubDataset(self.table.take([*rows]))

    def select_columns(self, names: list[str]) -> HubDataset:
        return HubDataset(self.table.select(names))

    def with_format(self, form: str) -> HubDataset:
        assert form == "arrow"
        return self

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        for start in range(0, len(self.table), batch_size):
            yield self.table.slice(start, batch_size)


class Items:
    """A dataset of a user's own, as torch takes them."""

    classes = CLASSES

    def __init__(self, images: Split) -> None:
        self._images = images
        self.targets = [label for _, label in images]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        content, label = self._images[index]
        return Image.open(BytesIO(content)), label


def make(kind: str, splits: dict[str, Split], path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a dataset of the kind, read in small parts, and return its name."""
    monkeypatch.setattr(folders, "FILES_A_PART", A_PART)
    monkeypatch.setattr(own, "ITEMS_A_PART", A_PART)
    monkeypatch.setattr(hub, "_ROWS_A_CHUNK", A_PART)
    if kind == "folder":
        return write_folder(path, splits)
    if kind == "parquet":
        return write_parquet(path, splits)
    if kind == "hf":
        library = ModuleType("datasets")
        made = {split: HubDataset(table(images)) for split, images in splits.items()}
        library.load_dataset = lambda *_: made  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", library)
        return "hf:me/insects"
    module = ModuleType("made_pictures")
    module.pictures = lambda: tuple(map(Items, splits.values()))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_pictures", module)
    return "made_pictures:pictures"


def in_files(name: str, root: Path, **options: Any) -> Splits:
    """Load a dataset whose images memory does not hold."""
    return load_dataset(DataOptions(name=name, memory=1, **options), root=root)


def in_memory(name: str, **options: Any) -> Splits:
    return load_dataset(DataOptions(name=name, memory=2**40, **options))
