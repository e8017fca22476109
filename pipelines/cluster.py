"""Ray: joined at an address or started on this machine, quietly, and left as it was found."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

# Before Ray is imported: no usage statistics, no boxes from Tune, its token authentication explicitly on.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
if "ray" not in sys.modules:  # set later, its server would ask for the token and this process not send it
    os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_SYNCER", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray  # noqa: E402

from gross_ray.errors import InvalidValueError, ResourcesError  # noqa: E402

DEVICES = ("auto", "cpu", "cuda")
CONNECT_SECONDS = 10.0
"""How long a named cluster may take to answer."""
THREAD_EFFICIENCY = 0.85
"""n threads do n^0.85 times the work of one (measured: 1.8 times with 2, training the four-conv network)."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where the work is done; nothing in here changes what an experiment means."""

    address: str | None = None
    """Address of a running cluster; None: RAY_ADDRESS, or start Ray on this machine."""
    num_cpus: int | None = None
    """CPU cores to use of this machine; None: all. Refused together with an address."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where the cluster has a GPU."""
    gpus_per_unit: float = 0.25
    """GPUs for each unit of work on cuda; below 1, units share one."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InvalidValueError(f"device = {self.device!r}: must be one of {', '.join(DEVICES)}")
        if self.num_cpus is not None and self.num_cpus < 1:
            raise InvalidValueError(f"num_cpus = {self.num_cpus}: must be 1 or more")
        if self.gpus_per_unit <= 0:
            raise InvalidValueError(f"gpus_per_unit = {self.gpus_per_unit}: must be above 0")
        if self.num_cpus is not None and self.joined_address is not None:
            raise InvalidValueError(
                f"num_cpus = {self.num_cpus} with the running cluster {self.joined_address}: "
                "it has the cores it was started with; leave one of the two out"
            )

    @property
    def joined_address(self) -> str | None:
        """The running cluster to join, if one is named."""
        return self.address or os.environ.get("RAY_ADDRESS") or None


@dataclass(frozen=True)
class Cluster:
    """What the connected cluster has, and how units of work are placed on it."""

    num_cpus: int
    num_gpus: float
    device: str
    gpus_per_unit: float
    cores_per_node: int
    """Cores of the smallest node that has any: a unit never asks for more."""

    def slots(self, threads: int = 1) -> int:
        """Return how many units of work, of so many CPU threads each, run at the same time at most."""
        slots = max(1, self.num_cpus // threads)
        if self.device == "cuda":
            return max(1, min(slots, int(self.num_gpus / self.gpus_per_unit)))
        return slots

    def threads(self, num_units: int) -> int:
        """Return the CPU threads of each of `num_units` equal units with which all of them end soonest.

        It depends on all units of a stage, not on those still to do, so that a resumed run rounds the same.
        """

        def duration(threads: int) -> float:
            return ceil(max(1, num_units) / self.slots(threads)) / threads**THREAD_EFFICIENCY

        return min(range(1, self.cores_per_node + 1), key=duration)


@contextmanager
def connected(resources: Resources) -> Iterator[Cluster]:
    """Connect to Ray while the block runs.

    Raises ResourcesError if the cluster cannot be reached or lacks what was asked for.
    """
    started_here = not ray.is_initialized()
    if started_here:
        _connect(resources)
    try:
        yield _describe(resources)
    finally:
        if started_here:
            ray.shutdown()


def _connect(resources: Resources) -> None:
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    address = resources.joined_address
    try:
        if address is not None:
            _check_listening(address)
            ray.init(address=address, **quiet)
        else:
            cores = resources.num_cpus or os.cpu_count() or 1
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"the cluster at {address}" if address else "Ray on this machine"
        reason = str(error).splitlines()[0]
        raise ResourcesError(f"cannot reach {where}: {reason}; check --address and that it runs") from None


def _check_listening(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT: Ray itself would knock for many minutes."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _describe(resources: Resources) -> Cluster:
    there = ray.cluster_resources()
    num_cpus, num_gpus = int(there.get("CPU", 0)), float(there.get("GPU", 0))
    if num_cpus < 1:
        raise ResourcesError("the cluster has no CPU core to work on; start it with num_cpus of 1 or more")
    device = resources.device
    if device == "auto":
        device = "cuda" if num_gpus > 0 else "cpu"
    if device == "cuda" and num_gpus < resources.gpus_per_unit:
        raise ResourcesError(
            f"a unit of work asks for {resources.gpus_per_unit:g} GPU, the cluster has {num_gpus:g}; "
            "use --device cpu, or a cluster with GPUs"
        )
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return Cluster(num_cpus, num_gpus, device, resources.gpus_per_unit, min(count for count in cores if count > 0))
