"""Units as trials of the real Ray Tune: retried where the process dies, told where they fail, their metrics kept."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import ray
import torch

from gross_ray.data.images import ImageSet, Splits
from gross_ray.errors import DivergedError
from gross_ray.presets import preset
from gross_ray.results.store import RunStore
from pipelines.cluster import Cluster
from pipelines.progress import StageProgress
from pipelines.trials import run_trials
from pipelines.units import Context, Unit, pack_splits


class Recorded(StageProgress):
    def __init__(self) -> None:
        super().__init__("test", 0, 0)
        self.texts: dict[str, str] = {}
        self.states: dict[str, set[tuple[float, str]]] = {}
        self.notes: list[str] = []

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
    for epoch in (1, 2):
        context.report(epoch / 3, f"epoch {epoch}", loss=unit.arguments["loss"] / epoch)
    if unit.arguments["fate"] == "dies once" and marks.stat().st_size == 1:
        os._exit(1)
    if unit.arguments["fate"] == "diverges":
        raise DivergedError("the loss is not finite in epoch 3: try a lower learning rate")
    return f"{torch.get_num_threads()} threads, {int(context.splits.train.images.sum())}"


FATES = {"seed=0": "ends", "seed=1": "dies once", "seed=2": "diverges", "seed=3": "ends"}


@pytest.fixture(scope="module")
def splits() -> Splits:
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    part = ImageSet(images, torch.arange(6) % 2)
    return Splits("tiny", part, part, part, ("one", "other"))


@pytest.fixture(scope="module")
def ended(
    cluster: Cluster, splits: Splits, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunStore, dict[str, str], Recorded]:
    store, progress = RunStore.create(tmp_path_factory.mktemp("trials") / "run", preset("quickstart")), Recorded()
    failed = run_trials(
        "validate",
        work,
        store,
        [Unit(name, {"fate": fate, "loss": 8.0}) for name, fate in FATES.items()],
        cluster=cluster,
        packed_splits=ray.put(pack_splits(splits)),
        threads=1,
        progress=progress,
    )
    return store, failed, progress


Ended = tuple[RunStore, dict[str, str], Recorded]


def test_every_sound_unit_is_done(ended: Ended, splits: Splits) -> None:
    _, _, progress = ended
    assert set(progress.texts) == {"seed=0", "seed=1", "seed=3"}
    assert progress.done == 3
    assert set(progress.texts.values()) == {f"1 threads, {int(splits.train.images.sum())}"}
    assert (1 / 3, "epoch 1") in progress.states["seed=0"]


def test_a_trial_is_started_again_where_its_process_died_and_not_where_it_met_our_error(ended: Ended) -> None:
    attempts = {file.name: file.stat().st_size for file in (ended[0].path / "attempts").iterdir()}
    assert attempts == {"seed=0": 1, "seed=1": 2, "seed=2": 1, "seed=3": 1}


def test_the_failures_are_named(ended: Ended) -> None:
    _, failed, progress = ended
    message = "the loss is not finite in epoch 3: try a lower learning rate"
    assert failed == {"seed=2": message}
    assert [note for note in progress.notes if message in note] == [f"seed=2: failed: {message}"]


def test_the_metrics_are_in_tunes_files(ended: Ended) -> None:
    (experiment,) = (path for path in (ended[0].path / "tune").iterdir() if path.is_dir())
    assert experiment.name.startswith("validate-")
    (sound,) = experiment.glob("seed=0_*/result.json")
    results: list[dict[str, Any]] = [json.loads(line) for line in sound.read_text().splitlines()]
    assert [result["loss"] for result in results] == [8.0, 4.0, 4.0]
    assert [result["share"] for result in results] == pytest.approx([1 / 3, 2 / 3, 1.0])
    (diverged,) = experiment.glob("seed=2_*/result.json")
    assert json.loads(diverged.read_text().splitlines()[-1])["failed"].startswith("the loss is not finite")
