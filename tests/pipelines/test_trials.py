"""Units as trials of the real Ray Tune: retried where the process dies, told where they fail, their metrics kept."""

from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
import torch
from pipelines.trials import MAX_FAILURES, run_trials
from pipelines.tuning import Ended, Tuning
from ray.tune import Callback
from tensorboardX.proto import event_pb2

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import DivergedError
from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from pipelines import watching
from pipelines.execution.cluster import Cluster
from pipelines.units import Context, Unit, pack_splits
from pipelines.watching import StageProgress


class Recorded(StageProgress):
    def __init__(self) -> None:
        super().__init__("test", 0, 0)
        self.texts: dict[str, str] = {}
        self.states: dict[str, set[tuple[float, str]]] = {}
        self.notes: list[str] = []
        self.lock = threading.RLock()  # as a bar on a terminal has one: it cannot be pickled

    def unit_done(self, unit: str, text: str) -> None:
        super().unit_done(unit, text)
        self.texts[unit] = text

    def under_way(self, states: dict[str, tuple[float, str]]) -> None:
        for unit, state in states.items():
            self.states.setdefault(unit, set()).add(state)

    def note(self, text: str) -> None:
        self.notes.append(text)


def work(context: Context, unit: Unit) -> str:
    marks = context.store.path / "attempts" / unit.name
    marks.parent.mkdir(exist_ok=True)
    with marks.open("a") as file:
        file.write("x")
    if unit.arguments["fate"] == "comes further":
        for epoch in range(1, marks.stat().st_size + 2):
            context.report(epoch / 8, f"epoch {epoch}", loss=1.0)
        if epoch < DEATHS + 2:
            os._exit(1)
    for epoch in (1, 2):
        context.report(epoch / 3, f"epoch {epoch}", loss=unit.arguments["loss"] / epoch)
    if unit.arguments["fate"] == "dies once" and marks.stat().st_size == 1:
        os._exit(1)
    if unit.arguments["fate"] == "diverges":
        raise DivergedError("the loss is not finite in epoch 3: try a lower learning rate")
    if unit.arguments["fate"] == "is a bug":
        raise KeyError("conv7")
    if unit.arguments["fate"] == "always dies":
        os._exit(1)
    return f"{torch.get_num_threads()} threads, {int(context.splits.train.images.sum())}"


FATES = {
    "seed=0": "ends",
    "seed=1": "dies once",
    "seed=2": "diverges",
    "seed=3": "ends",
    "seed=4": "is a bug",
    "seed=5": "always dies",
    "seed=6": "comes further",
}
DEATHS = MAX_FAILURES + 2
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


@pytest.fixture(scope="module")
def splits() -> Splits:
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    part = ImageSet(images, torch.arange(6) % 2)
    return Splits("tiny", part, part, part, ("one", "other"))


class Outcome(NamedTuple):
    store: RunStore
    failed: dict[str, str]
    progress: Recorded
    told: dict[str, Ended]
    seen: Seen


@pytest.fixture(scope="module")
def ended(cluster: Cluster, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    store, progress = RunStore.create(tmp_path_factory.mktemp("trials") / "run", preset("quickstart")), Recorded()
    told: dict[str, Ended] = {}
    seen = Seen()
    failed = run_trials(
        "validate",
        work,
        store,
        [Unit(name, {"fate": fate, "loss": 8.0}) for name, fate in FATES.items()],
        cluster=cluster,
        packed_splits=ray.put(pack_splits(splits)),
        threads=1,
        progress=progress,
        tuning=Tuning(on_end=lambda ended: told.update({ended.name: ended})),
        callbacks=[seen],
    )
    return Outcome(store, failed, progress, told, seen)


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
    assert 'raise KeyError("conv7")' in notes["seed=4"]  # a bug is told with its place


def test_each_end_is_told_to_the_stage_but_not_a_death(ended: Outcome) -> None:
    found = {name: (one.failed, one.diverged, one.stopped) for name, one in ended.told.items()}
    assert found == {name: (None, False, False) for name in ("seed=0", "seed=1", "seed=3", "seed=6")} | {
        "seed=2": ("the loss is not finite in epoch 3: try a lower learning rate", True, False),
        "seed=4": ("KeyError: 'conv7'", False, False),
    }
    assert {one.unit.arguments["fate"] for one in ended.told.values()} == {*FATES.values()} - {"always dies"}
    assert ended.told["seed=0"].metrics["loss"] == 4.0


def test_a_callback_of_the_user_is_told_all_that_tune_tells(ended: Outcome) -> None:
    assert ended.seen.losses["seed=0"] == [8.0, 4.0, 4.0]
    assert ended.seen.losses["seed=1"] == [8.0, 4.0, 8.0, 4.0, 4.0]
    assert sorted(ended.seen.ended) == [name for name in FATES if name != "seed=5"]


class Crowd(Recorded):
    """All cores, taken until someone says that he waits for one."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self._taken = ray.util.placement_group([{"CPU": cluster.num_cpus}])
        ray.get(self._taken.ready())

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith("waiting"):
            ray.util.remove_placement_group(self._taken)


def test_a_stage_that_waits_for_a_core_says_so(
    cluster: Cluster, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "PATIENCE_SECONDS", 1.0)
    store, crowd = RunStore.create(tmp_path / "run", preset("quickstart")), Crowd(cluster)
    units = [Unit("seed=0", {"fate": "ends", "loss": 8.0})]
    packed = ray.put(pack_splits(splits))
    failed = run_trials(
        "validate", work, store, units, cluster=cluster, packed_splits=packed, threads=1, progress=crowd
    )
    assert failed == {}
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
