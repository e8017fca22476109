"""Rows of tables with an image and its class, as Hugging Face's hub stores datasets.

An image is a struct of bytes and path, or only its bytes; a class is a whole number or a text. The names of classes may
be in the schema's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from gross_ray.data.image_files import Reading
from gross_ray.data.image_set import Splits
from gross_ray.data.labelled import Labelled, PassedOver, listed, read_labelled
from gross_ray.data.reading import Part
from gross_ray.errors import DatasetError

_METADATA = b"huggingface"
_types = pa.types
_IS_LIST = (_types.is_list, _types.is_large_list, _types.is_fixed_size_list)


@dataclass(frozen=True)
class Chunk:
    """Some of the rows of a split that are read together, like a row group of a file."""

    where: str
    """What they are rows of, like a file, for errors."""
    first: int
    """The number of the first row in that."""
    count: int
    """How many rows."""
    column: Callable[[str], Iterable[pa.Array | pa.ChunkedArray]]
    """Returns the values of a column, in order."""


@dataclass(frozen=True)
class Rows:
    """The rows of one split, not read yet."""

    name: str
    """The split's name in the dataset, like train."""
    schema: pa.Schema
    """Their columns, and the metadata."""
    chunks: Sequence[Chunk]
    """The rows, in order."""
    signature: Callable[[], Any]
    """Returns plain values for JSON that change if the rows do."""


def read_rows(how: Reading, found: Mapping[str, Rows]) -> Splits:
    """Read the images and classes of the rows of each split into the three splits.

    `found` has the key train, and any of validation and test. Without names in the metadata, the classes are the values
    that occur, sorted. Raises DatasetError for columns that cannot be chosen or used, for rows without a class or an
    image, and as `gross_ray.data.labelled.read_labelled` does.
    """
    options, schema = how.options, found["train"].schema
    name = options.name
    image = _image_column(name, schema, options.image_column)
    label = _label_column(name, schema, options.label_column, image)
    for rows in found.values():
        for each in (image, label):
            if each not in rows.schema.names or rows.schema.field(each).type != schema.field(each).type:
                other = f"{rows.name} has no column {each} of the same type as {found['train'].name}"
                raise DatasetError(f"{name}: {other}; its columns: {_columns(rows.schema)}")
    values = {split: _labels(name, rows, label) for split, rows in found.items()}
    named = _names(schema).get(label)
    of_label = _class_numbers(name, values, named)
    classes = named or [*map(str, of_label)]
    labelled = {}
    for split, rows in found.items():
        numbers, parts = [of_label[value] for value in values[split]], [_part(chunk, image) for chunk in rows.chunks]
        labelled[split] = Labelled(rows.name, numbers, parts, partial(_signature, image, rows))
    splits = read_labelled(name, labelled, classes, PassedOver("image"), how)
    source = "named by the metadata" if named else "its values, sorted"
    note = f"images: column {image}; classes: column {label}, {source}: {listed(classes)}"
    return replace(splits, notes=(note, *splits.notes))


def _class_numbers(name: str, values: Mapping[str, Sequence[Any]], named: Sequence[str] | None) -> dict[Any, int]:
    """Return the class number of each label; raises DatasetError if classes have names and a label has none."""
    labels = sorted({value for each in values.values() for value in each})
    if named is None:
        return {label: number for number, label in enumerate(labels)}
    for split, each in values.items():
        if strange := sorted({*each} - {*range(len(named))}):
            has = f"the {split} split has the label {strange[0]}, and the classes with names are 0 to {len(named) - 1}"
            raise DatasetError(f"{name}: {has}; name all classes, and leave out splits without labels (-1)")
    return {number: number for number in range(len(named))}


def _image_column(name: str, schema: pa.Schema, asked_for: str) -> str:
    fitting = [field.name for field in schema if _is_image(field.type)]
    column = asked_for or ("image" if "image" in fitting else fitting[0] if len(fitting) == 1 else "")
    if column in fitting:
        return column
    if asked_for:
        _check_known(name, schema, "image_column", asked_for)
        found = f"data.image_column = {asked_for!r} is of type {_shown(schema.field(asked_for).type)}"
    else:
        found = f"{len(fitting)} columns may be the images: {_columns(schema)}"
    raise DatasetError(
        f"{name}: {found}; images are encoded files, as binary or as a struct of bytes and path: choose their column "
        "with data.image_column"
    )


def _is_image(kind: pa.DataType) -> bool:
    if _types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return _types.is_binary(kind) or _types.is_large_binary(kind)


def _label_column(name: str, schema: pa.Schema, asked_for: str, image: str) -> str:
    """Return the column that is asked for, that has names of classes, that is called label, or that alone fits."""
    named = [*_names(schema)]
    fitting = [field.name for field in schema if field.name != image and _is_label(field.type)]
    if asked_for:
        _check_known(name, schema, "label_column", asked_for)
        column = asked_for
    else:
        called = [each for each in ("label", "labels") if each in schema.names]
        chosen = next((each for each in (named, called, fitting) if each), [])
        if len(chosen) != 1:
            found = f"{len(chosen)} columns may be the classes: {_columns(schema)}"
            raise DatasetError(f"{name}: {found}; choose one with data.label_column")
        column = chosen[0]
    if column in fitting:
        return column
    kind = schema.field(column).type
    if any(is_list(kind) for is_list in _IS_LIST):
        problem = "lists of labels (multi-label)"
    elif _types.is_floating(kind):
        problem = "numbers with a fraction (regression)"
    else:
        problem = f"values of type {_shown(kind)}"
    rule = "a class is one whole number or text for each image; choose such a column with data.label_column"
    raise DatasetError(f"{name}: the column {column} has {problem}; {rule}")


def _is_label(kind: pa.DataType) -> bool:
    if _types.is_dictionary(kind):
        return _is_label(kind.value_type)
    return any(test(kind) for test in (_types.is_integer, _types.is_boolean, _types.is_string, _types.is_large_string))


def _names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes of each column for which the metadata has them."""
    try:
        features = json.loads((schema.metadata or {}).get(_METADATA, b"{}"))["info"]["features"]
        return {column: [*map(str, each["names"])] for column, each in features.items() if _is_class_label(each)}
    except (KeyError, TypeError, ValueError, AttributeError):  # without such metadata, or with that of another version
        return {}


def _is_class_label(feature: Any) -> bool:
    return isinstance(feature, dict) and isinstance(feature.get("names"), list)


def _labels(name: str, rows: Rows, label: str) -> Sequence[Any]:
    labels: list[Any] = []
    for chunk in rows.chunks:
        for values in chunk.column(label):
            if values.null_count:
                raise DatasetError(f"{name}: {chunk.where}: {values.null_count} rows have no {label}; remove them")
            labels += values.to_pylist()
    return labels


def _signature(image: str, rows: Rows) -> list[Any]:
    return [image, rows.signature()]


def _part(chunk: Chunk, image: str) -> Part:
    def images() -> Iterator[tuple[str, Path | bytes]]:
        number = chunk.first
        for values in chunk.column(image):
            for value in values:
                yield f"{chunk.where}, row {number}", _content(value.as_py())
                number += 1

    return Part(chunk.count, images)


def _content(value: Any) -> Path | bytes:
    """Return an image's content, or its file where the table has only a path; nothing is a damaged image."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    return Path(path) if content is None and path else content or b""


def _check_known(name: str, schema: pa.Schema, field: str, column: str) -> None:
    if column not in schema.names:
        raise DatasetError(f"{name}: there is no column data.{field} = {column!r}; known columns: {_columns(schema)}")


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({_shown(field.type)})" for field in schema)


def _shown(kind: pa.DataType) -> str:
    return " ".join(str(kind).split())
