"""The search by a strategy: the miniature's supernets, searched in part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from miniature import do, invoke

from gross_ray.errors import InvalidValueError
from gross_ray.report.terminal import results
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel
from gross_ray.search.options import STRATEGY_NAMES
from gross_ray.search.strategies import STRATEGIES
from gross_ray.space import DENSE, Configuration
from gross_ray.training.sampling import settled_scaling
from pipelines.stages import latencies, rounds, validate
from pipelines.stages import search as stage
from pipelines.units import Context

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
    shutil.copytree(whole_run, to, ignore=shutil.ignore_patterns(".lock", "report.html"))
    for table in ("configurations", "selections", "validations", "alpha_sweep"):
        shutil.rmtree(to / "tables" / table)
    for done in ("search-plan", "validate"):
        shutil.rmtree(to / "checkpoints" / done)
    experiment = json.loads((to / "experiment.json").read_text())
    experiment["search"] |= {"strategy": strategy, "evaluations": evaluations, **options}
    (to / "experiment.json").write_text(json.dumps(experiment))
    return to


def opened(run: Path) -> Run:
    return Run(RunStore.open(run))


@pytest.fixture(scope="module")
def by_surrogate(whole_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, searched by a strategy."""
    run = part_of(whole_run[0], tmp_path_factory.mktemp("rounds") / "run", "surrogate")
    do("search", run)
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
    scores = store.read_table("scores").set_index("configuration")["score"]
    assert scores.index.is_unique and set(scores.index) == set(rows["configuration"])
    assert set(selections["budget"]) == {"16-16-16", "4-4-4"}
    assert (selections["macs"] <= selections["budget_macs"]).all()
    for budget, chosen in selections.groupby("budget"):
        limit = chosen["budget_macs"].iloc[0]
        fitting = rows[(rows["macs"] <= limit) & (rows["configuration"] != budget)]
        best = fitting.groupby("configuration")["val_accuracy"].median()
        first = chosen.sort_values("rank").iloc[0]
        assert first["configuration"] == scores[best.index].idxmax()
        assert first["supernet_accuracy"] == best[first["configuration"]]


def test_again_it_does_nothing_and_the_later_stages_go_on(by_surrogate: Path) -> None:
    tables = by_surrogate / "tables" / "configurations"
    before = {file: file.stat().st_mtime_ns for file in tables.iterdir()}
    do("search", by_surrogate)
    assert {file: file.stat().st_mtime_ns for file in tables.iterdir()} == before
    status = invoke("status", by_surrogate).stdout
    assert f"search {len(before)} of {len(before)}" in " ".join(status.split())
    told = invoke("search", by_surrogate, "--budget", "macs=2.2M", "--top", "1").stdout
    assert "Most accurate within macs=2.2M" in told
    do("sweep-alpha", by_surrogate)
    store = RunStore.open(by_surrogate)
    assert set(store.read_table("alpha_sweep")["configuration"]) == {"16-16-16", "4-4-4"}
    others = store.read_table("configurations").query("alpha == 4")
    assert sorted(others["configuration"].unique()) == ["16-16-16", "4-4-4"]  # of other supernets the fixed ones alone


def test_interrupted_in_a_round_it_goes_on_as_it_would_have(
    whole_run: tuple[Path, str], by_surrogate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = part_of(whole_run[0], tmp_path / "run", "surrogate")
    expected = searched(by_surrogate)
    work = stage.work

    def interrupted(context: Context, unit: stage.Part) -> str:
        if isinstance(unit, rounds.RoundPart) and (unit.round, unit.number) == (2, 1):
            raise KeyboardInterrupt
        return work(context, unit)

    monkeypatch.setattr(stage, "work", interrupted)
    assert invoke("search", run, "--in-process", "--num-cpus", "1").exit_code == 130
    monkeypatch.undo()
    tables = run / "tables" / "configurations"
    done = {file.name: file.stat().st_mtime_ns for file in tables.glob("*.parquet")}
    assert [name for name in done if "round=2,part=0" in name]
    do("search", run)
    pd.testing.assert_frame_equal(searched(run), expected)
    assert {name: (tables / name).stat().st_mtime_ns for name in done} == done  # nothing is done again


def test_without_its_plan_no_evaluation_is_lost(by_surrogate: Path, tmp_path: Path) -> None:
    run = shutil.copytree(by_surrogate, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    shutil.rmtree(run / "checkpoints/search-plan")
    tables = run / "tables/configurations"
    before = {file: file.stat().st_mtime_ns for file in tables.iterdir()}
    do("search", run)
    assert {file: file.stat().st_mtime_ns for file in tables.iterdir()} == before


@pytest.mark.parametrize("strategy", ["random", "breadth-first", "evolution"])
def test_the_other_strategies_search_too(whole_run: tuple[Path, str], tmp_path: Path, strategy: str) -> None:
    run = part_of(whole_run[0], tmp_path / "run", strategy, 16)
    do("search", run)
    rows = searched(run)
    assert len(rows) == len(rows.drop_duplicates(KEY)) == 18 * RunStore.open(run).experiment.supernet.seeds


def made_up_latency(run: Run, host: str = "a phone") -> LatencyModel:
    """Times by which the most dense layers are the fastest: nothing that MACs would tell."""
    added = {name: {size: 2.0 / size - 2.0 for size in sizes} for name, sizes in run.space.group_sizes.items()}
    return LatencyModel(
        runtime="torch", version="2", device="a chip", host=host, batch_size=1, threads=1, full_ms=6.6,
        added_ms={layer: added | {DENSE: 0.0} for layer, added in added.items()}, num_sampled=20, median_error=0.05,
        noise=0.01,
    )  # fmt: skip


def test_a_strategy_searches_within_a_limit_in_milliseconds(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run = part_of(whole_run[0], tmp_path / "run", "breadth-first", 24, limits=["latency_ms=1.5", "parameters=1.2M"])
    refused = invoke("search", run, "--in-process")
    assert refused.exit_code == 2
    assert "has no measurement in use: run `gross latency` on it before the search" in refused.stderr
    model = made_up_latency(opened(run))
    latencies.put(opened(run), model)
    do("search", run)
    after = opened(run)
    rows = searched(run)
    assert rows["latency_ms"].tolist() == pytest.approx(
        [model.predict(Configuration.parse(one)) for one in rows["configuration"]]
    )
    within, second = rows[rows["latency_ms"] <= 1.5], set(rounds.stored(after)[1])
    assert len(within["configuration"].unique()) >= 6  # its share; at random 24 would have about 4
    assert len(second) > 0
    told = invoke("report", run, "--to", tmp_path / "page.html").stdout
    scores = after.store.read_table("scores").set_index("configuration").loc[within["configuration"].unique()]
    score = scores["score"].max()
    assert scores["standard_error"].isna().all()  # of one supernet
    table = told.split("Most accurate within latency_ms=1.5")[1].split("\n\n")[0]
    (line,) = [one for one in table.splitlines() if one.startswith("  1 ")]
    # The last column is its own accuracy: not trained yet.
    assert line.split()[-2:] == [f"{100 * score:.2f}", "-"]
    (named,) = [one for one in validate.selected_configurations(after) if str(one) == line.split()[1]]
    assert {str(one) for one in validate.selected_configurations(after)} >= set(
        after.store.read_table("selections")["configuration"]
    )
    assert model.predict(named) <= 1.5
    assert "Most accurate within parameters=1.2M" in told
    latencies.put(after, made_up_latency(after, host="another"))
    last = latencies.in_force(after)
    assert last is not None and last.host == "another"
    do("search", run)


@pytest.mark.parametrize(("strategy", "evaluations"), [("random", 16), ("exhaustive", 0)])
def test_limits_alone_need_no_fixed_configuration(
    whole_run: tuple[Path, str], tmp_path: Path, strategy: str, evaluations: int
) -> None:
    limit = "macs=2.5M"
    run = part_of(whole_run[0], tmp_path / "run", strategy, evaluations, budgets=[], limits=[limit])
    experiment = json.loads((run / "experiment.json").read_text())
    experiment["validation"]["fixed"], experiment["sweep"]["alphas"] = [], []
    (run / "experiment.json").write_text(json.dumps(experiment))
    told = do("search", run)
    after = opened(run)
    assert "Most accurate within macs=2.5M" in told.stdout and "nothing stored" not in told.stdout
    if strategy == "random":
        assert rounds.stored(after)[0] == [after.space[0], after.space[-1]]
    rows = searched(run)
    macs = rows.groupby("configuration")["macs"].first()
    fitting = after.store.read_table("scores").set_index("configuration").loc[macs[macs <= 2.5e6].index]
    units = validate.plan(after)
    assert {unit.kind for unit in units} == {"selected"}
    wanted = fitting["score"].nlargest(after.experiment.search.top, keep="all").index
    assert {str(unit.configuration) for unit in units} <= set(wanted)
    assert len({unit.configuration for unit in units}) == after.experiment.search.top
    shown = results(after.store)
    assert "Table 3" not in shown and "by name" not in shown and "Most accurate within macs=2.5M" in shown


def test_a_space_too_large_to_be_searched_whole_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "MOST_EXHAUSTIVE", 251)
    refused = invoke("search", run, "--in-process")
    assert refused.exit_code == 2
    assert "the space has 252 configurations; " in refused.stderr and "search.strategy=surrogate" in refused.stderr
    with pytest.raises(InvalidValueError, match="the space has 252 configurations"):
        stage.check_size(opened(run).space)


def test_the_names_are_those_of_the_strategies() -> None:
    assert set(STRATEGY_NAMES) == set(STRATEGIES)
