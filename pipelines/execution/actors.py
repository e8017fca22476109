"""Execution on long-lived Ray actors: each does one unit after another, and dead actors are replaced."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from gross_ray.errors import GrossRayError, one_line
from gross_ray.run.opened import Run
from pipelines.capacity import Capacity
from pipelines.execution.base import do_unit, report_failure
from pipelines.execution.fetching import Fetcher
from pipelines.execution.versions import Versions
from pipelines.packing import PackedSplits, room_for_images, unpack_splits
from pipelines.units import Context, Group, Job, Unit, Work
from pipelines.watching import Furthest, Patience, StageProgress

MAX_ATTEMPTS = 3
"""How often a unit is tried if its worker dies each time before the unit has got any further."""
START_ATTEMPTS = 3
"""How many starts of workers may fail in a row before the stage continues with the workers that it has."""
SECONDS_TO_NEXT_START = 60.0
"""How long a stage continues with too few workers before it starts another one."""
IN_FLIGHT = 2
"""Maximum number of units of an actor: a running one, and the next, so that the actor never waits for the driver."""
POLL_SECONDS = 1.0
"""How often the running units are asked for their state."""


def gpu_share() -> float:
    """Return the share of a GPU that Ray assigned to this process."""
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0))


class _Worker:
    """A process that does one unit after another; a second thread answers requests for its state."""

    def __init__(self, packed: PackedSplits, device: str, versions: Versions, run: Run) -> None:
        self._device, self._run = device, run
        self._stage, self._kind, self._state = "", "", ("", 0.0, "starting")
        self._kept: dict[str, Any] = {}
        self._refused: GrossRayError | None = None
        try:
            versions.check()
            run.store.require_here()
            room, fetch = room_for_images(device, gpu_share()), Fetcher(packed.node)
            self._splits = unpack_splits(packed, device, room, fetch)
        except GrossRayError as error:  # raised in a constructor, it would reach the driver as text only
            self._refused = error

    def do(self, stage: str, kind: str, work: Work, unit: Unit, threads: int, shared: Any) -> str:
        torch.set_num_threads(threads)
        self._state = (unit.name, 0.0, "started")
        if stage != self._stage:  # other workers' results of the last stage may differ from what this one has cached
            self._stage = stage
            self._run.changed()
        if kind != self._kind:  # the memory belongs to the next stage
            self._kind = kind
            self._kept.clear()
        context = Context(self._run, self._splits, self._device, self._report, shared, self._kept)
        return do_unit(work, context, unit)

    @ray.method(concurrency_group="state")
    def state(self) -> tuple[str, float, str]:
        """Return the current unit's name, its share that is done, and its state in words."""
        if self._refused is not None:
            raise self._refused
        return self._state

    def _report(self, share: float, text: str, **_: float) -> None:
        self._state = (self._state[0], share, text)


class Actors:
    """The actors of one connection to Ray, which stages share (an `Executor`)."""

    starts_the_most_costly_first = True
    survives_deaths = True

    def __init__(self, capacity: Capacity, packed_splits: ray.ObjectRef, run: Run) -> None:
        """Actors are started only when a stage needs them."""
        self._capacity, self._packed, self._run = capacity, packed_splits, run
        self._actors: list[Any] = []
        self._reserved = 0
        """CPU cores that each actor has reserved."""
        self._were_up: set[Any] = set()
        self._versions = Versions.here()
        self._start_failures = 0
        self._last_failure = ""
        self._given_up_at = 0.0

    def do(self, job: Job, units: Sequence[Unit], *, threads: int, progress: StageProgress) -> dict[str, str]:
        """Do the units, the most costly first (see `Executor`).

        Data of `job.shared` is put into Ray's object store once for each name, and released after its last unit.

        Raises VersionMismatchError if a worker runs other versions than this driver, and RunFolderError or StorageError
        if it cannot reach the run folder.
        """
        # Of one's own Ray, slots alone share out the cores; another reservation would start all processes anew.
        reserved = 1 if self._capacity.private else threads
        if reserved != self._reserved:
            self.close()
            self._reserved = reserved
        wanted = min(self._capacity.slots(threads), len(units))
        while len(self._actors) < wanted:
            self._actors.append(self._start())
        stage = _StageOnActors(job, units, threads, progress, self._run)
        queues: dict[Any, deque[_Task]] = {}
        # Only running actors get units: an actor for which the cluster has no room any more would keep them forever.
        starting = {actor.state.remote(): actor for actor in self._actors[:wanted]}
        self._start_failures, patience = 0, Patience(progress, autoscales=self._capacity.autoscales)
        while stage.todo or any(queues.values()):
            self._take_up(starting, queues)
            stage.hand_out(queues, len(queues) + len(starting))
            if not queues and not starting:
                stage.give_up(
                    f"no worker could be started in {self._start_failures} attempts ({self._last_failure}); "
                    "look at the nodes' memory, and, on a cluster that was joined, at RAY_AUTH_MODE, which must be the "
                    f"same there (here {os.environ.get('RAY_AUTH_MODE', 'unset')})"
                )
                break
            if self._capacity.autoscales and not stage.todo:
                self._give_back(starting, queues)
            self._start_again(starting, len(queues), min(wanted, len(queues) + len(stage.todo)))
            patience.look(under_way=bool(queues))
            tasks = [task.reference for queue in queues.values() for task in queue]
            ray.wait([*tasks, *starting], timeout=POLL_SECONDS)
            for actor, queue in list(queues.items()):
                death = stage.collect(queue)
                if death is None:
                    continue
                stage.lost(queue, death)
                del queues[actor]
                self._replace(actor, starting)
            stage.under_way(_states(queues))
        return stage.failed

    def _take_up(self, starting: dict[ray.ObjectRef, Any], queues: dict[Any, deque[_Task]]) -> None:
        """Move running actors from `starting` to `queues`; replace those that failed to start."""
        ready, _ = ray.wait(list(starting), num_returns=len(starting), timeout=0) if starting else ([], [])
        for reference in ready:
            actor = starting.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                if actor in self._were_up:  # it died between two stages, for example with its node
                    self._replace(actor, starting)
                    continue
                self._start_failures += 1
                self._last_failure = str(error).strip().splitlines()[-1].strip()
                if self._start_failures < START_ATTEMPTS:
                    self._replace(actor, starting)
                else:
                    self._actors.remove(actor)
                    self._given_up_at = time.monotonic()
            else:
                queues[actor] = deque()
                self._were_up.add(actor)
                self._start_failures = 0  # only failures in a row count, because nodes of a cluster come and go

    def _start_again(self, starting: dict[ray.ObjectRef, Any], num_up: int, wanted: int) -> None:
        """Start another actor if there have been fewer than `wanted` for a while."""
        if num_up + len(starting) < wanted and time.monotonic() - self._given_up_at > SECONDS_TO_NEXT_START:
            self._given_up_at = time.monotonic()
            self._actors.append(self._start())
            starting[self._actors[-1].state.remote()] = self._actors[-1]

    def _replace(self, actor: Any, starting: dict[ray.ObjectRef, Any]) -> None:
        """Replace a dead actor with a new one."""
        ray.kill(actor)  # an actor whose task Ray's memory monitor killed may still be alive
        self._actors.remove(actor)
        self._actors.append(self._start())
        starting[self._actors[-1].state.remote()] = self._actors[-1]

    def _give_back(self, starting: dict[ray.ObjectRef, Any], queues: dict[Any, deque[_Task]]) -> None:
        """End the actors for which no unit remains, so that the autoscaler removes their nodes or starts none."""
        for actor in [*starting.values(), *(actor for actor, queue in queues.items() if not queue)]:
            ray.kill(actor)
            self._actors.remove(actor)
            queues.pop(actor, None)
        starting.clear()

    def close(self) -> None:
        """End the actors and free their cores."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
        self._were_up.clear()
        self._reserved = 0

    def _start(self) -> Any:
        gpus = self._capacity.gpus_per_unit if self._capacity.device == "cuda" else 0
        options: dict[str, Any] = {"num_cpus": self._reserved, "num_gpus": gpus, "concurrency_groups": {"state": 1}}
        return ray.remote(**options)(_Worker).remote(self._packed, self._capacity.device, self._versions, self._run)


@dataclass(frozen=True)
class _Task:
    """A unit handed to an actor."""

    unit: Unit
    reference: ray.ObjectRef


class _StageOnActors:
    """The units of one stage: which are still to do, which actor gets them, and how they finished."""

    def __init__(self, job: Job, units: Sequence[Unit], threads: int, progress: StageProgress, run: Run) -> None:
        self.todo = deque(sorted(units, key=lambda unit: -unit.cost))
        self.failed: dict[str, str] = {}
        self._job, self._threads, self._progress, self._run = job, threads, progress, run
        self._attempts: dict[str, int] = {}
        self._furthest = Furthest()
        self._shared: dict[str, ray.ObjectRef] = {}
        self._users = Counter(unit.shared for unit in units)

    def hand_out(self, queues: Mapping[Any, deque[_Task]], num_workers: int) -> None:
        """Give each actor a unit, and a second one as long as units suffice for all workers, also starting ones."""
        for length in range(IN_FLIGHT):
            for actor, queue in queues.items():
                enough = length == 0 or len(self.todo) >= num_workers
                if len(queue) == length and self.todo and enough:
                    unit = self.todo.popleft()
                    shared = self._reference(unit.shared)
                    task = actor.do.remote(self._job.stage, self._job.kind, self._job.work, unit, self._threads, shared)
                    queue.append(_Task(unit, task))

    def under_way(self, states: dict[str, tuple[float, str]]) -> None:
        """Report the state of the running units; reset the attempts of a unit that has got further than ever before."""
        for name, (share, _) in states.items():
            if self._furthest.advanced(name, share):
                self._attempts.pop(name, None)
        self._progress.under_way(states)

    def collect(self, queue: deque[_Task]) -> ray.exceptions.RayError | None:
        """Remove finished units from an actor's queue; return the error if the actor is dead."""
        while queue:
            ready, _ = ray.wait([queue[0].reference], timeout=0)
            if not ready:
                return None
            try:
                text = ray.get(queue[0].reference)
            except ray.exceptions.RayTaskError as error:
                unit = self._finished(queue)
                self.failed[unit.name] = one_line(error.cause)
                ours = isinstance(error.cause, GrossRayError)
                text, whole = (str(error.cause), None) if ours else (self.failed[unit.name], str(error))
                deleted = getattr(error.cause, "deleted", ())
                report_failure(self._progress, unit.name, text, whole, self._run, deleted)
            except ray.exceptions.RayError as error:  # the actor or its node died, or the memory monitor killed it
                return error
            else:
                self._progress.unit_done(self._finished(queue).name, text)
        return None

    def lost(self, queue: deque[_Task], death: ray.exceptions.RayError) -> None:
        """Take back the units of a dead actor: the first one was running, the others had not been started.

        Units that are stored had finished before the driver noticed.
        """
        stored = self._job.done()
        while queue and _names(queue[0].unit) <= stored:
            self._progress.unit_done(self._finished(queue).name, "stored as its worker died")
        if not queue:
            return
        unit, waiting = queue[0].unit, [task.unit for task in queue][1:]
        lost_node = "node has died" in str(death)
        if not getattr(death, "preempted", False):  # that a spot machine was taken back is not the unit's fault
            self._attempts[unit.name] = self._attempts.get(unit.name, 0) + 1
        if self._attempts.get(unit.name, 0) < MAX_ATTEMPTS:
            self._progress.note(f"{unit.name}: its {'node was lost' if lost_node else 'worker died'}; trying again")
            self.todo.append(unit)
        else:
            last = ", the last time with its node" if lost_node else ""
            self.failed[unit.name] = (
                f"its worker died {MAX_ATTEMPTS} times{last}; look for too little memory: give fewer workers with "
                "--num-cpus, or machines with more"
            )
            self._release(unit)
        self.todo.extendleft(reversed(waiting))

    def give_up(self, reason: str) -> None:
        """Let all units that are still to do fail."""
        self.failed |= dict.fromkeys((unit.name for unit in self.todo), reason)
        self.todo.clear()

    def _finished(self, queue: deque[_Task]) -> Unit:
        unit = queue.popleft().unit
        self._release(unit)
        return unit

    def _reference(self, name: str) -> ray.ObjectRef | None:
        if not name or self._job.shared is None:
            return None
        if name not in self._shared:
            self._shared[name] = ray.put(self._job.shared(name))
        return self._shared[name]

    def _release(self, unit: Unit) -> None:
        self._users[unit.shared] -= 1
        if not self._users[unit.shared]:
            self._shared.pop(unit.shared, None)


def _names(unit: Unit) -> set[str]:
    return {member.name for member in unit.members} if isinstance(unit, Group) else {unit.name}


def _states(queues: Mapping[Any, deque[_Task]]) -> dict[str, tuple[float, str]]:
    asked = {actor.state.remote(): queue for actor, queue in queues.items() if queue}
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS) if asked else ([], [])
    states = {}
    for reference in ready:
        try:
            name, share, text = ray.get(reference)
        except ray.exceptions.RayError:
            continue  # `collect` finds the death
        if name in (task.unit.name for task in asked[reference]):  # else that unit has just finished
            states[name] = (share, text)
    return states
