"""The sweep over alpha: its metric, its comparison with the fixed configurations, failed, interrupted and continued."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gross_ray.btd.options import BTDOptions
from gross_ray.data.image_set import ImageSet
from gross_ray.data.images import load_dataset
from gross_ray.errors import DivergedError, UnitsFailedError
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.evaluator import evaluate_configurations
from gross_ray.space import SearchSpace
from gross_ray.supernet.build import decompose_model
from pipelines.commands.terminal import Reporter
from pipelines.driver import DataSource, Session
from pipelines.resources import Resources
from pipelines.stages import decompose, sweep, train, validate
from pipelines.stages.supernets import Supernet
from pipelines.units import Context

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
    """A run folder in which all is done that the sweep needs."""
    store = RunStore.create(tmp_path_factory.mktemp("prepared") / "run", preset("quickstart").override(SETTINGS))
    run = Run(store)
    context = Context(run, load_dataset(store.experiment.data), "cpu", lambda *_, **__: None)
    for stage in (train, decompose):
        for unit in stage.plan(run):
            stage.work(context, unit)
    for one in validate.units_of(run, validate.fixed_configurations(run)):
        validate.work(context, one)
    return store


def copy_of(store: RunStore, folder: Path) -> RunStore:
    shutil.copytree(store.path, folder)
    return RunStore.open(folder)


def do(store: RunStore) -> str:
    """Do the stage as the command does it, and return what it reported."""
    reported, resources = io.StringIO(), Resources(num_cpus=1, device="cpu", in_process=True)
    with Session.opened(store, resources, DataSource(), Reporter(reported), in_process=True) as session:
        sweep.do(session)
    return reported.getvalue()


Metrics = dict[str, float]
Hook = Callable[[Supernet, Metrics], None]


def record(monkeypatch: pytest.MonkeyPatch, hook: Hook = lambda unit, metrics: None) -> dict[str, list[Metrics]]:
    """Return the metrics that each unit reports from now on, which `hook` gets before."""
    reported: dict[str, list[Metrics]] = {}
    work = sweep.work

    def recorded(context: Context, unit: Supernet) -> str:
        def report(share: float, text: str, **metrics: float) -> None:
            reported.setdefault(unit.name, []).append(metrics)
            context.report(share, text, **metrics)
            hook(unit, metrics)

        return work(replace(context, report=report), unit)

    monkeypatch.setattr(sweep, "work", recorded)
    return reported


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


def test_the_metric_of_a_unit_is_what_the_search_finds(
    prepared: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_of(prepared, tmp_path / "run")
    reported = record(monkeypatch)
    do(store)
    names = [unit.name for unit in sweep.plan(Run(store))]
    assert list(reported) == names and len(names) == 3
    table = store.read_table("alpha_sweep")
    validations = store.read_table("validations").set_index("configuration")
    for name, alpha in zip(names, (0.0, 2.0, 8.0), strict=True):
        assert [metrics["trial_epoch"] for metrics in reported[name]] == [1, 2, 3, 4, 5]
        assert reported[name][-1]["supernet_accuracy"] == pytest.approx(mean_over_fixed(store, name), abs=1 / 120)
        rows = table[table["alpha"] == alpha].set_index("configuration")
        assert set(rows.index) == {"1", "16"}
        assert rows["supernet_accuracy"].mean() == pytest.approx(mean_over_fixed(store, name))
        for configuration, row in rows.iterrows():
            assert row["fixed_accuracy"] == validations.loc[configuration, "val_accuracy"]
            assert row["difference"] == pytest.approx(row["supernet_accuracy"] - row["fixed_accuracy"])

    before = files(store)
    assert "sweep-alpha: 3 units, 3 done already" in do(store)
    assert files(store) == before


def test_a_supernet_that_fails_is_named_the_others_are_compared_and_it_goes_on_from_its_epoch(
    prepared: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_of(prepared, tmp_path / "run")
    names = [unit.name for unit in sweep.plan(Run(store))]

    def diverge(unit: Supernet, metrics: Metrics) -> None:
        if unit.alpha == 2.0 and metrics["trial_epoch"] == 2:
            raise DivergedError("the loss is not finite")

    record(monkeypatch, diverge)
    failure = rf"sweep-alpha: 1 of 3 units did not end: {names[1]} .*the loss is not finite"
    with pytest.raises(UnitsFailedError, match=failure):
        do(store)
    assert sweep.done(Run(store)) == {names[0], names[2]}
    assert sorted(store.read_table("alpha_sweep")["alpha"].unique()) == [0.0, 8.0]
    compared = files(store)

    monkeypatch.undo()
    reported = record(monkeypatch)
    do(store)
    assert sweep.done(Run(store)) == set(names)
    assert list(reported) == [names[1]]
    assert [metrics["trial_epoch"] for metrics in reported[names[1]]] == [3, 4, 5]  # from the epoch that was stored
    assert reported[names[1]][-1]["supernet_accuracy"] == pytest.approx(mean_over_fixed(store, names[1]), abs=1 / 120)
    tables = {file: written for file, written in compared.items() if file.parent.name in ("alpha_sweep", "history")}
    assert files(store).items() >= tables.items()


def test_interrupted_the_sweep_goes_on_with_what_is_missing(
    prepared: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, whole = copy_of(prepared, tmp_path / "run"), copy_of(prepared, tmp_path / "whole")
    do(whole)
    names = [unit.name for unit in sweep.plan(Run(store))]

    def interrupt(unit: Supernet, metrics: Metrics) -> None:
        if unit.alpha == 2.0 and metrics["trial_epoch"] == 4:
            raise KeyboardInterrupt

    record(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        do(store)
    monkeypatch.undo()
    reported = record(monkeypatch)
    do(store)
    epochs = {name: [metrics["trial_epoch"] for metrics in each] for name, each in reported.items()}
    assert epochs == {names[1]: [5], names[2]: list(range(1, NUM_EPOCHS + 1))}
    for table in ("alpha_sweep", "configurations"):
        assert store.read_table(table).equals(whole.read_table(table))


def test_a_sweep_over_nothing_says_so(prepared: RunStore, tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", prepared.experiment.override(["sweep.alphas=[]"]))
    assert "sweep-alpha: the experiment sweeps over nothing (sweep.alphas and sweep.scalings)" in do(store)
    assert store.read_table("runs").empty
