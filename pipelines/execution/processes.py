"""Ray's processes on this machine: the nodes that run here, dead servers, and what a Ray that was started here left."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

MARK = "GROSS_RAY_STARTED"
"""Environment variable of all processes of a Ray that a `gross` command has started for itself."""
ORPHAN_SECONDS = 10.0
"""How long to search for and end remaining processes of a Ray that was started here."""
SERVERS = ("gcs_server", "raylet")
"""The programs of Ray without which a node does not work."""
_SESSION_TIME = "%Y-%m-%d_%H-%M-%S_%f"
"""Format of the local time in the names of Ray's sessions."""


@dataclass(frozen=True)
class LocalNode:
    """A node of a cluster, running on this machine."""

    address: str
    """HOST:PORT of its cluster."""
    private: bool
    """Whether a `gross` command has started it for itself."""


def local_nodes() -> list[LocalNode]:
    """Return the nodes that run on this machine, by their processes; none on systems without /proc."""
    found = []
    for process in processes():
        with suppress(OSError):  # no longer running
            words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
            options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
            if Path(words[0]).name == "raylet" and "--gcs-address" in options:
                found.append(LocalNode(options["--gcs-address"], _has_mark(process)))
    return found


def dead_servers() -> dict[str, str]:
    """Return the servers of Ray that this process started and that have died: the program of each process id."""
    found: dict[str, str] = {}
    for process in processes():
        with suppress(OSError, ValueError):  # no longer running
            name, _, rest = Path(f"/proc/{process}/stat").read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if name in SERVERS and state == "Z" and int(parent) == os.getpid():
                found[process] = name
    return found


def end_orphans(mark: str, began: datetime | None) -> None:
    """End remaining processes of a Ray that was started here: agents survive a node that is ended while it starts them.

    `began` is the time of the start; None if a running cluster was joined, which this process may have started, too. A
    node may start agents while the processes are listed, so the search ends after two empty ones in a row.
    """
    num_empty, deadline = 0, time.monotonic() + ORPHAN_SECONDS
    while num_empty < 2 and time.monotonic() < deadline:
        found = [process for process in map(int, processes()) if _is_ours(process, mark, began)]
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        num_empty = 0 if found else num_empty + 1
        time.sleep(0.05)


def processes() -> list[str]:
    """Return the ids of all processes of this machine; none on systems without /proc."""
    return [name for name in os.listdir("/proc") if name.isdecimal()] if os.path.isdir("/proc") else []


def _has_mark(process: str | int, mark: str = "") -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{process}/environ").read_bytes()
    except OSError:  # another user's process, or no longer running
        return False


def _is_ours(process: int, mark: str, began: datetime | None) -> bool:
    return _has_mark(process, mark) or (began is not None and _logs_here(process, began))


def _logs_here(process: int, began: datetime) -> bool:
    """Return whether a process of Ray has an open log of a session that this process started after `began`.

    A session's name has the time and the process that started it. The mark is not enough, because Ray's agents
    overwrite their environment with their titles.
    """
    session = re.compile(rf"/session_([^/]*)_{os.getpid()}/")
    try:
        if not Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::"):
            return False
        descriptors = os.listdir(f"/proc/{process}/fd")
    except OSError:  # another user's process, or no longer running
        return False
    for descriptor in descriptors:
        with suppress(OSError):  # closed meanwhile
            found = session.search(os.readlink(f"/proc/{process}/fd/{descriptor}"))
            if found and found.group(1) >= began.strftime(_SESSION_TIME):
                return True
    return False
