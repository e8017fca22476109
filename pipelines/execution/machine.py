"""The machine on which Ray is to be started: what it lacks is reported before, in milliseconds, or made up for."""

from __future__ import annotations

import os
import re
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gross_ray.errors import ResourcesError

IN_PROCESS = "use --in-process, which needs no Ray"
"""The remedy that helps on every machine."""
SHARED_MEMORY = Path("/dev/shm")
"""Where Ray keeps its objects; other folders are slower."""
FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders for Ray's temporary files, if the one that the environment names cannot be used."""
PATH_BYTES = 107 - len("/ray/session_2026-12-01_00-00-00_000000_/sockets/plasma_store")
"""Length of the temporary folder's path and a process id, because Ray's sockets are there: the kernel allows 107."""
ROOM_BYTES = 100 * 2**20
"""Room that Ray's logs and its smallest store of objects need in a folder."""
OBJECT_STORE_BYTES = 10 * 10**9
"""The largest store of objects outside the shared memory; Ray has the same limit."""
DESCRIPTORS = 128
"""Twice the files, with sockets, that each of Ray's servers has open at once."""
DESCRIPTORS_A_CORE = 16
"""Twice those for one worker."""
THREADS = 200
"""Threads of Ray's servers and of the driver; each counts as a process for the limits of the system."""
THREADS_A_CORE = 40
"""Threads of one worker."""
_PLAIN = re.compile(r"[A-Za-z0-9/._+=@,-]+")
"""Paths that Ray can hand to its processes: it joins their command lines by spaces."""


@dataclass(frozen=True)
class Place:
    """Where a Ray that is started here has its files."""

    options: dict[str, Any]
    """Arguments of ray.init."""
    notes: tuple[str, ...] = ()
    """What differs from the usual, one line each."""

    @property
    def logs(self) -> str:
        """The folder of Ray's logs."""
        return f"{self.options['_temp_dir']}/session_latest/logs"


def check_limits(cores: int) -> None:
    """Raise ResourcesError if the system allows fewer open files or processes than Ray with `cores` workers needs."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = DESCRIPTORS + DESCRIPTORS_A_CORE * cores
    if most != resource.RLIM_INFINITY and most < needed:
        raise ResourcesError(
            f"Ray with {cores} workers needs {needed} open files, and this process may have {most}: raise the limit "
            f"(ulimit -Hn {needed}, or docker run --ulimit nofile={needed}), give fewer --num-cpus, or {IN_PROCESS}"
        )
    needed = THREADS + THREADS_A_CORE * cores
    for free, limit, remedy in _free_processes():
        if free < needed:
            raise ResourcesError(
                f"Ray with {cores} workers starts about {needed} processes and threads, and {limit} leaves {free}: "
                f"{remedy}, give fewer --num-cpus, or {IN_PROCESS}"
            )


def _free_processes() -> list[tuple[int, str, str]]:
    """Return each limit on the number of processes: how many more it allows, its name, and how to raise it."""
    found = []
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if most != resource.RLIM_INFINITY and os.getuid() != 0:  # the kernel does not limit root
        running = _threads_of_user()
        found.append((max(0, most - running), f"the user's limit of {most} (ulimit -u)", "raise it"))
    for folder in _control_groups():
        with suppress(OSError, ValueError):  # not limited: "max", or no such file
            most = int((folder / "pids.max").read_text())
            running = int((folder / "pids.current").read_text())
            limit = f"the container's limit of {most} ({folder}/pids.max)"
            found.append((max(0, most - running), limit, "raise it (docker run --pids-limit)"))
    return found


def _threads_of_user() -> int:
    """Return the number of this user's threads, each of which counts as a process; 0 on systems without /proc."""
    total, me = 0, str(os.getuid())
    for file in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError, KeyError):  # no longer running
            fields = dict(line.split(":", 1) for line in file.read_text(errors="replace").splitlines() if ":" in line)
            if fields["Uid"].split()[0] == me:
                total += int(fields["Threads"])
    return total


def _control_groups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Return the folders whose file pids.max may limit this process: its own group's, and all above it."""
    found = []
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "pids"):
                top = root / controllers
                found += [top / path.strip("/"), *(top / parent for parent in Path(path.strip("/")).parents)]
    return list(dict.fromkeys(found))


def place() -> Place:
    """Return where Ray's files go; raises ResourcesError, naming the remedy, if there is no folder for them."""
    wanted = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or FOLDERS[0]
    refused = {}
    for folder in dict.fromkeys((wanted, *FOLDERS)):
        reason = _unfit(folder)
        if reason is None:
            break
        refused[folder] = reason
    else:
        raise ResourcesError(
            f"no folder for Ray's temporary files: {'; '.join(f'{name} {why}' for name, why in refused.items())}: "
            f"set RAY_TMPDIR to another one, or {IN_PROCESS}"
        )
    own = os.path.join(folder, "ray")
    if os.path.exists(own) and not os.access(own, os.W_OK | os.X_OK):  # another user's
        own = os.path.join(folder, f"ray-{os.getuid()}")
    options: dict[str, Any] = {"_temp_dir": own}
    notes = []
    if wanted in refused:
        notes.append(f"Ray's temporary files are in {own}: {wanted} {refused[wanted]}")
    if sys.platform == "linux" and (reason := _not_writable(str(SHARED_MEMORY))) is not None:
        from ray._private.utils import estimate_available_memory  # here, so that this module is read without Ray

        room = min(0.9 * _room(folder), 0.3 * estimate_available_memory(), OBJECT_STORE_BYTES)
        options |= {"_plasma_directory": folder, "object_store_memory": int(room)}
        notes.append(f"Ray's objects are in {folder}: the shared memory {SHARED_MEMORY} {reason}")
    return Place(options, tuple(notes))


def _unfit(folder: str) -> str | None:
    """Return why Ray cannot have its temporary files in a folder; None if it can."""
    longest = PATH_BYTES - len(str(os.getpid()))
    if not os.path.isabs(folder):
        return "is no absolute path"
    if (length := len(os.fsencode(folder))) > longest:
        return f"is a path of {length} bytes, and a socket's path leaves it {longest}"
    if not _PLAIN.fullmatch(folder):
        return "has characters other than letters, digits and /._+=@,-"
    if (reason := _not_writable(folder)) is not None:
        return reason
    if (room := _room(folder)) < ROOM_BYTES:
        return f"has room for {room / 2**20:.0f} MiB, and Ray needs {ROOM_BYTES / 2**20:.0f}"
    return None


def _not_writable(folder: str) -> str | None:
    """Return why nothing can be written into a folder, as the end of a sentence; None if it can."""
    if not os.path.isdir(folder):
        return "is not there"
    return None if os.access(folder, os.W_OK | os.X_OK) else "cannot be written"


def _room(folder: str) -> int:
    """Return the bytes that can still be written into a folder."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
