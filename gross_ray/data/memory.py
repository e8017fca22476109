"""How much memory is free on this machine, or in this container."""

from __future__ import annotations

from pathlib import Path

_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache"),
)
"""Files of a container (cgroups 2 and 1): its limit, what it uses, and the part of that which is only files' pages."""
_WHERE_UNKNOWN = 2**32


def free_memory(root: Path = Path("/")) -> int:
    """Return the number of free bytes, at most those that a container may still take; 4 GiB where no file says so.

    `root` is the folder of the system's files, for tests.
    """
    free = _named(root / "proc/meminfo", "MemAvailable:")
    free = _WHERE_UNKNOWN if free is None else free * 1024
    for limit, used, stat, pages in _LIMITS:
        most, now = (_number(root / "sys/fs/cgroup" / file) for file in (limit, used))
        if most is not None and now is not None:
            free = min(free, max(0, most - now + (_named(root / "sys/fs/cgroup" / stat, pages) or 0)))
    return free


def _named(path: Path, name: str) -> int | None:
    """Return the number after a name in a file of names and numbers."""
    try:
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[:1] == [name])
    except (OSError, ValueError, StopIteration):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no container, or "max": no limit
        return None
