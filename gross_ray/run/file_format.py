"""The file formats: Parquet tables and safetensors checkpoints, each with a checksum of the whole file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from gross_ray.errors import RunFolderError
from gross_ray.run.tables import SCHEMA_VERSION, VERSION_KEY
from gross_ray.storage import Storage

if TYPE_CHECKING:  # torch is imported only to read or write tensors: reading tables does without it
    from torch import Tensor

_DESCRIPTION = "gross_ray.description"
_CHECKSUM = "gross_ray.crc32"
_NO_SUM, _SUM = b"gross_ray crc32=00000000", b"gross_ray crc32=%08x"


class DamagedContentError(Exception):
    """The content of a stored file is damaged. `RunStore` catches it and reports the file's name."""


def unit_file(arrow: pa.Table) -> memoryview:
    """Return a Parquet file with a checksum of the whole file: Parquet's own checksums leave out the footer."""
    metadata = {key: value for key, value in (arrow.schema.metadata or {}).items() if key != _CHECKSUM.encode()}
    arrow, sink = arrow.replace_schema_metadata(metadata), pa.BufferOutputStream()
    with pq.ParquetWriter(sink, arrow.schema, write_page_checksum=True) as writer:
        writer.write_table(arrow)
        writer.add_key_value_metadata({_CHECKSUM: _NO_SUM})
    return _summed(sink.getvalue().to_pybytes())


def checkpoint_file(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> memoryview:
    """Return a safetensors file of tensors (any device, stride and sharing) and a description of plain JSON values."""
    import torch
    from safetensors.torch import save

    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    metadata = {_DESCRIPTION: json.dumps(dict(description)), _CHECKSUM: _NO_SUM.decode()}
    return _summed(save(copies, metadata=metadata))


def read_unit(storage: Storage, file: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a unit's table.

    Raises FileNotFoundError, DamagedContentError, and RunFolderError for a file with another schema version.
    """
    # ParquetFile, because pyarrow's other readers turn folders like seed=0 in the path into columns.
    # Read from memory, so that an error of the disk or the network is not mistaken for damaged content.
    content = storage.read(file)
    _check_sum(content)
    try:
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as parquet:
            rows = parquet.metadata.num_rows
            stored = parquet.read(columns)
    except (pa.ArrowMemoryError, pa.ArrowNotImplementedError, pa.ArrowCancelled):
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedContentError(error) from None
    if stored.num_rows != rows:
        raise DamagedContentError(f"it has {stored.num_rows} rows, its footer says {rows}")
    metadata = {key: value for key, value in (stored.schema.metadata or {}).items() if key != _CHECKSUM.encode()}
    version = metadata.get(VERSION_KEY, b"none").decode()
    if version != str(SCHEMA_VERSION):  # the file is whole, so it is never deleted
        raise RunFolderError(
            f"{storage.shown(file)} has schema version {version}, this gross_ray reads {SCHEMA_VERSION}: "
            "use the gross_ray that wrote it, or name another folder"
        )
    return stored.replace_schema_metadata(metadata)  # without the checksum: it is wrong for a file made from these rows


def read_checkpoint(storage: Storage, file: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a checkpoint's tensors and description. Raises FileNotFoundError and DamagedContentError."""
    from safetensors.torch import load

    content = storage.read(file)
    _check_sum(content)
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, json.loads(header["__metadata__"][_DESCRIPTION])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedContentError(repr(error)) from None


def _summed(content: bytes) -> memoryview:
    """Return the file's content with the checksum of all its bytes in place of its last _NO_SUM."""
    start = content.rindex(_NO_SUM)
    summed = bytearray(content)
    summed[start : start + len(_NO_SUM)] = _SUM % zlib.crc32(content)
    return memoryview(summed)


def _check_sum(content: bytes) -> None:
    """Raise DamagedContentError unless the file has a checksum and its content agrees with it."""
    start = content.rfind(_NO_SUM[:-8])
    if start < 0:
        raise DamagedContentError("it has no checksum, so it is damaged or was not written by this gross_ray")
    end, view = start + len(_NO_SUM), memoryview(content)
    found = zlib.crc32(view[end:], zlib.crc32(_NO_SUM, zlib.crc32(view[:start])))
    if view[start:end] != _SUM % found:
        raise DamagedContentError("its content has changed since it was written")
