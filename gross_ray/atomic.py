"""Write a file completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_not_at_all(path: str | Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; after the block, that file replaces `path` and is flushed to the disk.

    If the block or the replacement fails, `path` is unchanged and the temporary file is deleted. `temporary` must be in
    the same folder (default: .partial-NAME, which keeps the ending).
    """
    final = Path(path)
    partial = final.with_name(f".partial-{final.name}") if temporary is None else temporary
    try:
        yield partial
        _flush(partial)
        os.replace(partial, final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(final.parent)  # so that the new name survives a power cut


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
