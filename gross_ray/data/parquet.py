"""Parquet files with images, in the layout of the Hugging Face hub: file or folder names say which split each is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gross_ray.data.folders import is_junk, signature
from gross_ray.data.identity import SPLITS
from gross_ray.data.image_files import Reading
from gross_ray.data.image_set import Splits
from gross_ray.data.labelled import listed
from gross_ray.data.remote import copied
from gross_ray.data.rows import Chunk, Rows, read_rows
from gross_ray.data.splitting import SPLIT_NAMES, one_each, split_of
from gross_ray.errors import DatasetError, one_line

ENDING = ".parquet"
_LAYOUT = (
    "name a Parquet file, or a folder with files like train-00000-of-00001.parquet and test-00000-of-00001.parquet"
)
_ROWS_AT_A_TIME = 64
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


def read_parquet(how: Reading, path: Path) -> Splits:
    """Read the images of a Parquet file, or of all those in a folder, into the three splits, with notes.

    Files at a URI like s3://bucket/folder are first copied to this machine. A file, and files without the names of
    splits, are one split, which is split 3:1:1. Files are read in the order of their names. Raises DatasetError, naming
    the file, and as `gross_ray.data.rows.read_rows` does.
    """
    name = how.options.name
    if "://" in name:
        path = copied(name, name.partition(":")[2], ENDING, how.root, how.note)
    found, notes = ({"train": (path.name, [path])}, ()) if path.is_file() else _files(name, path)
    rows = {split: _rows(name, path, *named) for split, named in found.items()}
    splits = read_rows(how, rows)
    return replace(splits, notes=(*splits.notes, *notes))


def _files(name: str, path: Path) -> tuple[dict[str, tuple[str, list[Path]]], Sequence[str]]:
    """Return the name and the files of each split in a folder, and a note if files are passed over."""
    files = sorted(
        file for file in path.rglob(f"*{ENDING}") if not any(is_junk(part) for part in file.relative_to(path).parts)
    )
    if not files:
        raise DatasetError(f"{name}: there is no Parquet file in {path}; {_LAYOUT}")
    named = {file: _split_name(file.relative_to(path)) for file in files}
    of_splits = [file for file in files if named[file]] or files
    datasets = sorted({_dataset(file.relative_to(path)) for file in of_splits})
    if len(datasets) > 1:
        raise DatasetError(f"{name}: {path} has several datasets: {listed(datasets)}; name the folder of one of them")
    if not any(named.values()):
        return {"train": (path.name, files)}, ()
    found: dict[str, list[str]] = {}
    for split in dict.fromkeys(named[file] for file in of_splits):
        found.setdefault(SPLIT_NAMES[split], []).append(split)
    names = one_each(name, found)
    others = [str(file.relative_to(path)) for file in files if not named[file]]
    notes = [f"passed over files that have the name of no split: {listed(others)}"] if others else []
    return {
        split: (names[split], [file for file in of_splits if named[file] == names[split]])
        for split in SPLITS
        if split in names
    }, notes


def _split_name(file: Path) -> str:
    """Return the name of a split that is in the file's name, or else that is the name of a folder around it."""
    if match := _SPLIT.search(file.stem):
        return match[0].lower()
    return next((folder.lower() for folder in reversed(file.parent.parts) if split_of(folder)), "")


def _dataset(file: Path) -> str:
    """Return the folder of a file without those named as splits: the hub has one for each version of a dataset."""
    return "/".join(part for part in file.parent.parts if not split_of(part)) or "."


def _rows(name: str, folder: Path, split: str, files: Sequence[Path]) -> Rows:
    chunks, schemas = list[Chunk](), {}
    for file in files:
        with _errors(name, file):
            schemas[file], metadata = pq.read_schema(file), pq.read_metadata(file)
        first = 0
        for group in range(metadata.num_row_groups):
            count = metadata.row_group(group).num_rows
            chunks.append(Chunk(str(file), first, count, partial(_column, name, file, group)))
            first += count
    for file, schema in schemas.items():
        if not schema.equals(schemas[files[0]]):
            raise DatasetError(f"{name}: the columns of {file} differ from those of {files[0]}; write them alike")
    base = folder if folder.is_dir() else folder.parent
    return Rows(split, schemas[files[0]], chunks, lambda: [signature(file, base) for file in files])


def _column(name: str, file: Path, group: int, column: str) -> Iterator[pa.Array]:
    with _errors(name, file), pq.ParquetFile(file, page_checksum_verification=True) as opened:
        for batch in opened.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[column], use_threads=False):
            yield batch.column(0)


@contextmanager
def _errors(name: str, file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{name}: {file} cannot be read ({one_line(error)}); fetch or write it again") from error
