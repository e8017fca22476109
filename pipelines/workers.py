"""Long-lived actors fed one unit at a time: retries, progress, each result stored as it comes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from gross_ray.errors import GrossRayError
from gross_ray.results.store import RunStore
from pipelines.cluster import Cluster
from pipelines.progress import StageProgress
from pipelines.units import Context, Unit, Work, unpack_splits

MAX_ATTEMPTS = 3
"""How often a unit is tried whose worker dies."""
IN_FLIGHT = 2
"""Units that an actor has at most: one under way, and the next so that it never waits for the driver."""
POLL_SECONDS = 1.0
"""How often the units under way are asked for their state."""

Shared = Callable[[str], Any]
"""Loads what units share, by its name: anything Ray can lay out, best as NumPy arrays."""


class _Worker:
    """One process that does units, one after the other; a second thread answers how far it is."""

    def __init__(self, packed: dict[str, Any], device: str) -> None:
        self._splits = unpack_splits(packed, device)
        self._device = device
        self._state = (0.0, "starting")
        self._kept: dict[str, Any] = {}

    def do(self, work: Work, store: RunStore, unit: Unit, threads: int, shared: Any) -> str:
        torch.set_num_threads(threads)
        self._state = (0.0, "started")
        return work(Context(store, self._splits, self._device, self._report, shared, self._kept), unit)

    @ray.method(concurrency_group="state")
    def state(self) -> tuple[float, str]:
        return self._state

    def _report(self, share: float, text: str, **_: float) -> None:
        self._state = (share, text)


class WorkerPool:
    """The actors of one connection, shared by all stages that run on it."""

    def __init__(self, cluster: Cluster, packed_splits: ray.ObjectRef) -> None:
        """Start nothing yet: actors are started as a stage needs them."""
        self._cluster, self._packed = cluster, packed_splits
        self._actors: list[Any] = []

    def run(
        self,
        work: Work,
        store: RunStore,
        units: Sequence[Unit],
        *,
        threads: int,
        progress: StageProgress,
        shared: Shared | None = None,
    ) -> dict[str, str]:
        """Do all units, the most costly first, and return why those failed that did, by name.

        What `shared` loads goes into Ray's object store once for each name, and out again behind its last unit.
        """
        wanted = min(self._cluster.slots(threads), len(units))
        while len(self._actors) < wanted:
            self._actors.append(self._start())
        stage = _StageOnActors(work, store, units, threads, progress, shared)
        queues: dict[Any, deque[_Task]] = {actor: deque() for actor in self._actors[:wanted]}
        while stage.todo or any(queues.values()):
            stage.hand_out(queues)
            ray.wait([task.reference for queue in queues.values() for task in queue], timeout=POLL_SECONDS)
            for actor, queue in list(queues.items()):
                if stage.collect(queue):
                    continue
                stage.lost(queue)
                del queues[actor]
                self._actors.remove(actor)
                self._actors.append(self._start())
                queues[self._actors[-1]] = deque()
            progress.under_way(_states(queues))
        return stage.failed

    def close(self) -> None:
        """End the actors, so that their cores are free."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()

    def _start(self) -> Any:
        gpus = self._cluster.gpus_per_unit if self._cluster.device == "cuda" else 0
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "concurrency_groups": {"state": 1}}
        return ray.remote(**options)(_Worker).remote(self._packed, self._cluster.device)


@dataclass(frozen=True)
class _Task:
    """A unit handed to an actor."""

    unit: Unit
    reference: ray.ObjectRef


class _StageOnActors:
    """The units of one stage: what is still to do, who gets it, and what became of it."""

    def __init__(
        self,
        work: Work,
        store: RunStore,
        units: Sequence[Unit],
        threads: int,
        progress: StageProgress,
        shared: Shared | None,
    ) -> None:
        self.todo = deque(sorted(units, key=lambda unit: -unit.cost))
        self.failed: dict[str, str] = {}
        self._work, self._store, self._threads = work, store, threads
        self._progress, self._load = progress, shared
        self._attempts: dict[str, int] = {}
        self._shared: dict[str, ray.ObjectRef] = {}
        self._users = Counter(unit.shared for unit in units)

    def hand_out(self, queues: Mapping[Any, deque[_Task]]) -> None:
        """Give each actor a unit, and the next one while there are enough for all."""
        for length in range(IN_FLIGHT):
            for actor, queue in queues.items():
                enough = length == 0 or len(self.todo) >= len(queues)
                if len(queue) == length and self.todo and enough:
                    unit = self.todo.popleft()
                    shared = self._reference(unit.shared)
                    queue.append(_Task(unit, actor.do.remote(self._work, self._store, unit, self._threads, shared)))

    def collect(self, queue: deque[_Task]) -> bool:
        """Take from the queue what has ended; return False where its actor is found dead."""
        while queue:
            ready, _ = ray.wait([queue[0].reference], timeout=0)
            if not ready:
                return True
            try:
                text = ray.get(queue[0].reference)
            except ray.exceptions.RayActorError:
                return False
            except ray.exceptions.RayTaskError as error:
                unit = self._ended(queue)
                self.failed[unit.name] = f"{type(error.cause).__name__}: {error.cause}"
                expected = isinstance(error.cause, GrossRayError)
                self._progress.note(f"{unit.name}: failed: {error.cause if expected else error}")
            else:
                self._progress.unit_done(self._ended(queue).name, text)
        return True

    def lost(self, queue: deque[_Task]) -> None:
        """Take back the units of a dead actor: the first was under way, the others had not been started."""
        unit, waiting = queue[0].unit, [task.unit for task in queue][1:]
        self._attempts[unit.name] = self._attempts.get(unit.name, 0) + 1
        if self._attempts[unit.name] < MAX_ATTEMPTS:
            self._progress.note(f"{unit.name}: its worker died; trying again")
            self.todo.append(unit)
        else:
            self.failed[unit.name] = (
                f"its worker died {MAX_ATTEMPTS} times; look for too little memory: "
                "give fewer workers with --num-cpus, or machines with more"
            )
            self._release(unit)
        self.todo.extendleft(reversed(waiting))

    def _ended(self, queue: deque[_Task]) -> Unit:
        unit = queue.popleft().unit
        self._release(unit)
        return unit

    def _reference(self, name: str) -> ray.ObjectRef | None:
        if not name or self._load is None:
            return None
        if name not in self._shared:
            self._shared[name] = ray.put(self._load(name))
        return self._shared[name]

    def _release(self, unit: Unit) -> None:
        self._users[unit.shared] -= 1
        if not self._users[unit.shared]:
            self._shared.pop(unit.shared, None)


def _states(queues: Mapping[Any, deque[_Task]]) -> dict[str, tuple[float, str]]:
    asked = {actor.state.remote(): queue[0].unit.name for actor, queue in queues.items() if queue}
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS) if asked else ([], [])
    states = {}
    for reference in ready:
        try:
            states[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayActorError:
            continue  # its unit reports the death
    return states
