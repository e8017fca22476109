"""Actors on the real Ray: what is done, in which order, how many at once, and what happens when a worker dies."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from recorded import Recorded

from gross_ray.data.image_set import MappedSplit, Splits
from gross_ray.errors import DatasetError, InvalidValueError, RunFolderError
from gross_ray.experiment import DataOptions
from gross_ray.run.opened import Run
from pipelines.capacity import Capacity
from pipelines.execution import actors
from pipelines.execution.actors import IN_FLIGHT, MAX_ATTEMPTS, SECONDS_TO_NEXT_START, START_ATTEMPTS, Actors
from pipelines.nodes import NodeKind
from pipelines.packing import pack_splits
from pipelines.units import Context, Job, Shared, Unit

ALONE = 2
"""Threads of units of which the two cores have room for one at a time: their order is certain."""


@dataclass(frozen=True, kw_only=True)
class Made(Unit):
    """A unit that returns what it sees, or fails in the way that it is told."""

    label: str
    deaths: int = 0
    raises: str = ""
    reads: str = ""
    together: bool = False

    @property
    def name(self) -> str:
        return self.label

    @property
    def shared(self) -> str:
        return self.reads


def work(context: Context, unit: Made) -> str:
    attempts = _count(context, unit)
    if attempts <= unit.deaths:
        os._exit(1)
    if unit.reads:
        return _describe_shared(context, unit)
    if unit.raises == "ours":
        raise InvalidValueError(f"{unit.name} = 0: must be 1 or more")
    if unit.raises == "unexpected":
        return str(1 // 0)
    context.report(0.5, "half")
    sums = [int(part.images.sum()) for part in (context.splits.train, context.splits.test)]
    context.store.save_checkpoint("made", unit.name, {}, {})
    return f"{torch.get_num_threads()} threads, {context.device}, seed {context.seed}, {sums}"


def _describe_shared(context: Context, unit: Made) -> str:
    array = context.shared["array"]
    seen = context.kept.setdefault("seen", [])
    seen.append(unit.name)
    return f"{array.sum():g}, writeable {array.flags.writeable}, {len(seen)} on this worker"


def _count(context: Context, unit: Made) -> int:
    file = context.store.path / "attempts" / unit.name
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as marks:
        marks.write("x")
    return file.stat().st_size


def _attempts(run: Run) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in (run.store.path / "attempts").iterdir()}


def _job(run: Run, units: list[Any], work: Any = work, shared: Shared | None = None) -> Job:
    return Job(
        stage="test",
        units=units,
        work=work,
        done=lambda: set(run.store.checkpoints("made")),
        kind="test",
        num_equal=len(units),
        shared=shared,
    )


def _do(
    cluster: Capacity,
    splits: Splits,
    run: Run,
    units: list[Any],
    *,
    threads: int = ALONE,
    work: Any = work,
    shared: Shared | None = None,
) -> tuple[dict[str, str], Recorded]:
    progress, executor = Recorded(), Actors(cluster, ray.put(pack_splits(splits)), run)
    try:
        return executor.do(_job(run, units, work, shared), units, threads=threads, progress=progress), progress
    finally:
        executor.close()


def _claimed(cores: int, nodes: int = 1) -> Capacity:
    """A capacity as it was counted once: Ray has two cores."""
    return Capacity(nodes=(NodeKind(cores, 0.0, nodes),), device="cpu")


def test_every_unit_is_done_the_most_costly_first(cluster: Capacity, splits: Splits, run: Run) -> None:
    units = [Made(label=f"cost={cost:g}", cost=cost) for cost in (2.0, 5.0, 1.0, 4.0, 3.0)]
    failed, progress = _do(cluster, splits, run, units)
    assert failed == {}
    assert progress.order == ["cost=5", "cost=4", "cost=3", "cost=2", "cost=1"]
    assert progress.done == 5
    sums = [int(splits.train.images.sum()), int(splits.test.images.sum())]
    assert set(progress.texts.values()) == {f"{ALONE} threads, cpu, seed 7, {sums}"}


def test_a_unit_whose_worker_dies_is_done_in_the_end(cluster: Capacity, splits: Splits, run: Run) -> None:
    units = [
        Made(label="deadly", deaths=99, cost=3),
        Made(label="unlucky", deaths=MAX_ATTEMPTS - 1, cost=2),
        *(Made(label=f"innocent={place}") for place in range(4)),
    ]
    failed, progress = _do(cluster, splits, run, units, threads=1)
    assert list(failed) == ["deadly"]
    assert "died 3 times" in failed["deadly"]
    assert sorted(progress.order) == ["innocent=0", "innocent=1", "innocent=2", "innocent=3", "unlucky"]
    assert _attempts(run) == {"deadly": 3, "unlucky": 3, **{f"innocent={place}": 1 for place in range(4)}}
    again = [note.split(":")[0] for note in progress.notes if "trying again" in note]
    assert sorted(again) == ["deadly", "deadly", "unlucky", "unlucky"]


def test_an_error_is_reported_once_and_not_tried_again(cluster: Capacity, splits: Splits, run: Run) -> None:
    units = [
        Made(label="ours", raises="ours"),
        Made(label="unexpected", raises="unexpected"),
        Made(label="sound"),
    ]
    failed, progress = _do(cluster, splits, run, units)
    assert failed == {
        "ours": "InvalidValueError: ours = 0: must be 1 or more",
        "unexpected": "ZeroDivisionError: integer division or modulo by zero",
    }
    assert progress.order == ["sound"]
    assert _attempts(run) == {"ours": 1, "unexpected": 1, "sound": 1}
    ours, unexpected = progress.notes
    assert ours == "ours: failed: ours = 0: must be 1 or more"
    where = run.store.path / "tracebacks.txt"
    line = "unexpected: failed: ZeroDivisionError: integer division or modulo by zero"
    assert unexpected == f"{line}; the full traceback is in {where}"
    assert "return str(1 // 0)" in where.read_text()  # the line that raised it


def test_what_units_share_is_loaded_once_and_read_in_place(cluster: Capacity, splits: Splits, run: Run) -> None:
    units = [Made(label=f"{name}{place}", reads=name) for name in ("one", "other") for place in range(3)]
    loaded: list[str] = []

    def load(name: str) -> dict[str, np.ndarray]:
        loaded.append(name)
        return {"array": np.full(1000, {"one": 1.0, "other": 2.0}[name])}

    failed, progress = _do(cluster, splits, run, units, shared=load)
    assert failed == {}
    assert loaded == ["one", "other"]
    assert [progress.texts[unit.name] for unit in units] == [
        f"{total}, writeable False, {count} on this worker"
        for count, total in enumerate([1000, 1000, 1000, 2000, 2000, 2000], start=1)
    ]


def test_an_actor_has_two_units_and_only_the_one_under_way_is_blamed(
    cluster: Capacity, splits: Splits, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    hand_out = actors._StageOnActors.hand_out

    def watched(stage: actors._StageOnActors, queues: Any, num_workers: int) -> None:
        hand_out(stage, queues, num_workers)
        most.append(max(map(len, queues.values()), default=0))

    monkeypatch.setattr(actors._StageOnActors, "hand_out", watched)
    units = [Made(label="deadly", deaths=99, cost=9), *(Made(label=f"innocent={place}") for place in range(5))]
    failed, progress = _do(cluster, splits, run, units)
    assert max(most) == IN_FLIGHT == 2
    assert list(failed) == ["deadly"]
    assert len(progress.order) == 5
    # Each innocent unit was started once, though some waited behind the deadly one each time that it killed.
    assert _attempts(run) == {"deadly": MAX_ATTEMPTS, **{f"innocent={place}": 1 for place in range(5)}}


# How many at once


def reserved(context: Context, unit: Made) -> str:
    """Return the cores that the actor has reserved, and how many other units were under way at the same time."""
    folder = context.store.path / "under-way"
    folder.mkdir(exist_ok=True)
    mark = folder / unit.name
    mark.touch()
    deadline = time.monotonic() + (600 if unit.together else 1)
    while len(list((context.store.path / "came").glob("*"))) < 2 and time.monotonic() < deadline:
        (context.store.path / "came").mkdir(exist_ok=True)
        (context.store.path / "came" / unit.name).touch()
        time.sleep(0.02)
    beside = len(list(folder.iterdir())) - 1
    if not unit.together:
        mark.unlink()
    cores = ray.get_runtime_context().get_assigned_resources()["CPU"]
    return f"{cores:g} cores, {beside} beside it"


@pytest.mark.parametrize(("threads", "beside"), [(1, 1), (2, 0)])
def test_an_actor_reserves_a_core_for_each_thread(
    cluster: Capacity, splits: Splits, run: Run, threads: int, beside: int
) -> None:
    """However many cores were counted: two units of one thread meet on the two cores, two of two threads never do."""
    units = [Made(label=label, together=threads == 1) for label in ("one", "other")]
    failed, progress = _do(_claimed(8), splits, run, units, threads=threads, work=reserved)
    assert failed == {}
    assert set(progress.texts.values()) == {f"{threads} cores, {beside} beside it"}


def process(context: Context, unit: Made) -> str:
    """Return the process, and its threads."""
    return f"{os.getpid()} with {torch.get_num_threads()} threads"


def test_of_ones_own_ray_another_number_of_threads_starts_no_new_process(
    cluster: Capacity, splits: Splits, run: Run
) -> None:
    assert cluster.private  # the tests' Ray was started for them alone
    executor, found = Actors(cluster, ray.put(pack_splits(splits)), run), []
    for threads in (1, 2, 1):
        progress, units = Recorded(), [Made(label=f"threads={threads}")]
        job = replace(_job(run, units, process), done=set)
        assert executor.do(job, units, threads=threads, progress=progress) == {}
        found.append(progress.texts[units[0].name])
    executor.close()
    number = found[0].split()[0]
    assert found == [f"{number} with {threads} threads" for threads in (1, 2, 1)]


def test_the_stage_goes_on_with_the_workers_there_is_room_for(cluster: Capacity, splits: Splits, run: Run) -> None:
    """As after the loss of nodes: more cores were counted than there are now."""
    units = [Made(label=f"unit={number}") for number in range(6)]
    failed, progress = _do(_claimed(2, nodes=4), splits, run, units)
    assert failed == {}
    assert len(progress.order) == 6


# Workers that do not start


class _Doomed:
    """An actor whose start always fails."""

    def __init__(self, *_: object) -> None:
        os._exit(1)

    def state(self) -> None:
        """Never runs."""


def test_workers_that_cannot_start_end_the_stage(
    cluster: Capacity, splits: Splits, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Actors, "_start", lambda *_: ray.remote(num_cpus=1)(_Doomed).remote())
    failed, progress = _do(cluster, splits, run, [Made(label="one"), Made(label="other")])
    assert progress.order == []
    assert set(failed) == {"one", "other"}
    assert all("no worker could be started in 3 attempts" in reason for reason in failed.values())


def test_a_worker_that_does_not_reach_the_run_folder_ends_the_stage(
    cluster: Capacity, splits: Splits, run: Run
) -> None:
    folder = run.store.path
    (folder / "experiment.json").unlink()
    with pytest.raises(RunFolderError, match=rf"the run folder {folder} is not there on .*: give --out a folder"):
        _do(cluster, splits, run, [Made(label="one")])
    assert not (folder / "attempts").exists()


def test_a_worker_that_cannot_have_the_images_ends_the_stage(
    cluster: Capacity, splits: Splits, run: Run, tmp_path: Path
) -> None:
    """Its machine has neither the file of the images nor the dataset, and the driver's file is gone."""
    mapped = MappedSplit(str(tmp_path), "0" * 16, "train", "1" * 64, len(splits.train))
    elsewhere = replace(splits, train=replace(splits.train, mapped=mapped))
    node = ray.get_runtime_context().get_node_id()
    packed = pack_splits(elsewhere, DataOptions(name=f"folder:{tmp_path / 'none'}"), node=node)
    executor, units = Actors(cluster, ray.put(packed), run), [Made(label="one")]
    with pytest.raises(DatasetError, match="the images cannot be copied from the driver's machine") as caught:
        executor.do(_job(run, units), units, threads=ALONE, progress=Recorded())
    executor.close()
    assert "\n" not in str(caught.value)


class PretendedRay:
    """Stands in for Ray: starts end as `starts` says, units as `ends` says, and time passes only while it waits."""

    exceptions = ray.exceptions

    def __init__(self, starts: str, ends: Callable[[str], bool] = lambda unit: True) -> None:
        self._starts, self._ends = iter(starts), ends
        self.now = 1000.0
        self.started: list[float] = []
        """When each start was asked for."""
        self.did: list[tuple[int, str]] = []
        """The number of the start, and the unit that its worker did."""

    def start(self) -> Any:
        """Return an actor: its start fails where `starts` has an F, and succeeds where it has a dot."""
        number, fails = len(self.started), next(self._starts) == "F"
        self.started.append(self.now)
        died = ray.exceptions.RayActorError(error_msg="The actor died: no memory")

        def do(stage: str, kind: str, work: Any, unit: Made, *_: Any) -> Any:
            if not self._ends(unit.name):
                return died
            self.did.append((number, unit.name))
            return "done"

        state = SimpleNamespace(remote=lambda: _Answer(died if fails else ("", 0.0, "")))
        return _Actor(state, SimpleNamespace(remote=lambda *given: _Answer(do(*given))))

    def wait(self, answers: list[Any], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Any], list[Any]]:
        self.now += timeout
        return list(answers), []

    def get(self, answer: Any) -> Any:
        if isinstance(answer.value, Exception):
            raise answer.value
        return answer.value

    def kill(self, actor: Any) -> None:
        """Nothing runs."""


@dataclass(eq=False)
class _Actor:
    """A handle of an actor."""

    state: Any
    do: Any


class _Answer:
    """An object reference."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Started:
    """A stage on a pretended Ray of two slots."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch, pretended: PretendedRay, units: int) -> None:
        monkeypatch.setattr(actors, "ray", pretended)
        monkeypatch.setattr(actors, "time", SimpleNamespace(monotonic=lambda: pretended.now))
        monkeypatch.setattr(Actors, "_start", lambda _: pretended.start())
        self.progress = Recorded()
        todo = [Made(label=f"unit={number}") for number in range(units)]
        executor = Actors(_claimed(2), None, run)  # type: ignore[arg-type]
        job = replace(_job(run, todo), done=set)
        self.failed = executor.do(job, todo, threads=1, progress=self.progress)


def test_only_failures_in_a_row_are_counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """More starts fail than may in a row, between starts that succeed: a unit kills each worker at first."""
    before = START_ATTEMPTS - 1
    deaths = count()
    pretended = PretendedRay(("F" * before + ".") * 3, lambda unit: next(deaths) >= 2)
    started = Started(run, monkeypatch, pretended, units=1)
    assert before * 3 > START_ATTEMPTS
    assert started.failed == {}
    assert pretended.did == [(len(pretended.started) - 1, "unit=0")]
    assert len(pretended.started) == 3 * (before + 1)


def test_after_too_many_failures_the_stage_goes_on_with_what_it_has_and_tries_again_later(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two workers one never comes up before the fourth try, which is made when the time for it has come."""
    begun = 1000.0
    units = 10 * int(SECONDS_TO_NEXT_START)
    pretended = PretendedRay("." + "F" * START_ATTEMPTS + "F" + "." + "." * 9)
    started = Started(run, monkeypatch, pretended, units)
    assert started.failed == {}
    assert len(started.progress.order) == units
    first, second, *_, fourth, last = pretended.started
    assert first == second == begun
    assert len(pretended.started) == 1 + START_ATTEMPTS + 2
    assert fourth - begun > SECONDS_TO_NEXT_START < last - fourth
    assert fourth - begun < SECONDS_TO_NEXT_START + 10 > last - fourth
    assert {number for number, _ in pretended.did} == {0, len(pretended.started) - 1}


def test_the_stage_ends_when_no_start_succeeds(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(run, monkeypatch, PretendedRay("F" * 99), units=5)
    assert set(started.failed) == {f"unit={number}" for number in range(5)}
    assert all("(The actor died: no memory)" in reason for reason in started.failed.values())


# Deaths


def test_the_memory_monitors_error_is_a_death(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise ray.exceptions.OutOfMemoryError("the memory monitor killed it")

    unit = Made(label="hungry")
    stage = actors._StageOnActors(_job(run, [unit]), [unit], 1, Recorded(), run)
    queue = deque([actors._Task(unit, _Answer(None))])  # type: ignore[arg-type]
    stage.todo.clear()
    monkeypatch.setattr(actors.ray, "wait", lambda answers, timeout: (answers, []))
    monkeypatch.setattr(actors.ray, "get", killed)
    death = stage.collect(queue)
    assert death is not None
    for _ in range(MAX_ATTEMPTS):
        assert stage.failed == {}
        stage.lost(deque(queue), death)
    assert "died 3 times; look for too little memory" in stage.failed["hungry"]


DIED = ray.exceptions.RayActorError(error_msg="The actor is dead.")
NODE = ray.exceptions.RayActorError(error_msg="The actor died because its node has died. Node Id: 1f")
SPOT = ray.exceptions.RayActorError(error_msg="its node has died", preempted=True)


@pytest.mark.parametrize(
    ("events", "failed"),
    [
        ([DIED, 0.5, DIED, 0.75, DIED], None),
        ([0.5, DIED, 0.5, DIED, 0.25, DIED], "its worker died 3 times; look for too little memory"),
        ([NODE, NODE, NODE], "its worker died 3 times, the last time with its node; look for"),
        ([SPOT] * 9, None),
        ([DIED, 0.5, DIED, DIED, DIED], "its worker died 3 times"),
    ],
)
def test_only_deaths_at_the_same_point_are_counted(run: Run, events: list[Any], failed: str | None) -> None:
    unit = Made(label="long")
    stage = actors._StageOnActors(_job(run, [unit]), [unit], 1, Recorded(), run)
    for event in events:
        if isinstance(event, float):
            stage.under_way({"long": (event, "epoch")})
        else:
            stage.lost(deque([actors._Task(unit, _Answer(None))]), event)  # type: ignore[arg-type]
    assert "long" not in stage.failed if failed is None else failed in stage.failed["long"]


def test_a_unit_that_was_stored_before_its_worker_died_is_done_and_the_next_one_is_blamed(run: Run) -> None:
    """A worker may die before the driver hears of the unit that it has just finished."""
    units = [Made(label=label) for label in ("stored", "deadly", "waiting")]
    progress = Recorded()
    stage = actors._StageOnActors(_job(run, units), units, 1, progress, run)
    stage.todo.clear()
    run.store.save_checkpoint("made", "stored", {}, {})
    stage.lost(deque(actors._Task(unit, _Answer(None)) for unit in units), DIED)  # type: ignore[arg-type]
    assert progress.order == ["stored"]
    assert [unit.name for unit in stage.todo] == ["waiting", "deadly"]
    assert progress.notes == ["deadly: its worker died; trying again"]
