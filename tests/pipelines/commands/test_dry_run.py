"""The time that `gross compress --dry-run` expects: small runs, and how their seconds are scaled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.errors import GrossRayError, UnitsFailedError
from gross_ray.experiment import Experiment
from gross_ray.presets import quickstart
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.training.rates import RATES
from gross_ray.training.rates import STEPS as STEPS_OF_A_RATE
from pipelines.commands.estimating import FewImages, in_small, nothing_is_stored, small_folder
from pipelines.commands.scaling import Done, Scaled, side_by_side
from pipelines.driver import DataSource
from pipelines.resources import Resources
from pipelines.stages import finetune, reconstruct, search, supernets, train, validate
from pipelines.stages.pipeline import STAGES
from pipelines.units import Job, Unit

STEP = {"train": 0.1, "reconstruct": 0.2, "finetune": 0.3, "validate-reconstruct": 0.4, "validate-finetune": 0.5}
"""Seconds of a step of each training in the made-up history of the small run."""
IMAGE = 0.01


def job(stage: str, unit: str = "seed=0") -> Job:
    units: list[Unit] = [supernets.supernet_of(0.0, "index", 0)]
    return Job(stage=stage, units=units, work=lambda *_: unit, done=set, kind=stage, num_equal=1)


@pytest.fixture(scope="module")
def whole() -> Experiment:
    return quickstart().override(
        ["training.seeds=1", "training.batch_size=32", "reconstruction.batch_size=32", "finetuning.batch_size=32"]
        + ["validation.reconstruction.batch_size=32", "validation.finetuning.batch_size=32"]
        + ["training.images=0", "reconstruction.images=0", "finetuning.images=0", "validation.finetuning.images=0"]
        + ["validation.reconstruction.images=0", "search.strategy=surrogate", "search.evaluations=40"]
    )


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_dataset(DataOptions(name="sample", limit_train=640, limit_validation=200, limit_test=100))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, whole: Experiment, splits: Splits) -> Iterator[Run]:
    """A small run whose history says that each step took STEP: epochs of four steps of 32 images."""
    small = in_small(whole, splits)
    store = RunStore.create(tmp_path_factory.mktemp("small") / "run", small)
    for stage, seconds in STEP.items():
        rows = [
            {"stage": stage, "unit": "u", "seed": 0, "epoch": epoch, "lr": 1e-9, "train_loss": 1.0}
            | {"gradient_norm": 1.0, "val_accuracy": None, "seconds": slow * 4 * seconds, "images_per_second": 1.0}
            for epoch, slow in ((1, 3.0), (2, 1.0))  # the first epoch is slower, and does not count
        ]
        store.write_table("history", f"{stage},u", rows)
    yield Run(store)


def scaled(run: Run, whole: Experiment, splits: Splits, small: Splits | None = None) -> Scaled:
    few = small or replace(splits, train=splits.train.first(128), validation=splits.validation.first(100))
    return Scaled(whole, splits, run, few, IMAGE)


@pytest.mark.parametrize("stage", [train.NAME, reconstruct.NAME, finetune.NAME, search.NAME, validate.NAME])
def test_a_run_scaled_to_itself_takes_what_it_took(run: Run, splits: Splits, stage: str) -> None:
    few = replace(splits, train=splits.train.first(128))
    same = Scaled(run.experiment, few, run, few, IMAGE)
    jobs = [Done(job(stage), wall, {"a": 1.5, "b": 2.0}, 2) for wall in (4.0, 3.0, 5.0, 6.0)]
    assert same.stage(stage, jobs, own=1.0) == pytest.approx(1.0 + 4.0 + 3.0 + 5.0 + 6.0)


def test_each_step_and_each_image_more_counts(run: Run, whole: Experiment, splits: Splits) -> None:
    done = [Done(job("finetune"), 7.0, {"a": 5.0}, 1)]
    epochs = whole.finetuning.epochs
    expected = 7.0 + (epochs * 20 - 2 * 4) * STEP["finetune"] + (epochs * 200 - 2 * 100) * IMAGE
    assert scaled(run, whole, splits).stage("finetune", done, own=0.0) == pytest.approx(expected)


def test_networks_are_measured_on_both_splits_at_the_end(run: Run, whole: Experiment, splits: Splits) -> None:
    weights = replace(whole, weights="net.pt", training=replace(whole.training, start="new"))
    done = [Done(job("train"), 7.0, {"a": 5.0}, 1)]
    assert scaled(run, weights, splits).stage("train", done, own=0.0) != pytest.approx(7.0)
    own = whole.validation
    steps = own.reconstruction.epochs * 20 - 8, own.finetuning.epochs * 20 - 8
    images = (own.finetuning.epochs + 1) * 200 - 3 * 100
    more = steps[0] * STEP["validate-reconstruct"] + steps[1] * STEP["validate-finetune"] + images * IMAGE
    two = [Done(job("validate"), 9.0, {"a": 5.0, "b": 6.0, "c": 6.0}, 2)]  # three units on two workers
    assert scaled(run, whole, splits).stage("validate", two, 0.0) == pytest.approx(9.0 + 1.5 * more)


def test_an_open_rate_is_looked_for_first(run: Run, whole: Experiment, splits: Splits) -> None:
    done = [Done(job("finetune"), 7.0, {"a": 5.0}, 1)]
    found = scaled(run, whole, splits).stage("finetune", done, own=0.0)
    open_ = replace(whole, finetuning=replace(whole.finetuning, lr=0.0))
    tests = (len(RATES) - 1) * 2 * STEPS_OF_A_RATE * STEP["finetune"]
    overhead = 2.0  # of the job of the range test, as of the other one
    assert scaled(run, open_, splits).stage("finetune", done, own=0.0) == pytest.approx(found + tests + overhead)


def test_a_round_of_the_search_counts_as_often_as_there_are_rounds(run: Run, whole: Experiment, splits: Splits) -> None:
    plan, first = Done(job("plan"), 3.0, {"plan": 3.0}, 2), Done(job("0"), 2.0, {"a": 1.0}, 2)
    later = [Done(job("1"), 5.0, {"a": 2.0, "b": 2.0}, 2), Done(job("2"), 5.0, {"a": 2.0, "b": 2.0}, 2)]
    times = (200 + 512) / (100 + 128)  # images, with those that recalibrate batch-norms
    expected = 0.5 * 40 / 16 + 3.0 + (1.0 + 1.0 * times) + 5 * (3.0 + 2.0 * times)
    assert scaled(run, whole, splits).stage("search", [plan, first, *later], own=0.5) == pytest.approx(expected)
    every = replace(whole, search=replace(whole.search, strategy="exhaustive", evaluations=0))
    expected = 0.5 + 3.0 + (3.0 + 2.0 * times)
    assert scaled(run, every, splits).stage("search", [plan, later[0]], own=0.5) == pytest.approx(expected)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=20), st.integers(1, 8))
def test_units_side_by_side_take_as_long_as_the_longest_and_their_share(seconds: list[float], slots: int) -> None:
    found = side_by_side(seconds, slots)
    assert found >= max(seconds) and found * slots >= sum(seconds) * (1 - 1e-9)
    assert found == pytest.approx(sum(seconds)) if slots == 1 else found <= sum(seconds) * (1 + 1e-9)


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_the_small_run_is_where_the_nodes_can_reach_it_and_leaves_nothing(tmp_path: Path, address: str | None) -> None:
    with small_folder(str(tmp_path / "run"), Resources(address=address)) as folder:
        RunStore.create(folder, quickstart())
        beside = [path.name for path in tmp_path.iterdir()]
        assert beside == ([] if address is None else ["run.dry-run"])
    assert not list(tmp_path.iterdir()) and not Path(folder).exists()


def test_a_failure_or_an_interruption_says_nothing_of_stored_results() -> None:
    with pytest.raises(GrossRayError) as failed, nothing_is_stored():
        raise UnitsFailedError("train: 1 of 1 units did not end", "All others are stored")
    assert str(failed.value) == "tried in small, train: 1 of 1 units did not end"
    with pytest.raises(KeyboardInterrupt, match="a dry run stores nothing"), nothing_is_stored():
        raise KeyboardInterrupt


def test_the_small_run_is_short_and_else_the_same(whole: Experiment, splits: Splits) -> None:
    small = in_small(whole, splits)
    assert {schedule.epochs for schedule in (small.training, small.finetuning, small.validation.finetuning)} == {2}
    assert small.search.evaluations == 16 and small.search.top == whole.search.top
    assert small.decomposition == whole.decomposition and small.engine == whole.engine
    few = FewImages(of=DataSource(), train=128).load(DataOptions(name="sample", limit_train=640, limit_validation=200))
    assert (len(few.train), len(few.validation)) == (128, 200) and len(few.test) <= 1024
    assert set(STAGES) >= {"train", "decompose"}
