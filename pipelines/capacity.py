"""The capacity of a machine or cluster: how many units of work run at the same time, with how many threads."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from gross_ray.run.store import RunStore
from pipelines.nodes import NodeKind

THREAD_EFFICIENCY = 0.6
"""n threads do n^0.6 times the work of one (measured: 1.4 to 1.8 times with 2, training the four-conv network, and much
less if another process uses one of the cores)."""
UNITS_A_WORKER = 4
"""Number of units for each worker, for a kind whose work is divided among the workers."""
_STAGE = "threads"


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The nodes on which a unit of work fits, including those that an autoscaler may add."""

    nodes: tuple[NodeKind, ...]
    device: str
    """cpu or cuda."""
    gpus_per_unit: float = 0.0
    """GPUs for each unit on cuda."""
    autoscales: bool = False
    """Whether an autoscaler adds nodes when work waits, and removes idle ones."""
    one_at_a_time: bool = False
    """Whether units run one after another, as in one process."""
    private: bool = False
    """Whether Ray was started on this machine for this session alone, so that nobody else asks for its cores."""

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
        """CPU cores of the largest node, the most that a unit may ask for."""
        return max(node.num_cpus for node in self.nodes)

    def slots(self, threads: int = 1) -> int:
        """Return the maximum number of units, of `threads` CPU threads each, that run at the same time.

        Units are counted node by node: two nodes of three cores run two units of two threads, not three.
        """
        if self.one_at_a_time:
            return 1
        return max(1, sum(node.count * self._on(node, threads) for node in self.nodes))

    def _on(self, node: NodeKind, threads: int) -> int:
        slots = node.num_cpus // threads
        if self.device != "cuda":
            return slots
        if self.gpus_per_unit < 1:  # Ray takes a unit's share from one GPU, never from two
            on_gpus = int(node.num_gpus) * int(1 / self.gpus_per_unit)
        else:
            on_gpus = int(node.num_gpus / self.gpus_per_unit)
        return min(slots, on_gpus)

    def threads(self, num_units: int) -> int:
        """Return the CPU threads of each of `num_units` equal units with which the last of them finishes soonest."""

        def duration(threads: int) -> float:
            return ceil(max(1, num_units) / self.slots(threads)) / threads**THREAD_EFFICIENCY

        return min(range(1, self.cores_per_node + 1), key=duration)

    def units_on_a_device(self, threads: int) -> int:
        """Return how many units, of `threads` CPU threads each, share a GPU, or on the CPU a node."""
        if self.one_at_a_time:
            return 1
        if self.device == "cuda":
            return max(1, int(1 / self.gpus_per_unit))
        return max(1, self.cores_per_node // threads)


def settled_threads(store: RunStore, kind: str, num_units: int | None, capacity: Capacity) -> int:
    """Return the CPU threads of each unit of a kind: the stored number, limited to the cores of the largest node.

    The number is stored once for a run folder and does not depend on the command that asks: with another number of
    threads, sums round differently. `num_units` is the experiment's number of such units; None: several per worker.
    """
    if not store.has_checkpoint(_STAGE, kind):
        number = UNITS_A_WORKER * capacity.slots() if num_units is None else num_units
        store.save_checkpoint(_STAGE, kind, {}, {"threads": capacity.threads(number)})
    _, about = store.load_checkpoint(_STAGE, kind)
    return min(about["threads"], capacity.cores_per_node)
