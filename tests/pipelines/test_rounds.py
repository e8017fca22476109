"""The search by a strategy, through the real command line: the miniature's supernets, searched in part."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from miniature import command, gross
from pipelines.networks import load_base
from pipelines.predictions import put, stored_model
from pipelines.rounds import stored

from gross_ray.errors import InvalidValueError
from gross_ray.report.terminal import results
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import Budget
from gross_ray.search.latency import LatencyModel
from gross_ray.search.options import STRATEGY_NAMES
from gross_ray.search.selection import best_under, supernet_accuracies
from gross_ray.search.strategies import STRATEGIES
from gross_ray.space import Configuration
from gross_ray.training.sampling import settled_scaling
from pipelines import search as stage
from pipelines import validate

EVALUATIONS = 40
KEY = ["supernet", "configuration"]


def searched(run: Path) -> pd.DataFrame:
    store = RunStore.open(run)
    supernets = store.experiment.supernet
    rows = store.read_table("configurations")
    scaling = settled_scaling(supernets.alpha, supernets.scaling)
    ours = rows[(rows["alpha"] == supernets.alpha) & (rows["scaling"] == scaling)]
    return ours.sort_values(KEY, ignore_index=True)


def part_of(whole_run: Path, to: Path, strategy: str, evaluations: int = EVALUATIONS, **options: object) -> Path:
    """The run as it is before its search, of the same experiment but for the strategy."""
    shutil.copytree(whole_run, to, ignore=shutil.ignore_patterns("tune", ".lock", "report.html"))
    for table in ("configurations", "selections", "validations", "alpha_sweep", "alpha_trials"):
        shutil.rmtree(to / "tables" / table)
    for done in ("search-plan", "validate"):
        shutil.rmtree(to / "checkpoints" / done)
    experiment = json.loads((to / "experiment.json").read_text())
    experiment["search"] |= {"strategy": strategy, "evaluations": evaluations, **options}
    (to / "experiment.json").write_text(json.dumps(experiment))
    return to


def search(run: Path) -> str:
    ended = gross("search", str(run), "--num-cpus", "2")
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


@pytest.fixture(scope="module")
def by_surrogate(whole_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = part_of(whole_run[0], tmp_path_factory.mktemp("rounds") / "run", "surrogate")
    search(run)
    return run


def test_a_part_of_the_space_is_evaluated_as_in_the_whole(whole_run: tuple[Path, str], by_surrogate: Path) -> None:
    rows, whole = searched(by_surrogate), searched(whole_run[0])
    store = RunStore.open(by_surrogate)
    seeds = store.experiment.supernet.seeds
    assert len(rows) == len(rows.drop_duplicates(KEY)) == (EVALUATIONS + 2) * seeds  # and two fixed ones
    same = rows.merge(whole, on=KEY, suffixes=("", " whole"))
    assert len(same) == len(rows)
    for column in ("val_correct", "macs", "parameters", "layer conv2"):
        assert (same[column] == same[f"{column} whole"]).all()
    selections = store.read_table("selections")
    assert set(selections["budget"]) == {"16-16-16", "4-4-4"}
    assert (selections["macs"] <= selections["budget_macs"]).all()
    for budget, chosen in selections.groupby("budget"):
        limit = chosen["budget_macs"].iloc[0]
        fitting = rows[(rows["macs"] <= limit) & (rows["configuration"] != budget)]
        best = fitting.groupby("configuration")["val_accuracy"].median().max()
        assert chosen["supernet_accuracy"].max() == best


def test_again_it_does_nothing_and_the_later_stages_go_on(by_surrogate: Path) -> None:
    tables = by_surrogate / "tables" / "configurations"
    before = {file: file.stat().st_mtime_ns for file in tables.iterdir()}
    search(by_surrogate)
    assert {file: file.stat().st_mtime_ns for file in tables.iterdir()} == before
    status = gross("status", str(by_surrogate)).stdout
    assert f"search {len(before)} of {len(before)}" in " ".join(status.split())
    told = gross("search", str(by_surrogate), "--budget", "macs=2.2M", "--top", "1").stdout
    assert "Most accurate within macs=2.2M" in told
    swept = gross("sweep-alpha", str(by_surrogate), "--num-cpus", "2")
    assert swept.returncode == 0, swept.stderr
    store = RunStore.open(by_surrogate)
    assert set(store.read_table("alpha_sweep")["configuration"]) == {"16-16-16", "4-4-4"}
    others = store.read_table("configurations").query("alpha == 4")
    assert sorted(others["configuration"].unique()) == ["16-16-16", "4-4-4"]  # of other supernets the fixed ones alone


def test_killed_in_a_round_it_goes_on_as_it_would_have(
    whole_run: tuple[Path, str], by_surrogate: Path, tmp_path: Path
) -> None:
    run = part_of(whole_run[0], tmp_path / "run", "surrogate")
    expected = searched(by_surrogate)
    process = subprocess.Popen(
        command("search", str(run), "--num-cpus", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    tables = run / "tables" / "configurations"
    deadline = time.monotonic() + 200
    while not list(tables.glob("*round=2,*")) and time.monotonic() < deadline:
        time.sleep(0.05)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {file.name: file.stat().st_mtime_ns for file in tables.glob("*.parquet")}
    assert done
    search(run)
    pd.testing.assert_frame_equal(searched(run), expected)
    assert {name: (tables / name).stat().st_mtime_ns for name in done} == done  # nothing is done again


@pytest.mark.parametrize("strategy", ["random", "breadth-first", "evolution"])
def test_the_other_strategies_search_too(whole_run: tuple[Path, str], tmp_path: Path, strategy: str) -> None:
    run = part_of(whole_run[0], tmp_path / "run", strategy, 16)
    search(run)
    rows = searched(run)
    assert len(rows) == len(rows.drop_duplicates(KEY)) == 18 * RunStore.open(run).experiment.supernet.seeds


def made_up_latency(store: RunStore, host: str = "a phone") -> LatencyModel:
    """Times by which the most dense layers are the fastest: nothing that MACs would tell."""
    times = {name: {size: 1.0 / size for size in sizes} for name, sizes in load_base(store).space.group_sizes.items()}
    return LatencyModel(
        device="a chip", host=host, batch_size=1, threads=1, rest_ms=0.5, layer_ms=times, offset_ms=0.1, slope=2.0,
        num_sampled=20, median_error=0.05,
    )  # fmt: skip


def test_a_strategy_searches_within_a_limit_in_milliseconds(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run = part_of(whole_run[0], tmp_path / "run", "breadth-first", 24, limits=["latency_ms=1.5", "parameters=1.2M"])
    refused = gross("search", str(run), "--num-cpus", "2")
    assert refused.returncode == 2
    assert "no measurement of it that counts: run `gross latency` on it before the search" in refused.stderr
    store = RunStore.open(run)
    model = made_up_latency(store)
    put(store, model)
    search(run)
    rows = searched(run)
    assert rows["latency_ms"].tolist() == pytest.approx(
        [model.predict(Configuration.parse(one)) for one in rows["configuration"]]
    )
    within, rounds = rows[rows["latency_ms"] <= 1.5], set(stored(store)[1])
    assert len(within["configuration"].unique()) >= 6  # its share; at random 24 would have about 4
    assert len(rounds) > 0
    told = gross("report", str(run), "--to", str(tmp_path / "page.html")).stdout
    best = within.groupby("configuration")["val_accuracy"].median().max()
    table = told.split("Most accurate within latency_ms=1.5")[1].split("\n\n")[0]
    (line,) = [one for one in table.splitlines() if one.startswith("  1 ")]
    # The last column is its own accuracy: not trained yet.
    assert line.split()[-2:] == [f"{100 * best:.2f}", "-"]
    (named,) = [one for one in validate.selected_configurations(store) if str(one) == line.split()[1]]
    assert {str(one) for one in validate.selected_configurations(store)} >= set(
        store.read_table("selections")["configuration"]
    )
    assert made_up_latency(store).predict(named) <= 1.5
    assert "Most accurate within parameters=1.2M" in told
    put(store, made_up_latency(store, host="another"))
    last = stored_model(store)
    assert last is not None and last.host == "another"
    search(run)


@pytest.mark.parametrize(("strategy", "evaluations"), [("random", 16), ("exhaustive", 0)])
def test_limits_alone_need_no_fixed_configuration(
    whole_run: tuple[Path, str], tmp_path: Path, strategy: str, evaluations: int
) -> None:
    limit = "macs=2.5M"
    run = part_of(whole_run[0], tmp_path / "run", strategy, evaluations, budgets=[], limits=[limit])
    experiment = json.loads((run / "experiment.json").read_text())
    experiment["validation"]["fixed"], experiment["sweep"]["alphas"] = [], []
    (run / "experiment.json").write_text(json.dumps(experiment))
    store = RunStore.open(run)
    told = gross("search", str(run), "--num-cpus", "2")
    assert told.returncode == 0, told.stderr
    assert "Most accurate within macs=2.5M" in told.stdout and "nothing stored" not in told.stdout
    if strategy == "random":
        assert stored(store)[0] == [load_base(store).space[0], load_base(store).space[-1]]
    rows = searched(run)
    best = supernet_accuracies(rows[rows["macs"] <= 2.5e6])
    units = validate.plan(store)
    assert {unit.arguments["kind"] for unit in units} == {"selected"}
    wanted = best_under(best, Budget.parse_all(limit), store.experiment.search.top)["configuration"]
    assert {unit.arguments["configuration"] for unit in units} == set(wanted)
    shown = results(store)
    assert "Table 3" not in shown and "by name" not in shown and "Most accurate within macs=2.5M" in shown


def test_a_space_too_large_to_be_searched_whole_is_refused(
    whole_run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "MOST_EXHAUSTIVE", 251)
    session = SimpleNamespace(store=RunStore.open(whole_run[0]))
    with pytest.raises(InvalidValueError, match="the space has 252 configurations; .*search.strategy=surrogate"):
        stage.run(session)


def test_the_names_are_those_of_the_strategies() -> None:
    assert set(STRATEGY_NAMES) == set(STRATEGIES)
