"""Runs whose experiment leaves learning rates open: range tests find them, each before its training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from miniature import do, invoke
from safetensors.torch import save_file

from gross_ray import read_table
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.training import rates as range_tests
from pipelines.stages import rates

SCHEDULES = {
    "training": "train",
    "reconstruction": "reconstruct",
    "finetuning": "finetune",
    "validation.reconstruction": "validate-reconstruct",
    "validation.finetuning": "validate-finetune",
}
SETTINGS = [
    "decomposition.max_steps=5",
    "data.limit_train=100",
    "data.limit_validation=60",
    "data.limit_test=60",
    "training.epochs=2",
    "training.milestones=[]",
    "training.seeds=1",
    "search.form=dense",
    "search.budgets=[16]",
    "validation.fixed=[16]",
    "validation.seeds=1",
    "sweep.alphas=[]",
]
OPEN = [f"{schedule}.lr=0" for schedule in SCHEDULES]


def words(*settings: str) -> list[str]:
    return [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]


@contextmanager
def few_rates() -> Iterator[None]:
    """Try three rates of two steps each, so that a run takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(range_tests, "STEPS", 2)
        patch.setattr(range_tests.find_rate, "__defaults__", ((1e-3, 1e-2, 1e-1),))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rates") / "run"
    with few_rates():
        do("run", "--preset", "quickstart", "--out", out, *words(*OPEN))
    return out


def test_every_training_has_the_rate_that_its_range_test_chose(finished: Path) -> None:
    found = read_table(finished, "range_tests")
    history = read_table(finished, "history")
    assert set(found["schedule"]) == {*SCHEDULES}
    for schedule, stage in SCHEDULES.items():
        tried = found[found["schedule"] == schedule]
        (chosen,) = tried.loc[tried["chosen"], "lr"]
        assert chosen == tried.loc[tried["train_loss"] <= 1.03 * tried["train_loss"].min(), "lr"].min()
        first = history[(history["stage"] == stage) & (history["epoch"] == 1)]
        assert len(first) and set(first["lr"]) == {chosen}, schedule


def test_a_range_test_is_kept_and_not_done_again(finished: Path) -> None:
    files = sorted(finished.glob("tables/range_tests/*.parquet"))
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(before) == len(SCHEDULES)
    do("run", "--preset", "quickstart", "--out", finished, *words(*OPEN))
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_a_stage_that_is_killed_after_its_range_test_keeps_the_rate(finished: Path, run_again: Path) -> None:
    """A lost supernet is trained again with the stored rate, to the same weights."""
    store = RunStore.open(run_again)
    (unit,) = store.checkpoints("finetune")
    before, _ = store.load_checkpoint("finetune", unit)
    store.delete_checkpoint("finetune", unit)
    do("finetune", run_again)
    after, _ = RunStore.open(run_again).load_checkpoint("finetune", unit)
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    pd.testing.assert_frame_equal(read_table(run_again, "range_tests"), read_table(finished, "range_tests"))


@pytest.fixture
def run_again(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))


def test_what_is_taken_over_has_its_range_tests(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    changed = "validation.finetuning.epochs=2"
    with few_rates():
        do("run", "--preset", "quickstart", "--out", out, "--reuse", finished, *words(*OPEN, changed))
    ours, theirs = (read_table(folder, "range_tests").set_index("schedule") for folder in (out, finished))
    stamps = [
        {file.name: file.read_bytes() for file in folder.glob("tables/range_tests/*.parquet")}
        for folder in (out, finished)
    ]
    taken = {f"{name}.parquet" for name in ("training", "reconstruction", "finetuning")}
    assert {name: stamps[0][name] for name in taken} == {name: stamps[1][name] for name in taken}
    assert set(ours.index) == set(theirs.index)


def test_without_its_range_test_a_schedule_names_the_remedy(finished: Path, run_again: Path) -> None:
    RunStore.open(run_again).delete_unit("range_tests", "finetuning")
    run = Run(RunStore.open(run_again))
    assert rates.is_open(run, "finetuning") and not rates.is_open(run, "training")
    with pytest.raises(Exception, match=r"learning rate of finetuning is 0, .* has no range test .* finetuning\.lr"):
        rates.schedule(run, "finetuning")


def test_given_weights_are_trained_on_where_the_experiment_says_so(finished: Path, tmp_path: Path) -> None:
    tensors, _ = RunStore.open(finished).load_checkpoint("train", "seed=0")
    save_file(tensors, tmp_path / "net.safetensors")
    given = ["train", tmp_path / "run", "--preset", "quickstart", "--weights", tmp_path / "net.safetensors"]
    do(*given, *words("training.start=weights", "training.lr=1e-6"))
    adapted, _ = RunStore.open(tmp_path / "run").load_checkpoint("train", "seed=0")
    assert any(not adapted[name].equal(tensor) for name, tensor in tensors.items())
    history = read_table(tmp_path / "run", "history")
    assert history["stage"].tolist() == ["train", "train"] and history["lr"].tolist() == [1e-6, 1e-6]
    # At this rate it stays close to what it began from.
    assert all(adapted[name].allclose(tensor, atol=1e-3) for name, tensor in tensors.items())
    shown = invoke("status", tmp_path / "run").stdout
    assert "train" in shown and "1" in shown
    refused = invoke("train", tmp_path / "b", "--preset", "quickstart", *words("training.start=weights"))
    assert refused.exit_code == 2
    assert "training.start = 'weights': needs weights to begin from; set weights" in refused.stderr
