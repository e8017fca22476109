"""The resources that the user asks for: which cluster or machine, and how much of it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from gross_ray.errors import InvalidValueError, is_whole

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where the work is done; it does not change the meaning of an experiment."""

    address: str | None = None
    """Address of a running cluster; None: RAY_ADDRESS, or start Ray on this machine."""
    num_cpus: int | None = None
    """CPU cores of this machine to use; None: all. Refused together with an address."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda if the cluster has a GPU."""
    gpus_per_unit: float = 0.25
    """GPUs for each unit of work on cuda; below 1, units share one."""
    in_process: bool = False
    """Run the units in this process, and join no cluster, whatever RAY_ADDRESS says."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InvalidValueError(f"device = {self.device!r}: must be one of {', '.join(DEVICES)}")
        if self.num_cpus is not None and not is_whole(self.num_cpus, 1):
            raise InvalidValueError(f"num_cpus = {self.num_cpus}: must be 1 or more")
        if not 0 < self.gpus_per_unit < math.inf:  # False for nan too
            raise InvalidValueError(f"gpus_per_unit = {self.gpus_per_unit}: must be above 0, and finite")
        if self.gpus_per_unit > 1 and not float(self.gpus_per_unit).is_integer():
            raise InvalidValueError(f"gpus_per_unit = {self.gpus_per_unit}: must be a whole number above 1")
        if self.num_cpus is not None and self.joined_address is not None:
            raise InvalidValueError(
                f"num_cpus = {self.num_cpus} with the running cluster {self.joined_address}: "
                "it has the cores it was started with; leave one of the two out"
            )

    def without_effect(self, device: str) -> list[str]:
        """Return a line for each option that has no effect on `device`."""
        if device.startswith("cuda") or self.gpus_per_unit == Resources.gpus_per_unit:
            return []
        return [f"--gpus-per-unit {self.gpus_per_unit:g}: units are done on {device}"]

    @property
    def joined_address(self) -> str | None:
        """The address of the running cluster to join; None: start Ray here. As in Ray, RAY_ADDRESS decides for auto."""
        around = os.environ.get("RAY_ADDRESS") or None
        address = around or self.address if self.address in (None, "auto") else self.address
        return None if self.in_process or address == "local" else address

    @property
    def address_option(self) -> str:
        """What names the cluster to join: --address or RAY_ADDRESS."""
        return "--address" if self.address == self.joined_address else "RAY_ADDRESS"
