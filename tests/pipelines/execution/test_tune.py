"""Units as trials of the real Ray Tune: retried where the process dies, told where they fail, their metrics kept."""

from __future__ import annotations

import json
import os
import struct
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
import torch
from ray.tune import Callback
from recorded import Recorded
from tensorboardX.proto import event_pb2

from gross_ray.data.image_set import Splits
from gross_ray.errors import DivergedError, VersionMismatchError
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from pipelines import watching
from pipelines.capacity import Capacity
from pipelines.execution.tune import MAX_FAILURES, Trials
from pipelines.execution.versions import Versions
from pipelines.packing import pack_splits
from pipelines.units import Context, Job, Unit


@dataclass(frozen=True, kw_only=True)
class Trial(Unit):
    """A unit that reports two epochs, and fails in the way that it is told."""

    seed: int
    fate: str = "ends"
    loss: float = 8.0

    @property
    def name(self) -> str:
        return f"seed={self.seed}"


class Locked(Recorded):
    """Progress with a lock, as a bar on a terminal has one: it cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()


def work(context: Context, unit: Trial) -> str:
    marks = context.store.path / "attempts" / unit.name
    marks.parent.mkdir(exist_ok=True)
    with marks.open("a") as file:
        file.write("x")
    if unit.fate == "comes further":
        for epoch in range(1, marks.stat().st_size + 2):
            context.report(epoch / 8, f"epoch {epoch}", loss=1.0)
        if epoch < DEATHS + 2:
            os._exit(1)
    for epoch in (1, 2):
        context.report(epoch / 3, f"epoch {epoch}", loss=unit.loss / epoch)
    if unit.fate == "dies once" and marks.stat().st_size == 1:
        os._exit(1)
    if unit.fate == "diverges":
        raise DivergedError("the loss is not finite in epoch 3: try a lower learning rate")
    if unit.fate == "is a bug":
        raise KeyError("conv7")
    if unit.fate == "always dies":
        os._exit(1)
    return f"{torch.get_num_threads()} threads, {int(context.splits.train.images.sum())}"


FATES = ("ends", "dies once", "diverges", "ends", "is a bug", "always dies", "comes further")
DEATHS = MAX_FAILURES + 1
"""Of a trial that comes one epoch further each time."""


class Seen(Callback):
    """What a user may write: told of every result and every trial's end, on the driver."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}
        self.ended: list[str] = []

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.losses.setdefault(trial.config["unit"]["name"], []).append(result["loss"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.ended.append(trial.config["unit"]["name"])


class Outcome(NamedTuple):
    store: RunStore
    failed: dict[str, str]
    progress: Recorded
    seen: Seen


def _do(
    cluster: Capacity, splits: Splits, run: Run, units: list[Trial], progress: Recorded, *callbacks: Callback
) -> dict[str, str]:
    job = Job(stage="validate", units=units, work=work, done=set, kind="test", num_equal=len(units), trials=True)
    executor = Trials(cluster, ray.put(pack_splits(splits)), run, callbacks)
    return executor.do(job, units, threads=1, progress=progress)


@pytest.fixture(scope="module")
def ended(cluster: Capacity, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    run = Run(RunStore.create(tmp_path_factory.mktemp("trials") / "run", preset("quickstart")))
    progress, seen = Locked(), Seen()
    units = [Trial(seed=seed, fate=fate) for seed, fate in enumerate(FATES)]
    return Outcome(run.store, _do(cluster, splits, run, units, progress, seen), progress, seen)


def test_every_sound_unit_is_done(ended: Outcome, splits: Splits) -> None:
    assert set(ended.progress.texts) == {"seed=0", "seed=1", "seed=3", "seed=6"}
    assert ended.progress.done == 4
    assert set(ended.progress.texts.values()) == {f"1 threads, {int(splits.train.images.sum())}"}
    assert (1 / 3, "epoch 1") in ended.progress.states["seed=0"]


def test_a_trial_is_started_again_only_where_its_process_died(ended: Outcome) -> None:
    attempts = {file.name: file.stat().st_size for file in (ended.store.path / "attempts").iterdir()}
    assert attempts == {
        "seed=0": 1,
        "seed=1": 2,
        "seed=2": 1,
        "seed=3": 1,
        "seed=4": 1,
        "seed=5": 1 + MAX_FAILURES,
        "seed=6": 1 + DEATHS,
    }


def test_the_failures_are_named(ended: Outcome) -> None:
    message = "the loss is not finite in epoch 3: try a lower learning rate"
    died = ended.failed.pop("seed=5")
    assert "died" in died
    assert ended.failed == {"seed=2": message, "seed=4": "KeyError: 'conv7'"}
    deaths = [note for note in ended.progress.notes if note.startswith("Ray Tune: Trial task failed for trial seed=")]
    assert {note.split("seed=")[1][0] for note in deaths} == {"1", "5", "6"}  # once, and each time
    assert all("\n" not in note and "died" in note for note in deaths)
    notes = {note.split(":")[0]: note for note in ended.progress.notes if not note.startswith("Ray Tune: ")}
    assert set(notes) == {"seed=2", "seed=4"}
    assert notes["seed=2"] == f"seed=2: failed: {message}"
    where = ended.store.path / "tracebacks.txt"
    assert notes["seed=4"] == f"seed=4: failed: KeyError: 'conv7'; the full traceback is in {where}"
    assert 'raise KeyError("conv7")' in where.read_text()  # the line that raised it


def test_a_worker_of_other_versions_is_one_error_of_the_job(
    cluster: Capacity, splits: Splits, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, progress = replace(Versions.here(), torch="1.0.0"), Locked()
    monkeypatch.setattr(Versions, "here", classmethod(lambda cls: driver))  # in this process alone
    units = [Trial(seed=seed) for seed in range(4)]
    with pytest.raises(VersionMismatchError, match=r"runs torch .*, the driver 1\.0\.0; it imports gross_ray from"):
        _do(cluster, splits, run, units, progress)
    assert progress.notes == []
    assert not (run.store.path / "attempts").exists()


def test_a_callback_of_the_user_gets_all_that_tune_reports(ended: Outcome) -> None:
    assert ended.seen.losses["seed=0"] == [8.0, 4.0, 4.0]
    assert ended.seen.losses["seed=1"] == [8.0, 4.0, 8.0, 4.0, 4.0]
    assert sorted(ended.seen.ended) == [f"seed={seed}" for seed, fate in enumerate(FATES) if fate != "always dies"]


class Crowd(Recorded):
    """All cores, taken until someone says that he waits for one."""

    def __init__(self, cluster: Capacity) -> None:
        super().__init__()
        self._taken = ray.util.placement_group([{"CPU": cluster.num_cpus}])
        ray.get(self._taken.ready())

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith("waiting"):
            ray.util.remove_placement_group(self._taken)


def test_a_stage_that_waits_for_a_core_says_so(
    cluster: Capacity, splits: Splits, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "PATIENCE_SECONDS", 1.0)
    crowd = Crowd(cluster)
    assert _do(cluster, splits, run, [Trial(seed=0)], crowd) == {}
    assert set(crowd.notes) == {"waiting for a worker: no core or GPU is free, or it is still starting"}
    assert list(crowd.texts) == ["seed=0"]


def trial_folder(store: RunStore, unit: str) -> Path:
    (experiment,) = (path for path in (store.path / "tune").iterdir() if path.is_dir())
    assert experiment.name.startswith("validate-")
    (folder,) = experiment.glob(f"{unit}_*")
    return folder


def test_the_metrics_are_in_tunes_files(ended: Outcome) -> None:
    lines = (trial_folder(ended.store, "seed=0") / "result.json").read_text().splitlines()
    results: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert [result["loss"] for result in results] == [8.0, 4.0, 4.0]
    assert [result["share"] for result in results] == pytest.approx([1 / 3, 2 / 3, 1.0])
    diverged = (trial_folder(ended.store, "seed=2") / "result.json").read_text().splitlines()[-1]
    assert json.loads(diverged)["failed"].startswith("the loss is not finite")


def scalars(file: Path) -> dict[str, dict[int, float]]:
    """Read a TensorBoard event file: records of (length, its checksum, an Event, its checksum)."""
    found: dict[str, dict[int, float]] = {}
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, {})[event.step] = value.simple_value
        content = content[16 + length :]
    return found


def test_tensorboard_finds_the_metrics_of_each_epoch(ended: Outcome) -> None:
    (file,) = trial_folder(ended.store, "seed=3").glob("events.out.tfevents.*")
    found = scalars(file)
    assert found["ray/tune/loss"] == {1: 8.0, 2: 4.0, 3: 4.0}
    assert found["ray/tune/share"] == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
