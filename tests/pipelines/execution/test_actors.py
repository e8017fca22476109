"""The pool of actors on the real Ray: what is done, in which order, and what happens when a worker dies."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from pipelines.workers import IN_FLIGHT, MAX_ATTEMPTS, Shared, WorkerPool

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import InvalidValueError, RunFolderError
from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from pipelines import workers
from pipelines.execution.cluster import Cluster
from pipelines.units import Context, Unit, pack_splits
from pipelines.watching import StageProgress

THREADS = 3  # no worker's default on two cores


class Recorded(StageProgress):
    def __init__(self) -> None:
        super().__init__("test", 0, 0)
        self.texts: dict[str, str] = {}
        self.order: list[str] = []
        self.notes: list[str] = []

    def unit_done(self, unit: str, text: str) -> None:
        super().unit_done(unit, text)
        self.order.append(unit)
        self.texts[unit] = text

    def note(self, text: str) -> None:
        self.notes.append(text)


def work(context: Context, unit: Unit) -> str:
    attempts = _count(context.store.path / "attempts" / unit.name)
    if attempts <= unit.arguments.get("deaths", 0):
        os._exit(1)
    if unit.shared:
        return _describe_shared(context, unit)
    if unit.arguments.get("raises") == "ours":
        raise InvalidValueError(f"{unit.name} = 0: must be 1 or more")
    if unit.arguments.get("raises") == "unexpected":
        return str(1 // 0)
    context.report(0.5, "half")
    sums = [int(part.images.sum()) for part in (context.splits.train, context.splits.test)]
    return f"{torch.get_num_threads()} threads, {context.device}, seed {context.seed}, {sums}"


def _describe_shared(context: Context, unit: Unit) -> str:
    array = context.shared["array"]
    seen = context.kept.setdefault("seen", [])
    seen.append(unit.name)
    return f"{array.sum():g}, writeable {array.flags.writeable}, {len(seen)} on this worker"


def _count(file: Path) -> int:
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as marks:
        marks.write("x")
    return file.stat().st_size


def _attempts(store: RunStore) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in (store.path / "attempts").iterdir()}


@pytest.fixture(scope="module")
def splits() -> Splits:
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return ImageSet(pixels, torch.randint(0, 2, (count,), generator=generator))

    return Splits("tiny", images(6), images(4), images(5), ("one", "other"))


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.create(tmp_path / "run", preset("quickstart").override(["seed=7"]))


def _run(
    cluster: Cluster, splits: Splits, store: RunStore, units: list[Unit], shared: Shared | None = None
) -> tuple[dict[str, str], Recorded]:
    progress = Recorded()
    pool = WorkerPool(cluster, ray.put(pack_splits(splits)))
    try:
        return pool.run(work, store, units, threads=THREADS, progress=progress, shared=shared), progress
    finally:
        pool.close()


def test_every_unit_is_done_the_most_costly_first(cluster: Cluster, splits: Splits, store: RunStore) -> None:
    costs = [2.0, 5.0, 1.0, 4.0, 3.0]
    units = [Unit(f"cost={cost:g}", cost=cost) for cost in costs]
    failed, progress = _run(replace(cluster, num_cpus=1), splits, store, units)
    assert failed == {}
    assert progress.order == ["cost=5", "cost=4", "cost=3", "cost=2", "cost=1"]
    assert progress.done == 5
    sums = [int(splits.train.images.sum()), int(splits.test.images.sum())]
    assert set(progress.texts.values()) == {f"{THREADS} threads, cpu, seed 7, {sums}"}


def test_a_unit_whose_worker_dies_is_done_in_the_end(cluster: Cluster, splits: Splits, store: RunStore) -> None:
    units = [
        Unit("deadly", {"deaths": 99}, cost=3),
        Unit("unlucky", {"deaths": MAX_ATTEMPTS - 1}, cost=2),
        *(Unit(f"innocent={place}") for place in range(4)),
    ]
    failed, progress = _run(cluster, splits, store, units)
    assert list(failed) == ["deadly"]
    assert "died 3 times" in failed["deadly"]
    assert sorted(progress.order) == ["innocent=0", "innocent=1", "innocent=2", "innocent=3", "unlucky"]
    attempts = _attempts(store)
    assert attempts == {"deadly": 3, "unlucky": 3, **{f"innocent={place}": 1 for place in range(4)}}
    again = [note.split(":")[0] for note in progress.notes if "trying again" in note]
    assert sorted(again) == ["deadly", "deadly", "unlucky", "unlucky"]


def test_an_error_is_told_once_and_not_tried_again(cluster: Cluster, splits: Splits, store: RunStore) -> None:
    units = [Unit("ours", {"raises": "ours"}), Unit("unexpected", {"raises": "unexpected"}), Unit("sound")]
    failed, progress = _run(replace(cluster, num_cpus=1), splits, store, units)
    assert failed == {
        "ours": "InvalidValueError: ours = 0: must be 1 or more",
        "unexpected": "ZeroDivisionError: integer division or modulo by zero",
    }
    assert progress.order == ["sound"]
    assert _attempts(store) == {"ours": 1, "unexpected": 1, "sound": 1}
    ours, unexpected = progress.notes
    assert ours == "ours: failed: ours = 0: must be 1 or more"
    assert unexpected.startswith("unexpected: failed: ")
    assert "return str(1 // 0)" in unexpected  # where it happened: nobody expected it


def test_what_units_share_is_loaded_once_and_read_in_place(cluster: Cluster, splits: Splits, store: RunStore) -> None:
    units = [Unit(f"{name}{place}", shared=name) for name in ("one", "other") for place in range(3)]
    loaded: list[str] = []

    def load(name: str) -> dict[str, np.ndarray]:
        loaded.append(name)
        return {"array": np.full(1000, {"one": 1.0, "other": 2.0}[name])}

    failed, progress = _run(replace(cluster, num_cpus=1), splits, store, units, load)
    assert failed == {}
    assert loaded == ["one", "other"]
    assert [progress.texts[unit.name] for unit in units] == [
        f"{total}, writeable False, {count} on this worker"
        for count, total in enumerate([1000, 1000, 1000, 2000, 2000, 2000], start=1)
    ]


def test_an_actor_has_two_units_and_only_the_one_under_way_is_blamed(
    cluster: Cluster, splits: Splits, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    hand_out = workers._StageOnActors.hand_out

    def watched(stage: workers._StageOnActors, queues: Any, num_workers: int) -> None:
        hand_out(stage, queues, num_workers)
        most.append(max(map(len, queues.values()), default=0))

    monkeypatch.setattr(workers._StageOnActors, "hand_out", watched)
    units = [Unit("deadly", {"deaths": 99}, cost=9), *(Unit(f"innocent={place}") for place in range(5))]
    failed, progress = _run(replace(cluster, num_cpus=1), splits, store, units)
    assert max(most) == IN_FLIGHT == 2
    assert list(failed) == ["deadly"]
    assert len(progress.order) == 5
    # Each innocent unit was started once, though some stood behind the deadly one each time that it killed.
    assert _attempts(store) == {"deadly": MAX_ATTEMPTS, **{f"innocent={place}": 1 for place in range(5)}}


class _Doomed:
    """An actor whose start always fails."""

    def __init__(self, *_: object) -> None:
        os._exit(1)

    def state(self) -> None:
        """Never runs."""


def test_workers_that_cannot_start_end_the_stage(
    cluster: Cluster, splits: Splits, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkerPool, "_start", lambda *_: ray.remote(num_cpus=1)(_Doomed).remote())
    failed, progress = _run(replace(cluster, num_cpus=1), splits, store, [Unit("one"), Unit("other")])
    assert progress.order == []
    assert set(failed) == {"one", "other"}
    assert all("no worker could be started in 3 attempts" in reason for reason in failed.values())


def test_a_worker_that_does_not_reach_the_run_folder_ends_the_stage(
    cluster: Cluster, splits: Splits, store: RunStore
) -> None:
    (store.path / "experiment.json").unlink()
    with pytest.raises(RunFolderError, match=rf"the run folder {store.path} is not there on .*: give --out a folder"):
        _run(cluster, splits, store, [Unit("one")])
    assert not (store.path / "attempts").exists()


def test_the_stage_goes_on_with_the_workers_there_is_room_for(
    cluster: Cluster, splits: Splits, store: RunStore
) -> None:
    """As after the loss of a node: the cluster was counted with more cores than it has now."""
    failed, progress = _run(
        replace(cluster, num_cpus=4 * THREADS), splits, store, [Unit(f"unit={n}") for n in range(6)]
    )
    assert failed == {}
    assert len(progress.order) == 6


def test_the_memory_monitors_error_is_a_death(
    cluster: Cluster, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise ray.exceptions.OutOfMemoryError("the memory monitor killed it")

    unit, progress = Unit("hungry"), Recorded()
    stage = workers._StageOnActors(work, store, [unit], 1, progress, None)
    queue = deque([workers._Task(stage.todo.popleft(), ray.put("done"))])
    monkeypatch.setattr(workers.ray, "get", killed)
    death = stage.collect(queue)
    assert death is not None
    for _ in range(MAX_ATTEMPTS):
        assert stage.failed == {}
        stage.lost(queue, death)
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
def test_only_deaths_at_the_same_point_are_counted(store: RunStore, events: list[Any], failed: str | None) -> None:
    unit = Unit("long")
    stage = workers._StageOnActors(work, store, [unit], 1, Recorded(), None)
    queue = deque([workers._Task(unit, ray.put("done"))])
    for event in events:
        if isinstance(event, float):
            stage.under_way({"long": (event, "epoch")})
        else:
            stage.lost(queue, event)
    assert failed is None if "long" not in stage.failed else failed in stage.failed["long"]
