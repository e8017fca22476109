"""Write a file completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def whole_or_not_at_all(path: str | Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; after the block, that file replaces `path` and is flushed to the disk.

    If the block or the replacement fails, `path` is unchanged and the temporary file is deleted. `temporary` must be in
    the same folder. By default it is a file of the same name in a new folder there, .partial-RANDOM, so that two
    processes that write `path` at the same time do not write into each other's file.
    """
    final = Path(path)
    if temporary is None:
        with (
            TemporaryDirectory(prefix=".partial-", dir=final.parent) as folder,
            whole_or_not_at_all(final, Path(folder) / final.name) as partial,
        ):
            yield partial
        return
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(final.parent)  # so that the new name survives a power cut


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
