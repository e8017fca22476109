"""The sweep over alpha as trials of the real Ray Tune: stopped early, proposed by Optuna, interrupted and continued."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pipelines.alpha_trials import OptunaOptions
from ray.tune import Callback
from torch import nn

from gross_ray.btd.options import BTDOptions
from gross_ray.data.image_set import ImageSet
from gross_ray.data.images import load_dataset
from gross_ray.errors import InvalidValueError, UnitsFailedError
from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from gross_ray.search.evaluator import evaluate_configurations
from gross_ray.space import SearchSpace
from gross_ray.supernet.build import decompose_model
from pipelines import decompose, sweep, train, validate
from pipelines.commands.terminal import Reporter
from pipelines.driver import DataSource, Session
from pipelines.execution.cluster import Cluster, Resources
from pipelines.units import Context, Unit

SETTINGS = [
    "data.limit_train=300",
    "data.limit_validation=60",
    "data.limit_test=60",
    "training.epochs=4",
    "training.milestones=[]",
    "training.batch_size=32",
    "training.lr=0.02",
    "training.seeds=1",
    "decomposition.layers=['conv4']".replace("'", '"'),
    "decomposition.max_steps=15",
    "reconstruction.epochs=1",
    "finetuning.epochs=4",
    "search.budgets=[16]",
    "search.form=bottleneck",
    "validation.fixed=[1]",
    "validation.seeds=1",
    "sweep.alphas=[0,2,8]",
]
NUM_EPOCHS = 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A run folder in which all is done that the sweep needs, in this process."""
    store = RunStore.create(tmp_path_factory.mktemp("prepared") / "run", preset("quickstart").override(SETTINGS))
    context = Context(store, load_dataset(store.experiment.data), "cpu", lambda *_, **__: None)
    threads = torch.get_num_threads()
    for stage in (train, decompose):
        for unit in stage.plan(store):
            stage.work(context, unit)
    for unit in validate.units_of(store, validate.fixed_configurations(store), "fixed"):
        validate.work(context, unit)
    torch.set_num_threads(threads)
    return store


def copy_of(store: RunStore, folder: Path) -> RunStore:
    shutil.copytree(store.path, folder)
    return RunStore.open(folder)


def do(store: RunStore, callbacks: Sequence[Callback] = (), **how: Any) -> str:
    """Do the stage as the command does it, and return what it told."""
    told = io.StringIO()
    with Session.opened(
        store, Resources(num_cpus=2, device="cpu"), DataSource(), Reporter(told), callbacks=callbacks
    ) as session:
        sweep.run(session, **how)
    return told.getvalue()


def results(store: RunStore) -> dict[str, list[dict[str, Any]]]:
    """What the trials of the latest Tune experiment reported, by unit."""
    experiments = [path for path in (store.path / "tune").iterdir() if path.is_dir()]
    latest = max(experiments, key=lambda path: path.stat().st_mtime)
    reported = [[json.loads(line) for line in file.open()] for file in latest.glob("*/result.json")]
    return {rows[0]["config"]["unit"]["name"]: rows for rows in reported}


def mean_over_fixed(store: RunStore, unit: str) -> float:
    """The oracle: the search's own evaluation of the fixed configurations in one supernet."""
    configurations = store.read_table("configurations")
    rows = configurations[(configurations["supernet"] == unit) & configurations["configuration"].isin(["1", "16"])]
    assert len(rows) == 2
    return float(rows["val_correct"].sum() / rows["val_total"].sum())


def test_the_metric_has_the_batch_norm_statistics_that_the_search_takes() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
        supernet = decompose_model(network, options=BTDOptions(tolerance=1e-2)).eval()
        pixels = torch.randint(256, (400, 3, 12, 12), dtype=torch.uint8)
        labels = torch.randint(4, (200,))
    images, calibration = ImageSet(pixels[:200], labels), pixels[200:]
    space = SearchSpace.of(supernet)
    found = {
        name: sweep.mean_accuracy(supernet, list(space), images, some)
        for name, some in {"own": calibration, "the network's": None}.items()
    }
    table = evaluate_configurations(supernet, images.images, labels, calibration=calibration, form="bottleneck")
    assert found["own"] == pytest.approx(table["accuracy"].mean(), abs=1 / 800)
    assert abs(found["own"] - found["the network's"]) > 1 / 200


def files(store: RunStore) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in store.path.rglob("*") if file.is_file() and file.name != ".lock"}


def work_with_played_accuracies(context: Context, unit: Unit) -> str:
    """The real work, that reports a lower accuracy the higher alpha is."""

    def report(share: float, text: str, **metrics: float) -> None:
        context.report(share, text, **{**metrics, "supernet_accuracy": 1 - unit.arguments["alpha"] / 10})

    return real_work(replace(context, report=report), unit)


real_work = sweep.work


def test_asha_stops_the_worst_and_a_plain_sweep_continues_them(
    prepared: RunStore, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_of(prepared, tmp_path / "run")
    names = [unit.name for unit in sweep.plan(store)]  # alpha 0, 2 and 8, one after the other: each has two cores
    monkeypatch.setattr(sweep, "work", work_with_played_accuracies)
    told = do(store, scheduler="asha")
    trials = store.read_table("alpha_trials")
    assert trials["unit"].tolist() == names
    assert trials["status"].tolist() == ["completed", "stopped", "stopped"]
    assert trials["epochs"].tolist() == [NUM_EPOCHS, 2, 2]  # none within the reconstruction
    assert trials["supernet_accuracy"].tolist() == pytest.approx([1.0, 0.8, 0.2])
    assert [[row["trial_epoch"] for row in results(store)[name]][:5] for name in names] == [
        [1, 2, 3, 4, 5],
        [1, 2],
        [1, 2],
    ]
    assert sweep.finished(store) == {names[0]}
    assert "2 of 3 stopped early, and not compared" in told

    before = files(store)
    again = do(store, scheduler="asha")
    assert "sweep-alpha: 3 units, 3 done already" in again
    assert files(store) == before

    monkeypatch.undo()
    do(store)
    assert sweep.finished(store) == set(names)
    trials = store.read_table("alpha_trials").set_index("unit")
    assert trials["status"].tolist() == ["completed"] * 3
    continued = results(store)
    assert set(continued) == set(names[1:])
    for name in names[1:]:
        assert [row["trial_epoch"] for row in continued[name]] == [3, 4, 5, 5]  # from the epoch at which it was stopped
        assert trials.loc[name, "supernet_accuracy"] == pytest.approx(mean_over_fixed(store, name), abs=1 / 120)


class Interrupts(Callback):
    """Sends Ctrl-C to this process, as Tune catches it, once so many trials ended and another one has reported."""

    def __init__(self, after: int) -> None:
        self._after, self._ended = after, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ended += 1

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if self._ended == self._after and result["share"] < 1:
            self._ended = -100
            os.kill(os.getpid(), signal.SIGINT)


def test_a_search_that_tune_ends_early_names_what_is_missing_and_goes_on_with_it(
    prepared: RunStore, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_DISABLE_SIGINT_HANDLER", "0")  # its own makes `fit` return as if all were done
    store = copy_of(prepared, tmp_path / "run")
    optuna = OptunaOptions(trials=3, alpha_low=0.5, alpha_high=6.0)
    with pytest.raises(UnitsFailedError) as found:
        do(store, [Interrupts(after=1)], optuna=optuna, scheduler="asha")
    first = store.read_table("alpha_trials").set_index("trial")
    ended = first[first["status"] != "proposed"]
    missing = [number for number in range(3) if number not in ended.index]
    assert missing  # Tune itself returned without an error
    names = ", ".join(f"trial={number}" for number in missing)
    assert f"{len(missing)} of 3 units did not end: {names} " in str(found.value)
    assert "interrupted" in str(found.value)
    assert set(first["status"]) <= {"proposed", "completed"}  # what Ctrl-C ended was not stopped by the scheduler

    do(store, optuna=optuna)
    trials = store.read_table("alpha_trials").set_index("trial")
    assert trials.index.tolist() == [0, 1, 2]
    assert trials["status"].tolist() == ["completed"] * 3
    proposed = ["unit", "alpha", "scaling", "seed"]
    assert trials.loc[first.index, proposed].equals(first[proposed])
    pd.testing.assert_frame_equal(trials.loc[ended.index], ended)
    assert set(results(store)) == set(trials.loc[missing, "unit"])
    assert trials["alpha"].between(0.5, 6).all()

    before = files(store)
    assert "3 units, 3 done already" in do(store, optuna=optuna)
    assert files(store) == before


def test_a_wrong_scheduler_or_one_without_epochs_to_spare_is_refused(prepared: RunStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="'hyperband': must be one of none, asha"):
        do(prepared, scheduler="hyperband")
    short = RunStore.create(tmp_path / "run", prepared.experiment.override(["finetuning.epochs=1"]))
    with pytest.raises(InvalidValueError, match="finetuning.epochs = 1"):
        do(short, scheduler="asha")
