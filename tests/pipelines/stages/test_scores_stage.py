"""The search stores a score for each configuration, and selects the cheapest that is as good as the best too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from miniature import do, invoke

from gross_ray.errors import RunFolderError
from gross_ray.report.searched import Searched
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.scores import Score, Smoothing, by_supernet, group_sizes
from pipelines.stages import search, validate


def of_two_supernets(run: Path, **options: object) -> RunStore:
    """Return the run as if it had evaluated the space in a second supernet too, and had not selected yet."""
    experiment = json.loads((run / "experiment.json").read_text())
    experiment["supernet"]["seeds"] = 2
    experiment["search"] |= options
    (run / "experiment.json").write_text(json.dumps(experiment))
    store, generator = RunStore.open(run), np.random.default_rng(0)
    first = next(unit.supernet for unit in search.plan(Run(store)) if unit.supernet.seed == 0)
    layers = list(Run(store).space.layers)
    for unit in [unit for unit in store.units("configurations") if unit.startswith(f"{first.name},")]:
        rows = store.read_units("configurations", [unit])
        correct = (rows["val_correct"] + generator.integers(-2, 3, len(rows))).clip(0, rows["val_total"])
        second = first.name.replace("seed=0", "seed=1")
        rows = rows.assign(supernet=second, seed=1, val_correct=correct, val_accuracy=correct / rows["val_total"])
        records = rows.astype(object).where(rows.notna(), None).to_dict("records")
        store.write_table("configurations", unit.replace("seed=0", "seed=1"), records, layers=layers)
    for table in ("selections", "scores"):
        for unit in store.units(table):
            store.delete_unit(table, unit)
    return store


def expected(store: RunStore) -> pd.DataFrame:
    """Return scores and standard errors by the library, from all rows at once, with the MACs."""
    alpha = store.experiment.supernet.alpha
    rows = store.read_table("configurations").query(f"alpha == {alpha} and seed < 2")
    score, first = Score(store.experiment.search.score), rows.drop_duplicates("configuration")
    values = by_supernet(rows, score, np.array([0, 1]))
    statistics, errors = score.of_supernets(values), np.full(len(first), np.nan)
    if score.smoothed:
        chosen = group_sizes(first)
        statistics, errors = Smoothing.of(chosen, values, score).predict(chosen, statistics)
    found = pd.DataFrame({"score": statistics, "standard_error": errors}, index=first["configuration"].tolist())
    return found.assign(macs=first["macs"].tolist())


@pytest.mark.parametrize("score", ["smoothed-mean", "smoothed-loss", "median"])
def test_the_selected_are_the_best_scores_and_the_cheapest_as_good(run: Path, score: str) -> None:
    store = of_two_supernets(run, score=score)
    shown = do("search", run).stdout
    by_name = expected(store)
    scores = store.read_table("scores").set_index("configuration")
    pd.testing.assert_frame_equal(
        scores.sort_index(), by_name[["score", "standard_error"]].sort_index(), check_names=False, atol=1e-6
    )
    pd.testing.assert_frame_equal(  # the report has the stored ones
        Searched.of(store).accuracies.set_index("configuration")[["score", "standard_error"]].sort_index(),
        scores.sort_index(),
    )
    for budget, chosen in store.read_table("selections").groupby("budget"):
        limit = chosen["budget_macs"].iloc[0]
        within = by_name[(by_name["macs"] <= limit) & (by_name.index != budget)]
        top = store.experiment.search.top
        assert chosen["configuration"].tolist()[0] == within["score"].idxmax()
        assert within.loc[chosen["configuration"].iloc[:top], "score"].tolist() == (
            within["score"].nlargest(top).tolist()
        )
        best = within.loc[within["score"].idxmax()]
        near = within[within["score"] >= best["score"] - best["standard_error"]]
        if score == "median":
            assert len(chosen) == top and "standard error" not in shown
            continue
        assert near["macs"].min() in chosen["macs"].tolist()
        line = next(line for line in shown.splitlines() if line.startswith(f"under {budget}, "))
        assert f"of the best: {len(near)} configuration" in line
    planned = {str(unit.configuration) for unit in validate.plan(Run(store))}
    assert planned >= set(store.read_table("selections")["configuration"])


def test_other_evaluations_have_other_scores(run: Path) -> None:
    store = of_two_supernets(run)
    do("search", run)
    before = store.read_table("scores")
    again = {file: file.stat().st_mtime_ns for file in (run / "tables" / "scores").iterdir()}
    do("search", run)
    assert {file: file.stat().st_mtime_ns for file in (run / "tables" / "scores").iterdir()} == again
    unit = next(name for name in store.units("configurations") if "seed=0" in name)
    store.delete_unit("configurations", unit)
    store.write_table("scores", "score=mean,part=0,of=9", before.head(1).to_dict("records"))  # by an earlier plan
    do("search", run)  # evaluates it again
    pd.testing.assert_frame_equal(store.read_table("scores"), before)


def test_scores_of_other_configurations_are_not_taken(run: Path) -> None:
    store = of_two_supernets(run)
    do("search", run)
    (name, *_) = store.units("scores")
    rows = store.read_units("scores", [name])
    store.write_table("scores", name, rows.iloc[::-1].to_dict("records"))
    with pytest.raises(RunFolderError, match=r"the table scores \(unit score=smoothed-mean,.*is of other evaluations"):
        Searched.of(store)
    assert "delete its folder" in invoke("report", run).stderr


def test_while_a_search_goes_on_its_finished_supernets_count(run: Path) -> None:
    store = of_two_supernets(run)
    units = [name for name in store.units("configurations") if "seed=1" in name and "alpha=0" in name]
    units = units or [name for name in store.units("configurations") if "seed=1" in name]
    for name in units[1:]:
        store.delete_unit("configurations", name)
    found = Searched.of(store).accuracies
    assert found["standard_error"].isna().all() and not found["score"].isna().any()  # one supernet is finished
    rows = store.read_table("configurations")
    ours = rows[(rows["alpha"] == store.experiment.supernet.alpha) & (rows["seed"] == 0)]
    chosen, values = group_sizes(ours), ours[["val_accuracy"]].to_numpy()
    smoothing = Smoothing.of(chosen, values, Score("smoothed-mean"))
    scores, _ = smoothing.predict(chosen, values[:, 0])
    by_name = found.set_index("configuration")["score"].loc[ours["configuration"]]
    np.testing.assert_allclose(by_name, scores, atol=1e-6)
