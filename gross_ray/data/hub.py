"""Datasets by their names on Hugging Face's hub, through the library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from gross_ray.data.identity import SPLITS
from gross_ray.data.image_files import Reading
from gross_ray.data.image_set import Splits
from gross_ray.data.labelled import listed
from gross_ray.data.rows import Chunk, Rows, read_rows
from gross_ray.data.splitting import one_each, split_of
from gross_ray.errors import DatasetError, one_line

_ROWS_AT_A_TIME = 64
_ROWS_A_CHUNK = 512


def read_hub(how: Reading) -> Splits:
    """Read the dataset hf:NAME or hf:NAME@CONFIG into the three splits, with notes.

    `datasets.load_dataset` finds it on the hub, in its cache, or in a local folder. Raises DatasetError if the library
    is not installed or fails, and as `gross_ray.data.rows.read_rows` does.
    """
    name = how.options.name
    try:
        import datasets
    except ImportError as error:
        raise DatasetError(f"{name}: needs the library datasets ({one_line(error)}); pip install datasets") from error
    dataset, _, config = name.removeprefix("hf:").partition("@")
    try:
        loaded: dict[str, Any] = datasets.load_dataset(dataset, config or None)
    except Exception as error:  # whatever the library and the loading scripts of others raise
        remedy = "check its name, config and the network, or download it and use parquet:FOLDER"
        raise DatasetError(f"{name}: cannot be loaded ({one_line(error)}); {remedy}") from error
    found: dict[str, list[str]] = {}
    for each in loaded:
        if split := split_of(each):
            found.setdefault(split, []).append(each)
    names = one_each(name, found) if found else {"train": next(iter(loaded))}
    others = [each for each in loaded if each not in names.values()]
    notes = [f"passed over splits: {listed(others)}"] if others else []
    splits = read_rows(how, {split: _rows(names[split], loaded[names[split]]) for split in SPLITS if split in names})
    return replace(splits, notes=(*splits.notes, *notes))


def _rows(split: str, dataset: Any) -> Rows:
    def column(first: int, count: int, column: str) -> Iterator[pa.ChunkedArray]:
        chosen = dataset.select(range(first, first + count)).select_columns([column]).with_format("arrow")
        for table in chosen.iter(_ROWS_AT_A_TIME):
            yield table.column(column)

    chunks = []
    for first in range(0, len(dataset), _ROWS_A_CHUNK):
        count = min(_ROWS_A_CHUNK, len(dataset) - first)
        chunks.append(Chunk(split, first, count, partial(column, first, count)))
    return Rows(split, dataset.features.arrow_schema, chunks, lambda: dataset._fingerprint)
