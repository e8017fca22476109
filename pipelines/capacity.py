"""What can run at the same time: the machine or the cluster, counted in units of work."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from gross_ray.run.store import RunStore
from pipelines.nodes import NodeKind

THREAD_EFFICIENCY = 0.6
"""n threads do n^0.6 times the work of one (measured: 1.4 to 1.8 times with 2, training the four-conv network, and a
fraction of that if something else wants one of the cores)."""
UNITS_A_WORKER = 4
"""How many units of a kind that is cut for the workers there are in the experiment, for each worker."""
_STAGE = "threads"


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The nodes that a unit of work fits on, those that an autoscaler may add included."""

    nodes: tuple[NodeKind, ...]
    device: str
    """cpu or cuda."""
    gpus_per_unit: float = 0.0
    """GPUs that a unit gets on cuda."""
    autoscales: bool = False
    """Whether nodes come as work waits for them, and go when nothing runs on them."""
    one_at_a_time: bool = False
    """Whether one unit is done after another, as in a process of its own."""

    @property
    def num_cpus(self) -> int:
        """CPU cores of all nodes."""
        return sum(node.num_cpus * node.count for node in self.nodes)

    @property
    def num_gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.num_gpus * node.count for node in self.nodes)

    @property
    def cores_per_node(self) -> int:
        """CPU cores of the smallest node: a unit never asks for more."""
        return min(node.num_cpus for node in self.nodes)

    def slots(self, threads: int = 1) -> int:
        """Return how many units of work, of so many CPU threads each, run at the same time at most.

        Units are counted node by node: two nodes of three cores hold two units of two threads, not three.
        """
        if self.one_at_a_time:
            return 1
        return max(1, sum(node.count * self._on(node, threads) for node in self.nodes))

    def _on(self, node: NodeKind, threads: int) -> int:
        slots = node.num_cpus // threads
        if self.device != "cuda":
            return slots
        if self.gpus_per_unit < 1:  # Ray never cuts a unit's share out of two GPUs
            on_gpus = int(node.num_gpus) * int(1 / self.gpus_per_unit)
        else:
            on_gpus = int(node.num_gpus / self.gpus_per_unit)
        return min(slots, on_gpus)

    def threads(self, num_units: int) -> int:
        """Return the CPU threads of each of `num_units` equal units with which all of them end soonest."""

        def duration(threads: int) -> float:
            return ceil(max(1, num_units) / self.slots(threads)) / threads**THREAD_EFFICIENCY

        return min(range(1, self.cores_per_node + 1), key=duration)

    def units_on_a_device(self, threads: int) -> int:
        """Return how many units, of so many CPU threads each, share a node's processor, or a GPU."""
        if self.one_at_a_time:
            return 1
        if self.device == "cuda":
            return max(1, int(1 / self.gpus_per_unit))
        return max(1, self.cores_per_node // threads)


def settled_threads(store: RunStore, kind: str, num_units: int | None, capacity: Capacity) -> int:
    """Return the CPU threads of each unit of a kind: as many as its first unit had, as far as a node has the cores.

    They are settled once for a run folder, by how many units of the kind the experiment has, whichever command asks
    for them: with another number of threads sums round differently. None: several for each worker.
    """
    if not store.has_checkpoint(_STAGE, kind):
        number = UNITS_A_WORKER * capacity.slots() if num_units is None else num_units
        store.save_checkpoint(_STAGE, kind, {}, {"threads": capacity.threads(number)})
    _, about = store.load_checkpoint(_STAGE, kind)
    return min(about["threads"], capacity.cores_per_node)
