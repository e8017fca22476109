"""Kinds of nodes. This module also runs on a cluster's head, which may lack torch: it imports only Python's library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeKind:
    """A number of nodes with the same cores and GPUs."""

    num_cpus: int
    num_gpus: float
    count: int = 1

    def __str__(self) -> str:
        cores = f"{self.num_cpus} CPU core{'s' if self.num_cpus != 1 else ''}"
        gpus = f" and {self.num_gpus:g} GPU{'s' if self.num_gpus > 1 else ''}" if self.num_gpus else ""
        return f"{self.count} node{'s' if self.count != 1 else ''} of {cores}{gpus}"
