"""The lock of a run folder: one driver at a time. It names host, process and time; a dead owner's lock is taken over.

In a local folder it is the kernel's lock (flock), which is released when the process dies. A bucket has no locks: there
it is a lease, a file that its owner rewrites regularly. A lease that no longer changes has lost its owner.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gross_ray.errors import RunFolderError, StorageError
from gross_ray.storage import Storage

LOCK = ".lock"
REFRESH_SECONDS = 15.0
"""How often the owner rewrites its lease."""
STALE_SECONDS = 480.0
"""Age from which a lease is taken over: longer than its owner waits for a store that does not answer."""
MARGIN_SECONDS = 60.0
"""How much earlier than STALE_SECONDS an owner that cannot write its lease gives up: the two clocks may differ."""
WATCH_SECONDS = 20.0
"""How long an old lease is watched before it is taken over: its owner may be alive, with a different clock."""
SETTLE_SECONDS = 1.0
"""How long a new owner waits to see whether another driver has overwritten its lease."""


@contextmanager
def held(storage: Storage) -> Iterator[None]:
    """Lock a run folder while the block runs.

    Raises RunFolderError naming the host, process and time of a living owner. If the lease is lost while the block runs
    (for example because the process was asleep for longer than STALE_SECONDS), a SIGINT to the main thread interrupts
    the block, and RunFolderError is raised.
    """
    if storage.folder is not None:
        descriptor = _flock(storage, storage.folder / LOCK)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it with a forked child
            os.close(descriptor)
        return
    lease = _Lease(storage)
    lease.take()
    try:
        yield
    except KeyboardInterrupt:
        if lease.lost_to is None:
            raise
        raise RunFolderError(
            f"run folder {storage} was lost to {lease.lost_to}, while this process could not write its lease: "
            "what it stored is kept; let one driver continue alone"
        ) from None
    finally:
        lease.give_back()


def _flock(storage: Storage, path: Path) -> int:
    """Lock a local file, write its owner into it, and return its descriptor."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise storage.refused("write", LOCK, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 1000).decode(errors="replace").strip()
        os.close(descriptor)
        raise _in_use(storage, owner or "another process") from None
    except OSError as error:
        os.close(descriptor)
        raise RunFolderError(f"cannot lock {path}: {error}; choose an --out on a file system with locks") from None
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _owner(_me()).encode())
    except OSError as error:
        os.close(descriptor)
        raise storage.refused("write", LOCK, error) from None
    return descriptor


class _Lease:
    """A lock that stays valid as long as its owner rewrites it."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self._me = storage, _me() | {"token": uuid.uuid4().hex}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="gross_ray lease", daemon=True)
        self.lost_to: str | None = None

    def take(self) -> None:
        found = self._read()
        if found is not None and not _owner_is_dead(found):
            self._require_stale(found)
        self._write()
        time.sleep(SETTLE_SECONDS)
        found = self._read()
        if found is None or found.get("token") != self._me["token"]:
            raise _in_use(self._storage, _owner(found or {}))
        # From here on each write is tried once: a delayed write could overwrite the lease of a new owner.
        self._storage = self._storage.impatient()
        self._thread.start()

    def give_back(self) -> None:
        """Delete the lease if this process still owns it. If the store does not answer, the lease expires instead."""
        self._stop.set()
        self._thread.join()
        with suppress(StorageError):
            found = self._read()
            if found is not None and found.get("token") == self._me["token"]:
                self._storage.delete(LOCK)

    def _require_stale(self, found: dict[str, Any]) -> None:
        """Raise RunFolderError unless the lease is old by this machine's clock and does not change while watched."""
        age = _age(found)
        if age is not None and age < STALE_SECONDS:
            raise _in_use(
                self._storage,
                f"{_owner(found)} (last active {max(0.0, age):.0f} s ago; if it is dead, the folder is free in "
                f"{STALE_SECONDS - max(0.0, age):.0f} s)",
            )
        time.sleep(WATCH_SECONDS)
        now = self._read()
        if now is not None and now != found:
            raise _in_use(self._storage, _owner(now))

    def _keep(self) -> None:
        written = time.monotonic()
        while not self._stop.wait(REFRESH_SECONDS):
            with suppress(StorageError):  # the work waits for the same store, and will report it
                found = self._read()
                if found is not None and found.get("token") != self._me["token"]:
                    self.lost_to = _owner(found)
                elif time.monotonic() - written <= STALE_SECONDS - MARGIN_SECONDS:
                    self._write()
                    written = time.monotonic()
            if self.lost_to is None and time.monotonic() - written > STALE_SECONDS - MARGIN_SECONDS:
                self.lost_to = "nobody yet, but its lease is old"
            if self.lost_to is not None:
                # A real signal, because it also interrupts a wait of the main thread.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

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
    """Return whether the owner's process ran on this kernel and no longer exists."""
    kernel = _kernel()
    if kernel is None or found.get("kernel") != kernel or not isinstance(found.get("pid"), int):
        return False
    return _started(found["pid"]) != found.get("started")


def _age(found: dict[str, Any]) -> float | None:
    """Return the seconds since a lease was written, comparing two machines' clocks; None if it has no valid time."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(str(found.get("refreshed")))).total_seconds()
    except (ValueError, TypeError):
        return None


def _kernel() -> str | None:
    """Return an identifier that processes share exactly if they see each other's process ids; None outside Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return the start time of a process in kernel ticks; None if no such process exists."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _in_use(storage: Storage, owner: str) -> RunFolderError:
    return RunFolderError(
        f"run folder {storage} is in use by {owner}: wait until it finishes, stop it, or choose another --out"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
