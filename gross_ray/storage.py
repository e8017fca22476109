"""Files below one root: a local folder, or a bucket that pyarrow's filesystems know. No file is ever half written.

A call to a store that does not answer is repeated, with growing pauses; a refusal is final. No message shows a secret.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.errors import InvalidValueError, StorageError

PATIENCE_SECONDS = 300.0
"""How long calls to a store that does not answer are repeated."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SLIP = re.compile(r"(file|s3|gs|gcs|hdfs|viewfs|abfss?):(?!//)", re.IGNORECASE)
"""The scheme of one of pyarrow's URIs without both slashes."""
_NOT_OF_A_CALL = (pa.ArrowMemoryError, pa.ArrowCancelled)
"""Errors that a call to a store may raise and that have nothing to do with the store."""
_WITH_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^@]*:.*@")
_SECRET_FIELD = re.compile(r"[?&]([^=&]*(?:key|secret|token|password|credential|sig)[^=&]*)=", re.IGNORECASE)
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY")
# Errors that a repetition would not change. pyarrow passes on the store's error text only, so it is matched.
_REFUSED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|NO_SUCH_KEY|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_TOKEN|"
    r"EXPIRED_TOKEN|TOKEN_REFRESH|UNRECOGNIZED_CLIENT|PERMISSION|PRECONDITION|Unauthenticated|PermissionDenied|"
    r"HTTP status 40[0-7]|Bucket .* not found|does not exist",
    re.IGNORECASE,
)
_REMEDIES = {
    errno.ENOSPC: "free space there; the same command again does what is missing",
    errno.EDQUOT: "free space below your quota; the same command again does what is missing",
    errno.EACCES: "change its permissions, or choose another --out",
    errno.EPERM: "change its permissions, or choose another --out",
    errno.EROFS: "choose an --out that can be written",
}

Result = TypeVar("Result")


class Storage:
    """The files below one root, by their relative names ("tables/runs/a.parquet"). It pickles to its address."""

    patience: float | None = None
    """Seconds for which calls to a store that does not answer are repeated; None: PATIENCE_SECONDS."""

    def __init__(self, address: str | Path) -> None:
        """Take a local path or a URI (s3://bucket/folder, gs://, file://, ...); no file is made or read yet.

        Raises StorageError, and InvalidValueError for a URI that is unknown to pyarrow, incomplete or holds credentials
        (they come from the environment, so that no process list, log or pickle shows them).
        """
        self._address = _checked(str(address))
        local = _local_path(self._address)
        if local is not None:
            self.folder: Path | None = Path(local).resolve()
            """The root if it is a local folder, else None."""
            self.filesystem: fs.FileSystem = fs.LocalFileSystem()
            """pyarrow's filesystem."""
            self.root = str(self.folder)
            """The root's path in `filesystem`."""
        else:
            self.folder = None
            self.filesystem, self.root = self._ask("reach", "", lambda: _filesystem(self._address))

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self._address if self.folder is None else str(self.folder),)

    def __str__(self) -> str:
        return self._address if self.folder is None else str(self.folder)

    def impatient(self) -> Storage:
        """Return a storage of the same files that never repeats a call."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), patience=0.0)
        return other

    def shown(self, name: str) -> str:
        """Return a file's address for messages, without the URI's query."""
        return f"{str(self).split('?')[0].rstrip('/')}/{name}"

    def path(self, name: str) -> str:
        """Return a file's path in `filesystem`."""
        return f"{self.root}/{name}"

    def make(self) -> None:
        """Make the root if it is a local folder; a bucket's folders are only names. Raises StorageError."""
        if self.folder is not None:
            self._ask("make", "", lambda: self._local("").mkdir(parents=True, exist_ok=True))

    def write(self, name: str, data: bytes | memoryview | pa.Buffer) -> None:
        """Store or replace a file. Raises StorageError, and then the old file is unchanged."""
        if self.folder is not None:
            self._ask("write", name, lambda: _replace(self._local(name), data))
        else:
            self._ask("write", name, lambda: self._put(name, data))

    def read(self, name: str) -> bytes:
        """Return a file's content. Raises FileNotFoundError and StorageError."""

        def all_of_it() -> bytes:
            with self.filesystem.open_input_file(self.path(name)) as file:
                return file.read()

        return self._ask("read", name, all_of_it)

    def exists(self, name: str) -> bool:
        """Return whether a file exists. Raises StorageError."""
        info = self._ask("look for", name, lambda: self.filesystem.get_file_info(self.path(name)))
        return info.type == fs.FileType.File

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files directly in a folder. Raises StorageError."""
        return [info.base_name for info in self._list(folder) if info.type == fs.FileType.File]

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder. Raises StorageError."""
        return [info.base_name for info in self._list(folder) if info.type == fs.FileType.Directory]

    def entries(self) -> list[str]:
        """Return the names of all files and folders at the root, hidden ones too. Raises StorageError."""
        return [info.base_name for info in self._list("")]

    def all_files(self) -> list[tuple[str, int, int]]:
        """Return the name, size and time (ns) of each file at any depth, sorted by name. Raises StorageError."""
        selector = fs.FileSelector(self.root, allow_not_found=True, recursive=True)
        found = self._ask("list", "", lambda: self.filesystem.get_file_info(selector))
        names = {each.path.removeprefix(f"{self.root}/"): each for each in found if each.type == fs.FileType.File}
        return [(name, names[name].size, names[name].mtime_ns) for name in sorted(names)]

    def delete(self, name: str) -> None:
        """Delete a file if it exists. Raises StorageError."""

        def away() -> None:
            with suppress(FileNotFoundError):
                self.filesystem.delete_file(self.path(name))

        self._ask("delete", name, away)

    def remove_leftovers(self) -> None:
        """Delete the temporary files of local writers that were killed; an unfinished upload leaves no file."""
        if self.folder is not None:
            for pattern in (".*.tmp", "*/*/.*.tmp"):
                for file in self.folder.glob(pattern):
                    file.unlink(missing_ok=True)

    def _local(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name

    def _put(self, name: str, data: bytes | memoryview | pa.Buffer) -> None:
        path = self.path(name)
        if not self.filesystem.type_name.startswith(("s3", "gcs", "abfs")):
            self.filesystem.create_dir(str(PurePosixPath(path).parent), recursive=True)
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)

    def _list(self, folder: str) -> list[fs.FileInfo]:
        path = self.path(folder) if folder else self.root
        selector = fs.FileSelector(path, allow_not_found=True)
        return self._ask("list", folder, lambda: self.filesystem.get_file_info(selector))

    def patiently(self, what: str, name: str, action: Callable[[], Result]) -> Result:
        """Run work of any length that writes to this store; repeat it if the store does not answer.

        The time that the work takes is not counted: the patience begins with the first failure of a streak, and an
        attempt that runs for longer than the patience ends the streak. Raises StorageError if the store refuses or does
        not answer for too long. All other errors of the work are raised unchanged, such as a timeout of Ray or of
        another server (`_is_of_a_store`).
        """
        return self._repeated(what, name, action, self._is_of_a_store, long=True)

    def _ask(self, what: str, name: str, call: Callable[[], Result]) -> Result:
        """Make one call to the store, and repeat it as `patiently` does; every OSError counts as the store's."""
        return self._repeated(what, name, call, lambda error: not isinstance(error, _NOT_OF_A_CALL))

    def _repeated(
        self,
        what: str,
        name: str,
        action: Callable[[], Result],
        is_ours: Callable[[Exception], bool],
        *,
        long: bool = False,
    ) -> Result:
        patience = PATIENCE_SECONDS if self.patience is None else self.patience
        first_failure, pause = None, FIRST_PAUSE_SECONDS
        while True:
            begun = time.monotonic()
            try:
                return action()
            except (OSError, pa.ArrowException) as error:
                if not is_ours(error):
                    raise
                if isinstance(error, FileNotFoundError | NotADirectoryError):
                    if what == "read":
                        raise
                    raise StorageError(
                        f"cannot {what} {self.shown(name)}: no such folder or bucket exists; make it, or name another"
                    ) from None
                if self.folder is not None or _REFUSED.search(str(error)) or isinstance(error, PermissionError):
                    raise self.refused(what, name, error) from None
                now = time.monotonic()
                # A single call may itself wait that long for a store that does not answer, so it never ends the streak.
                if first_failure is None or (long and now - begun > patience):
                    first_failure, pause = now, FIRST_PAUSE_SECONDS
                if now - first_failure + pause > patience:
                    raise StorageError(
                        f"cannot {what} {self.shown(name)}: no answer for {patience:g} s ({_reason(error)}); "
                        "when the store is back, the same command again does what is missing"
                    ) from None
            time.sleep(pause * random.uniform(0.5, 1.0))  # so that not all workers repeat at the same moment
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _is_of_a_store(self, error: Exception) -> bool:
        """Return whether `error` comes from this store, rather than from anything else that the work did.

        For a store, pyarrow raises plain OSErrors without a file name. Other libraries (Ray, urllib, sockets) raise
        subclasses. Python's own functions name the file, which must be in this store's local folder.
        """
        if _raised_by_a_filesystem(error):
            return True
        if isinstance(error, OSError) and error.filename is not None:
            return self.folder is not None and Path(os.fsdecode(error.filename)).is_relative_to(self.folder)
        return type(error) is OSError

    def refused(self, what: str, name: str, error: Exception) -> StorageError:
        """Return the StorageError for an action on a file (`what`: write, read, ...) that failed for good."""
        number = error.errno if isinstance(error, OSError) else None
        remedy = _REMEDIES.get(number or 0, _REMEDY_LOCAL if self.folder is not None else _REMEDY_REMOTE)
        return StorageError(f"cannot {what} {self.shown(name)}: {_reason(error)}; {remedy}")


def _raised_by_a_filesystem(error: Exception) -> bool:
    """Return whether the error was raised inside one of pyarrow's filesystems or streams."""
    frame = error.__traceback__
    while frame is not None:
        if _FILESYSTEMS.search(frame.tb_frame.f_code.co_filename):
            return True
        frame = frame.tb_next
    return False


_FILESYSTEMS = re.compile(r"pyarrow[/\\](fs\.py|_\w*fs\.pyx|io\.pxi)$")
"""Source files of pyarrow, as tracebacks name them."""
_REMEDY_LOCAL = "check the disk; the same command again does what is missing"
_REMEDY_REMOTE = "check the address and what its credentials allow"


def _replace(path: Path, data: bytes | memoryview | pa.Buffer) -> None:
    """Write a file atomically; its temporary file has a name that `remove_leftovers` finds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with whole_or_not_at_all(path, temporary) as partial, partial.open("xb") as file:
        file.write(data)


@lru_cache(maxsize=32)
def _filesystem(address: str) -> tuple[fs.FileSystem, str]:
    # Cached, because pyarrow asks the network for a bucket's region.
    try:
        if not urlsplit(address).netloc:
            raise ValueError("it names no bucket")
        filesystem, root = fs.FileSystem.from_uri(address)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise InvalidValueError(
            f"cannot use {address}: {_reason(error)}; name a local folder, or a URI like s3://bucket/folder"
        ) from None
    return filesystem, root.rstrip("/")


def _checked(address: str) -> str:
    """Return the address with its scheme in lower case (RFC 3986, section 3.1).

    Raises InvalidValueError if it holds a password or a key, which messages would show, and if it is nearly a URI:
    taken for a local folder, the mistake would be noticed too late.
    """
    if slip := _SLIP.match(address):
        scheme, rest = slip.group(1).lower(), address[slip.end() :]
        meant = _checked(f"{scheme}://{rest.lstrip('/')}")
        if scheme == "file":
            meant = f"file://{rest}" if rest.startswith("/") else rest or "."
        raise InvalidValueError(
            f"{address}: a URI has :// after its scheme: write {meant}, or ./{address} for a folder"
        )
    password = _WITH_PASSWORD.match(address)
    if password or (_URI.match(address) and _SECRET_FIELD.search(address)):
        where = f"{password.group(1)}***@..." if password else address.split("?")[0]
        raise InvalidValueError(
            f"{where} holds credentials, which process lists and logs would show: pass them to pyarrow through the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...), a profile or the machine's role"
        )
    scheme, separator, rest = address.partition("://")
    return f"{scheme.lower()}{separator}{rest}" if _URI.match(address) else address


def _local_path(address: str) -> str | None:
    """Return the path of a local folder or of a file:// URI; None for any other URI.

    Raises InvalidValueError for a file:// URI with a host: its path would be another folder of this machine.
    """
    if not _URI.match(address):
        return address
    if not address.startswith("file://"):
        return None
    host, slash, path = address.removeprefix("file://").partition("/")
    if host.lower() not in ("", "localhost"):
        raise InvalidValueError(
            f"{address}: {host!r} is read as a host, and a file:// URI has none: write file:// and an absolute path, "
            f"like file://{Path(host, path).resolve()}"
        )
    return unquote(slash + path)


def _reason(error: Exception) -> str:
    """Return the first line of an error's text, in which *** replaces every secret of the environment."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    for name in _SECRET_VARIABLES:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text
