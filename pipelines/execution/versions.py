"""Versions of a process: a worker whose gross_ray, torch or Python differs from its driver's is refused."""

from __future__ import annotations

import hashlib
import platform
import socket
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import ray
import torch

import gross_ray
from gross_ray.errors import VersionMismatchError

PACKAGES = (Path(gross_ray.__file__).parent, Path(__file__).parents[1])
"""The folders from which this process imports gross_ray and pipelines."""


@dataclass(frozen=True)
class Versions:
    """The versions on which a run depends, without Ray's, which Ray compares itself."""

    gross_ray: str
    """Version and a hash of the sources, because two checkouts of one version may differ."""
    torch: str
    """Version without the build: 2.9.0+cpu and 2.9.0+cu128 may work together."""
    python: str
    """Major and minor version."""

    @classmethod
    def here(cls) -> Versions:
        """Return the versions of this process."""
        sources = f"{gross_ray.__version__} (sources {_hash_of_sources()})"
        return cls(sources, torch.__version__.partition("+")[0], ".".join(platform.python_version_tuple()[:2]))

    def check(self) -> None:
        """Raise VersionMismatchError unless this process, a worker, has these versions, which are its driver's."""
        here = Versions.here()
        different = [
            f"{field.name} {getattr(here, field.name)}, the driver {getattr(self, field.name)}"
            for field in fields(self)
            if getattr(here, field.name) != getattr(self, field.name)
        ]
        if different:
            raise VersionMismatchError(
                f"the worker on node {ray.util.get_node_ip_address()} ({socket.gethostname()}) runs "
                f"{' and '.join(different)}; it imports gross_ray from {PACKAGES[0]}: "
                "install the same versions there, or take that node out of the cluster"
            )


@cache
def _hash_of_sources() -> str:
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{file.relative_to(package.parent)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
