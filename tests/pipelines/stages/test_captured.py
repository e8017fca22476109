"""Units with captured steps store what they store without, but for rounding."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.space import Configuration
from gross_ray.training import together
from gross_ray.training.capture import CapturedStep
from pipelines.stages import decompose, finetune, reconstruct, supernets, sweep, train, validate
from pipelines.units import Context

SETTINGS = [
    "data.limit_train=100",
    "data.limit_validation=60",
    "data.limit_test=60",
    "training.epochs=2",
    "training.seeds=1",
    "decomposition.max_steps=5",
    "reconstruction.epochs=2",
    "finetuning.epochs=2",
    "finetuning.augment=crop",
    "validation.seeds=1",
    "validation.finetuning.epochs=2",
]


class _AsItIs(CapturedStep):
    """A stand-in where there is no CUDA: every step is a warm-up."""

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        return self._step(*arguments)


def context_of(run: Run, device: str) -> Context:
    splits = load_dataset(run.experiment.data)
    parts = (splits.train, splits.validation, splits.test)
    here = Splits(splits.name, *(part.to(device) for part in parts), splits.classes)
    return Context(run, here, device, lambda *_, **__: None)


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with what comes before the trainings that are compared."""
    store = RunStore.create(tmp_path_factory.mktemp("plain") / "run", preset("quickstart").override(SETTINGS))
    context = context_of(Run(store), "cpu")
    for stage in (train, decompose):
        for unit in stage.plan(context.run):
            stage.work(context, unit)
    return store.path


def trained(decomposed: Path, folder: Path, device: str, *, capture: bool) -> RunStore:
    """Do a unit of each of the other training stages in this process."""
    shutil.copytree(decomposed, folder)
    file = folder / "experiment.json"
    experiment = json.loads(file.read_text())
    experiment["engine"]["capture"] = capture
    file.write_text(json.dumps(experiment))
    store = RunStore.open(folder)
    context = context_of(Run(store), device)
    for stage in (reconstruct, finetune):
        for unit in stage.plan(context.run):
            stage.work(context, unit)
    for one in validate.units_of(context.run, [Configuration.parse("2-8-16")]):
        validate.work(context, one)
    return store


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_units_store_the_same(decomposed: Path, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(decomposed, tmp_path / "plain", device, capture=False)
    if device == "cpu":
        for module in (
            "gross_ray.training.loop",
            "gross_ray.training.together",
            "pipelines.stages.supernets",
        ):
            monkeypatch.setattr(f"{module}.captures", lambda engine, _: engine.capture)
        monkeypatch.setattr("gross_ray.training.loop.CapturedStep", _AsItIs)
        monkeypatch.setattr(together, "CapturedStep", _AsItIs)
    captured = trained(decomposed, tmp_path / "captured", device, capture=True)
    ours, theirs = (
        store.read_table("history").drop(columns=["seconds", "images_per_second"]) for store in (captured, plain)
    )
    assert set(ours["stage"]) == {"train", "reconstruct", "finetune", "validate-reconstruct", "validate-finetune"}
    accuracies = ["val_accuracy"]
    pd.testing.assert_frame_equal(ours.drop(columns=accuracies), theirs.drop(columns=accuracies), rtol=2e-3)
    assert (ours["val_accuracy"] - theirs["val_accuracy"]).abs().max() <= 2 / 60
    (unit,) = captured.finished_units("validations")
    one, other = (store.load_checkpoint("validate", unit)[0] for store in (captured, plain))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-2, atol=1e-4, msg=name)
    assert _reported(Run(captured), device) == [1, 2, 3, 4]


def _reported(run: Run, device: str) -> list[float]:
    """Train a supernet of the sweep in its trial, as the stage does unless it trains several at a time."""
    assert not supernets.in_groups(run)
    epochs: list[float] = []
    context = replace(context_of(run, device), report=lambda *_, **metrics: epochs.append(metrics["trial_epoch"]))
    unit = next(unit for unit in sweep.plan(run) if unit.alpha == 4.0)
    sweep.work(context, unit)
    return epochs
