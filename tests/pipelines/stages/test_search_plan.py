"""The loss of the search's plan: what was evaluated by it stays, as far as it fits the new one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from miniature import assert_equal_tables, do, tables

from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from pipelines.stages import search


@pytest.fixture
def lost(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run without its plan, on as many workers as have made it."""
    monkeypatch.setattr(search, "SHARDS_A_WORKER", 2 * search.SHARDS_A_WORKER)
    shutil.rmtree(run / "checkpoints/search-plan")
    return run


def evaluated(run: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (run / "tables/configurations").iterdir()}


def test_with_as_many_workers_nothing_is_evaluated_again(lost: Path, whole_run: tuple[Path, str]) -> None:
    before = evaluated(lost)
    assert len(before) == 16  # of the search's supernet and of the sweep's
    do("search", lost)
    assert evaluated(lost) == before
    assert search.load_plan(Run(RunStore.open(lost))) == search.load_plan(Run(RunStore.open(whole_run[0])))
    do("sweep-alpha", lost)
    assert evaluated(lost) == before


def test_only_shards_that_overlap_new_ones_go(lost: Path, whole_run: tuple[Path, str]) -> None:
    store = RunStore.open(lost)
    layers = Run(store).space.layers
    shards = [part for part in search.plan(Run(RunStore.open(whole_run[0]))) if isinstance(part, search.Shard)]
    first, second = shards[0].name, shards[1].name
    other = replace(shards[0], stop=shards[1].stop).name
    rows = store.read_units("configurations", [first, second]).assign(latency_ms=None).to_dict("records")
    store.write_table("configurations", other, rows, layers=layers)  # as a plan for fewer workers has cut them
    for unit in (first, second):
        store.delete_unit("configurations", unit)
    before = evaluated(lost)
    do("search", lost)
    after = evaluated(lost)
    assert after.keys() - before.keys() == {f"{first}.parquet", f"{second}.parquet"}
    assert before.keys() - after.keys() == {f"{other}.parquet"}
    assert all(after[file] == before[file] for file in after.keys() & before.keys())
    assert_equal_tables(whole_run[0], lost)


def test_overlapping_shards_go_also_if_the_driver_was_killed_before_it_deleted_them(
    run: Path, whole_run: tuple[Path, str]
) -> None:
    store = RunStore.open(run)
    layers = Run(store).space.layers
    shards = [part for part in search.plan(Run(RunStore.open(whole_run[0]))) if isinstance(part, search.Shard)]
    rows = store.read_units("configurations", [one.name for one in shards[:2]]).assign(latency_ms=None)
    other = replace(shards[0], stop=shards[1].stop).name
    store.write_table("configurations", other, rows.to_dict("records"), layers=layers)
    do("search", run)
    assert other not in store.units("configurations")
    assert_equal_tables(whole_run[0], run)


def test_with_other_workers_every_configuration_is_still_evaluated_once(
    lost: Path, whole_run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SHARDS_A_WORKER", 3)
    do("search", lost)
    do("sweep-alpha", lost)
    ours, theirs = (tables(folder)["configurations"] for folder in (lost, whole_run[0]))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert len(evaluated(lost)) == 2 * 3
