"""One driver a run folder. The lock names host, process and time; a dead owner's is taken over.

In a local folder the kernel holds it (flock) and lets go when the process dies. A bucket has no locks: there it is a
lease, a file that its owner writes again and again. One that stays as it is belongs to nobody any more.
"""

from __future__ import annotations

import _thread
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gross_ray.errors import GrossRayError, RunFolderError, StorageError
from gross_ray.results.storage import Storage

LOCK = ".lock"
REFRESH_SECONDS = 15.0
"""How often a lease is written again."""
STALE_SECONDS = 60.0
"""How long a lease may stay as it is before it is taken over."""
POLL_SECONDS = 2.0
"""How often another one's lease is looked at meanwhile."""
SETTLE_SECONDS = 1.0
"""How long after taking a lease another driver may have written its own in its place."""


@contextmanager
def held(storage: Storage) -> Iterator[None]:
    """Hold the lock of a run folder.

    Raises RunFolderError naming the host, process and time of a living owner. Where a lease is lost while the block
    runs (its process was asleep for longer than STALE_SECONDS, say), the block is interrupted, and the same is raised.
    """
    if storage.folder is not None:
        with _flock(storage, storage.folder / LOCK):
            yield
        return
    lease = _Lease(storage)
    lease.take()
    try:
        yield
    except KeyboardInterrupt:
        if lease.lost_to is None:
            raise
        raise RunFolderError(
            f"run folder {storage} was taken over by {lease.lost_to} while this process did not answer: "
            "what it stored is kept; let one of the two go on alone"
        ) from None
    finally:
        lease.give_back()


@contextmanager
def _flock(storage: Storage, path: Path) -> Iterator[None]:
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(storage, file.read().strip() or "another process") from None
        except OSError as error:
            raise RunFolderError(
                f"cannot lock {file.name}: {error}; give an --out on a file system that has locks"
            ) from None
        try:
            file.truncate(0)
            file.write(_owner(_me()))
            file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}; free space, or give another --out") from None
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it with a forked child


class _Lease:
    """A lock that lives as long as it is written again."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self._me = storage, _me() | {"token": uuid.uuid4().hex}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="gross_ray lease", daemon=True)
        self.lost_to: str | None = None

    def take(self) -> None:
        found = self._read()
        if found is not None and not _owner_is_dead(found):
            self._watch(found)
        self._write()
        time.sleep(SETTLE_SECONDS)
        found = self._read()
        if found is None or found.get("token") != self._me["token"]:
            raise _in_use(self._storage, _owner(found or {}))
        self._thread.start()

    def give_back(self) -> None:
        self._ended.set()
        self._thread.join()
        found = self._read()
        if found is not None and found.get("token") == self._me["token"]:
            self._storage.delete(LOCK)

    def _watch(self, found: dict[str, Any]) -> None:
        """Wait until a lease is stale; raise where it is written again."""
        watched_since = time.monotonic()
        while time.monotonic() - watched_since < STALE_SECONDS:
            time.sleep(POLL_SECONDS)
            now = self._read()
            if now is None:
                return
            if now != found:
                raise _in_use(self._storage, _owner(now))

    def _keep(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            try:
                found = self._read()
                if found is not None and found.get("token") != self._me["token"]:
                    self.lost_to = _owner(found)
                    _thread.interrupt_main()
                    return
                self._write()
            except GrossRayError:
                continue  # the store is away: the work itself will say so, and the next round tries again

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._storage.read(LOCK))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        self._me["refreshed"] = _now()
        self._storage.write(LOCK, json.dumps(self._me).encode())


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": _now(),
        "kernel": _kernel(),
        "started": _started(os.getpid()),
    }


def _owner(found: dict[str, Any]) -> str:
    if "pid" not in found:
        return "another process"
    return f"process {found['pid']} on {found.get('host')} since {found.get('since')}"


def _owner_is_dead(found: dict[str, Any]) -> bool:
    """Whether the owner's process ran below this kernel, where one can look, and is gone."""
    kernel = _kernel()
    if kernel is None or found.get("kernel") != kernel or not isinstance(found.get("pid"), int):
        return False
    return _started(found["pid"]) != found.get("started")


def _kernel() -> str | None:
    """Return what is equal for two processes exactly if they see each other's numbers; None where that is not Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process began, in the kernel's ticks; None if there is none of that number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _in_use(storage: Storage, owner: str) -> RunFolderError:
    return RunFolderError(
        f"run folder {storage} is in use by {owner}: wait until it ends, stop it, or give another --out"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
