"""Long-lived actors fed one unit at a time: retries, progress, each result stored as it comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
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
POLL_SECONDS = 1.0
"""How often the units under way are asked for their state."""


class _Worker:
    """One process that does units; its second thread answers how far it is."""

    def __init__(self, packed: dict[str, Any], device: str) -> None:
        self._splits = unpack_splits(packed, device)
        self._device = device
        self._state = (0.0, "starting")

    def do(self, work: Work, store: RunStore, unit: Unit, threads: int) -> str:
        torch.set_num_threads(threads)
        self._state = (0.0, "started")
        return work(Context(store, self._splits, self._device, self._report), unit)

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
        self, work: Work, store: RunStore, units: Sequence[Unit], *, threads: int, progress: StageProgress
    ) -> dict[str, str]:
        """Do all units, the most costly first, and return why those failed that did, by name."""
        todo = deque(sorted(units, key=lambda unit: -unit.cost))
        attempts: dict[str, int] = {}
        failed: dict[str, str] = {}
        running: dict[ray.ObjectRef, tuple[Unit, Any]] = {}
        wanted = min(self._cluster.slots(threads), len(units))
        while len(self._actors) < wanted:
            self._actors.append(self._start())
        idle = self._actors[:wanted]
        while todo or running:
            while todo and idle:
                actor, unit = idle.pop(), todo.popleft()
                attempts[unit.name] = attempts.get(unit.name, 0) + 1
                running[actor.do.remote(work, store, unit, threads)] = (unit, actor)
            ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            for reference in ready:
                unit, actor = running.pop(reference)
                try:
                    text = ray.get(reference)
                except ray.exceptions.RayActorError:
                    self._actors.remove(actor)
                    actor = self._start()
                    self._actors.append(actor)
                    if attempts[unit.name] < MAX_ATTEMPTS:
                        progress.note(f"{unit.name}: its worker died; trying again")
                        todo.append(unit)
                    else:
                        failed[unit.name] = f"its worker died {MAX_ATTEMPTS} times; look for too little memory"
                except ray.exceptions.RayTaskError as error:
                    failed[unit.name] = f"{type(error.cause).__name__}: {error.cause}"
                    expected = isinstance(error.cause, GrossRayError)
                    progress.note(f"{unit.name}: failed: {error.cause if expected else error}")
                else:
                    progress.unit_done(unit.name, text)
                idle.append(actor)
            progress.under_way(_states(running))
        return failed

    def close(self) -> None:
        """End the actors, so that their cores are free."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()

    def _start(self) -> Any:
        gpus = self._cluster.gpus_per_unit if self._cluster.device == "cuda" else 0
        return ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=2)(_Worker).remote(  # type: ignore[call-overload]
            self._packed, self._cluster.device
        )


def _states(running: dict[Any, tuple[Unit, Any]]) -> dict[str, tuple[float, str]]:
    asked = {actor.state.remote(): unit.name for unit, actor in running.values()}
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS) if asked else ([], [])
    states = {}
    for reference in ready:
        try:
            states[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayActorError:
            continue  # its unit reports the death
    return states
