"""Tracebacks of errors that other libraries raise: a user sees one line, and the name of the file with the whole text.

This module imports the standard library alone, so that it also works where another import failed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

TRACEBACKS = "tracebacks.txt"
"""The file of a run folder to which tracebacks are appended."""
VARIABLE = "GROSS_RAY_TRACEBACK"
"""Environment variable; if it is set, tracebacks are printed on stderr too."""
_EXPERIMENT = "experiment.json"
"""The file that makes a folder a run folder, as in `experiment_file`, whose imports may be what failed."""


def keep_traceback(text: str, run: str | Path | None) -> str:
    """Append a traceback to a file of the run folder `run`, and return where it is, as the end of a sentence.

    If `run` is no run folder of this machine, or cannot be written, the file is a new one in the temporary folder; if
    that cannot be written either, the traceback is printed on stderr.
    """
    entry = f"{datetime.now(UTC).isoformat(timespec='seconds')} {' '.join(sys.argv)}\n{text.rstrip()}\n\n"
    place = _in_run_folder(entry, run) or _in_temporary_folder(entry)
    if place is None or os.environ.get(VARIABLE):
        print(entry, file=sys.stderr, end="", flush=True)
    return "the full traceback is above" if place is None else f"the full traceback is in {place}"


def _in_run_folder(entry: str, run: str | Path | None) -> Path | None:
    folder = None if run is None else _local(str(run))
    if folder is None:
        return None
    file = folder.absolute() / TRACEBACKS
    with suppress(OSError):  # a read-only folder, for example
        if (folder / _EXPERIMENT).is_file():
            with file.open("a", encoding="utf-8", errors="replace") as opened:
                opened.write(entry)
            return file
    return None


def _in_temporary_folder(entry: str) -> Path | None:
    with suppress(OSError):
        descriptor, name = tempfile.mkstemp(prefix="gross-traceback-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="replace") as opened:
            opened.write(entry)
        return Path(name)
    return None


def _local(address: str) -> Path | None:
    """Return the path of a local folder or of a file:// URI; None for a bucket."""
    if "://" not in address:
        return Path(address)
    parts = urlsplit(address)
    return Path(unquote(parts.path)) if parts.scheme.lower() == "file" else None
