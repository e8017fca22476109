"""The printed tables against numbers computed from the stored rows by the statistics module."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from gross_ray.presets import preset
from gross_ray.report import results as tables
from gross_ray.report.searched import Searched
from gross_ray.report.terminal import as_text, front_table, results, stage_results
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import Budget
from gross_ray.search.options import SCORES
from gross_ray.search.scores import Score
from gross_ray.search.selection import NearBest, near_best


def network_table(store: RunStore, *, markdown: bool = False) -> str:
    return as_text(tables.network_table(store), markdown)


def selection_table(store: RunStore, *, markdown: bool = False) -> str:
    return as_text(tables.selection_table(store), markdown)


def sweep_table(store: RunStore, *, markdown: bool = False) -> str:
    return as_text(tables.sweep_table(store), markdown)


def budget_table(best: pd.DataFrame, budgets: Sequence[Budget], near: NearBest | None = None) -> str:
    return as_text(tables.budget_table(best, budgets, MEAN, near))


MEAN = Score("smoothed-mean")


NETWORKS = [0.9012, 0.8877, 0.9101]
MACS = {"16-16": 2_000_000, "4-4": 900_000, "1-2": 400_000, "2-32": 1_900_000, "4-1": 850_000, "1-4": 800_000}
SUPERNETS = {
    "16-16": (0.81, 0.83, 0.8),
    "4-4": (0.7, 0.72, 0.79),
    "1-2": (0.3, 0.5, 0.4),
    "2-32": (0.85, 0.86, 0.9),
    "4-1": (0.75, 0.77, 0.74),
    "1-4": (0.74, 0.7, 0.71),
}
OWN = {"16-16": (0.88, 0.8925), "4-4": (0.8511, 0.86), "2-32": (0.9, 0.889, 0.91), "4-1": (0.87,), "1-4": (0.84, 0.85)}
SELECTED = {"4-4": ("4-1", "1-4"), "16-16": ("2-32",)}
"""In this order a plain listing of the folder has them too: the smaller budget first."""


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    settings = ["supernet.seeds=3", "supernet.alpha=4.0", "supernet.scaling=normalised", "search.score=median"]
    return RunStore.create(tmp_path / "run", preset("quickstart").override(settings))


def _write_networks(store: RunStore) -> None:
    for seed, accuracy in enumerate(NETWORKS):
        row = {"seed": seed, "val_correct": 9, "val_total": 10, "val_accuracy": 0.9, "test_accuracy": accuracy}
        store.write_table("networks", f"seed={seed}", [{**row, "macs": 12_345_678, "parameters": 1000}])


def _write_configurations(
    store: RunStore, alpha: float, *, shift: float = 0.0, seeds: Sequence[int] = range(3)
) -> None:
    for seed in seeds:
        supernet = f"alpha={alpha:g},scaling=normalised,seed={seed}"
        rows = [
            {
                "supernet": supernet,
                "alpha": alpha,
                "scaling": "normalised",
                "seed": seed,
                "configuration": configuration,
                "layer conv2": int(configuration.split("-")[0]),
                "layer conv3": int(configuration.split("-")[1]),
                "macs": MACS[configuration],
                "macs_paper": MACS[configuration],
                "parameters": 10,
                "val_correct": 1,
                "val_total": 2,
                "val_accuracy": accuracies[seed % 3] + shift,
                "val_loss": 1.0,
                "latency_ms": None,
            }
            for configuration, accuracies in SUPERNETS.items()
        ]
        store.write_table("configurations", f"{supernet},shard=0", rows, layers=["conv2", "conv3"])


def _write_selections(store: RunStore) -> None:
    for budget, chosen in SELECTED.items():
        rows = [
            {
                "budget": budget,
                "budget_macs": MACS[budget],
                "rank": rank,
                "configuration": configuration,
                "macs": MACS[configuration],
                "supernet_accuracy": statistics.median(SUPERNETS[configuration]),
            }
            for rank, configuration in enumerate(chosen, 1)
        ]
        store.write_table("selections", f"budget={budget}", rows[::-1])


def _write_validations(
    store: RunStore, configurations: Sequence[str] = tuple(OWN), val_accuracies: Mapping[str, float] | None = None
) -> None:
    for configuration in configurations:
        for seed, accuracy in enumerate(OWN[configuration]):
            row = {
                "configuration": configuration,
                "kind": "fixed" if configuration in SELECTED else "selected",
                "seed": seed,
                "val_accuracy": 0.5 if val_accuracies is None else val_accuracies[configuration] + seed / 100,
                "test_accuracy": accuracy,
                "macs": MACS[configuration],
                "macs_paper": 1,
                "parameters": 1,
            }
            store.write_table("validations", f"{configuration},seed={seed}", [row])


def _write_sweep(store: RunStore) -> dict[tuple[float, str], dict[str, list[float]]]:
    differences = {
        (0.0, "index"): {"16-16": [-0.03, -0.011], "4-4": [0.02, 0.004]},
        (4.0, "normalised"): {"16-16": [0.001, 0.002], "4-4": [-0.2, -0.1]},
    }
    for (alpha, scaling), by_configuration in differences.items():
        for seed in range(2):
            rows = [
                {
                    "alpha": alpha,
                    "scaling": scaling,
                    "seed": seed,
                    "configuration": configuration,
                    "supernet_accuracy": 0.5 + values[seed],
                    "fixed_accuracy": 0.5,
                    "difference": values[seed],
                }
                for configuration, values in by_configuration.items()
            ]
            store.write_table("alpha_sweep", f"alpha={alpha:g},scaling={scaling},seed={seed}", rows)
    return differences


def _write_all(store: RunStore) -> None:
    _write_networks(store)
    _write_configurations(store, 4.0)
    _write_selections(store)
    _write_validations(store)
    _write_sweep(store)


def _cells(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table's rows, without its head."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def _mean(values: Sequence[float]) -> str:
    percent = [100 * value for value in values]
    spread = f"{statistics.stdev(percent):.2f}" if len(percent) > 1 else "-"
    return f"{statistics.mean(percent):.2f} ({spread}, {len(percent)})"


def _median(values: Sequence[float]) -> str:
    return f"{100 * statistics.median(values):.2f}"


def test_networks(store: RunStore) -> None:
    _write_networks(store)
    _write_validations(store)
    assert _cells(network_table(store, markdown=True)) == [
        ["full", _median(NETWORKS), _mean(NETWORKS), "12.35"],
        ["fixed 16-16", _median(OWN["16-16"]), _mean(OWN["16-16"]), "2.00"],
        ["fixed 4-4", _median(OWN["4-4"]), _mean(OWN["4-4"]), "0.90"],
    ]


def test_selections_come_under_the_largest_budget_first_and_by_rank(store: RunStore) -> None:
    _write_configurations(store, 4.0)
    _write_configurations(store, 2.0, shift=-0.2)  # of the sweep: not the supernets that are searched
    _write_configurations(store, 4.0, shift=0.05, seeds=[3, 4])  # of the sweep too, beyond supernet.seeds
    _write_selections(store)
    _write_validations(store)

    def row(configuration: str, fixed: str) -> list[str]:
        own, reference = OWN[configuration], OWN[fixed]
        difference = f"{100 * (statistics.mean(own) - statistics.mean(reference)):+.2f}"
        if len(own) > 1:  # 4-1 was trained once
            difference += f" ({stats.ttest_ind(own, reference, equal_var=False).pvalue:.3f})"
        return [
            f"{configuration} (fixed)" if configuration == fixed else configuration,
            f"{MACS[configuration] / 1e6:.2f}",
            _median(SUPERNETS[configuration]),
            _mean(own),
            "-" if configuration == fixed else difference,
        ]

    wanted = [("16-16", "16-16"), ("2-32", "16-16"), ("4-4", "4-4"), ("4-1", "4-4"), ("1-4", "4-4")]
    assert _cells(selection_table(store, markdown=True)) == [row(*pair) for pair in wanted]
    stage = stage_results(store, "search").splitlines()
    assert [line.split()[0] for line in stage] == ["budget", "16-16", "4-4", "4-4"]


def test_differences_without_a_spread_or_a_second_repeat_have_no_p_value() -> None:
    once, twice, same = pd.Series([0.5]), pd.Series([0.5, 0.75]), pd.Series([0.25, 0.25])
    assert tables.difference_text(once, twice) == "-12.50" == tables.difference_text(once, twice)
    assert tables.difference_text(same, pd.Series([0.125, 0.125])) == "+12.50"
    assert tables.difference_text(twice, same) == "+37.50 (0.205)"
    assert tables.difference_text(pd.Series([0.75, 0.7501, 0.75]), pd.Series([0.25, 0.2501])) == "+50.00 (<0.001)"


def test_the_rank_correlation_is_over_all_validated_configurations(store: RunStore) -> None:
    _write_configurations(store, 4.0)
    _write_configurations(store, 2.0, shift=-0.2)  # of the sweep: not the supernets that are searched
    _write_selections(store)
    assert "rank correlation" not in selection_table(store)
    _write_validations(store, ["4-4", "4-1"])
    assert "rank correlation of 2 configurations: it needs 3 or more" in selection_table(store)
    few = {"4-4": 0.3, "4-1": 0.5, "2-32": 0.7}
    _write_validations(store, list(few), few)
    row = {"configuration": "8-8", "kind": "selected", "seed": 0, "val_accuracy": 0.1, "test_accuracy": 0.1}
    store.write_table("validations", "8-8,seed=0", [row | {"macs": 1, "macs_paper": 1, "parameters": 1}])
    told = "of 3 of the 4 validated configurations in the supernet and on their own (val), too few for intervals"
    assert f"rank correlation {told}: Spearman 1.00, Kendall 1.00" in selection_table(store)
    store.delete_unit("validations", "8-8,seed=0")  # it was never evaluated in the supernet
    # Medians in the supernet: 0.81, 0.72, 0.86, 0.75, 0.71, so that one of ten pairs, the last two by rank, is swapped.
    own = {"16-16": 0.6, "4-4": 0.3, "2-32": 0.7, "4-1": 0.5, "1-4": 0.4}
    _write_validations(store, val_accuracies=own)
    (line,) = [line for line in selection_table(store).splitlines() if line.startswith("rank correlation")]
    assert "of 5 configurations" in line
    number = r"(-?\d\.\d\d)"
    found = re.search(rf"Spearman {number} \[{number}, {number}\], Kendall {number} \[{number}, {number}\]", line)
    assert found
    spearman, rho_low, rho_high, kendall, tau_low, tau_high = map(float, found.groups())
    assert (spearman, kendall) == (0.9, 0.8)  # 1 - 6 * 2 / (5 * 24), and 1 - 2 / 10
    assert -1 <= rho_low < 0.9 < rho_high == 1 and -1 <= tau_low < 0.8 < tau_high == 1
    assert line in stage_results(store, "validate") and line in results(store)  # the same interval each time
    assert f"\n\n{line}" in selection_table(store, markdown=True)
    assert len(_cells(selection_table(store, markdown=True))) == 5
    _write_validations(store)
    assert "rank correlation of 5 configurations: all are equally accurate on their own" in selection_table(store)


def _accuracies(**columns: Any) -> pd.DataFrame:
    rows = {"configuration": ["2-32", "16-16"], "macs": [1_900_000, 2_004_999], "macs_paper": [1_950_000, 2_104_000]}
    return pd.DataFrame(
        rows
        | {
            "parameters": [12_000, 9_000],
            "latency_ms": [0.5, 1.25],
            "score": [0.86, 0.8125],
            "standard_error": math.nan,
        }
        | columns
    )


def _words(text: str) -> list[list[str]]:
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def test_the_best_under_budgets() -> None:
    title, heads, *rows = _words(budget_table(_accuracies(), [Budget("macs", 2.66e6), Budget("latency_ms", 1.5)]))
    assert title == ["Most accurate within macs=2.66M and latency_ms=1.5"]
    assert heads == ["rank", "configuration", "M MACs", "parameters", "ms", "in supernet (val)"]
    assert rows == [["1", "2-32", "1.90", "12000", "0.500", "86.00"], ["2", "16-16", "2.00", "9000", "1.250", "81.25"]]
    _, heads, *rows = _words(budget_table(_accuracies(latency_ms=None), [Budget("macs_paper", 3e6)]))
    assert heads == ["rank", "configuration", "M MACs", "M MACs (the paper's)", "parameters", "in supernet (val)"]
    assert rows[1] == ["2", "16-16", "2.00", "2.10", "9000", "81.25"]


def test_scores_have_their_standard_errors_and_a_note_the_cheapest_that_is_as_good() -> None:
    best = _accuracies(standard_error=[0.0512, 0.004])
    near = near_best([best], [Budget("macs", 2.66e6)], best.iloc[0])
    heads, *rows, (note,) = _words(budget_table(best, [Budget("macs", 2.66e6)], near))[1:]
    assert heads[-1] == "in supernet (val): score (s.e.)"
    assert [row[-1] for row in rows] == ["86.00 (5.12)", "81.25 (0.40)"]
    assert note == (
        "within one standard error (5.12) of the best: 2 configurations; the cheapest of them: 2-32 (macs=1.9M)"
    )
    front = _words(front_table(best.assign(score=[-0.6931, -0.7]), ["macs"], Score("smoothed-loss")))
    assert [row[-1] for row in front[2:]] == ["-0.6931 (0.0512)", "-0.7000 (0.0040)"]


@pytest.mark.parametrize("name", SCORES)
def test_table_3_with_every_score(tmp_path: Path, name: str) -> None:
    """Its cells are those of `Searched`, and the notes those of `near_best`, by the definition."""
    settings = ["supernet.seeds=3", "supernet.alpha=4.0", "supernet.scaling=normalised", f"search.score={name}"]
    store = RunStore.create(tmp_path / "run", preset("quickstart").override(settings))
    _write_configurations(store, 4.0)
    _write_selections(store)
    searched = Searched.of(store)
    found = searched.accuracies.set_index("configuration")
    shown = selection_table(store)
    if not searched.score.smoothed:
        assert "(s.e.)" not in shown and "standard error" not in shown and found["standard_error"].isna().all()
        return
    assert f"in supernet: {searched.score.over(3)}, with its standard error" in shown
    for configuration in {*SELECTED, *(one for chosen in SELECTED.values() for one in chosen)}:
        assert f"{searched.score.text(found['score'][configuration])} (" in shown
    for budget in SELECTED:
        others = found[(found["macs"] <= MACS[budget]) & (found.index != budget)].sort_values("macs")
        best = others.loc[others["score"].idxmax()]
        near = others[others["score"] >= best["score"] - best["standard_error"]]
        assert f"under {budget}, within one standard error" in shown
        line = next(line for line in shown.splitlines() if line.startswith(f"under {budget}, "))
        assert f"of the best: {len(near)} configuration" in line
        assert f"the cheapest of them: {near.index[0]} (macs=" in line


def test_the_front() -> None:
    title, heads, *rows = _words(front_table(_accuracies(), ["latency_ms"], MEAN))
    assert title == ["Pareto front of latency_ms and accuracy in the supernet"]
    assert heads == ["configuration", "M MACs", "parameters", "ms", "in supernet (val)"]
    assert rows == [["2-32", "1.90", "12000", "0.500", "86.00"], ["16-16", "2.00", "9000", "1.250", "81.25"]]


def test_sweep(store: RunStore) -> None:
    differences = _write_sweep(store)
    rows = [
        [
            name,
            *(  # the smallest group-sizes first
                f"{100 * statistics.mean(values):+.2f} ({100 * statistics.stdev(values):.2f})"
                for _, values in sorted(
                    differences[key].items(), key=lambda item: [int(size) for size in item[0].split("-")]
                )
            ),
            "2",
        ]
        for name, key in (("0", (0.0, "index")), ("4 normalised", (4.0, "normalised")))
    ]
    assert _cells(sweep_table(store, markdown=True)) == rows


def test_what_is_missing_is_said(store: RunStore) -> None:
    commands = ["gross train", "gross search", "gross sweep-alpha"]
    assert [line for line in results(store).splitlines() if line.startswith("missing")] == [
        f"missing: run `{command}`" for command in commands
    ]
    _write_networks(store)
    fixed = "trainings of fixed configurations on their own (run `gross validate`)"
    assert _missing(network_table(store)) == [f"4 of 4 {fixed}"]
    store.delete_unit("networks", "seed=1")
    assert _missing(network_table(store)) == ["1 of 3 base networks (run `gross train`)", f"4 of 4 {fixed}"]
    _write_networks(store)
    _write_configurations(store, 4.0)
    _write_selections(store)
    shown = "trainings of these configurations on their own (run `gross validate`)"
    num = 2 * len(OWN)
    assert _missing(selection_table(store)) == [f"{num} of {num} {shown}"]
    _write_validations(store, list(SELECTED))  # as the sweep over alpha leaves it: the selected ones still miss
    assert _missing(selection_table(store)) == [f"{num - 4} of {num} {shown}"]
    assert _missing(network_table(store)) == []
    assert [row[4] for row in _cells(selection_table(store, markdown=True))] == ["-"] * 5
    _write_validations(store)
    _write_sweep(store)
    assert _missing(results(store)) == [f"1 of {num} {shown}"]  # of 4-1; the third repeat of 2-32 is none of the plan
    store.delete_unit("validations", f"{list(SELECTED)[0]},seed=1")
    assert _missing(results(store)) == [f"1 of 4 {fixed}", f"2 of {num} {shown}"]
    store.delete_unit("alpha_sweep", "alpha=4,scaling=normalised,seed=0")
    assert _missing(sweep_table(store)) == ["1 of 2 supernets of the sweep (run `gross sweep-alpha`)"]


def _missing(text: str) -> list[str]:
    return [line.removeprefix("missing: ") for line in text.splitlines() if line.startswith("missing")]


def test_markdown_has_the_same_cells_in_each_row_and_nothing_right_above(store: RunStore) -> None:
    _write_all(store)
    blocks = [block for block in results(store, markdown=True).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    for block in blocks:
        head, rule, *rows = block.splitlines()
        assert rows
        assert set(rule) <= set("|-: ")
        assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
        assert all(line.startswith("| ") and line.endswith(" |") for line in (head, rule, *rows))


def test_the_terminals_tables_hold_the_same_cells_in_columns(store: RunStore) -> None:
    _write_all(store)
    for make in (network_table, selection_table, sweep_table):
        lines = [line for line in make(store).splitlines()[2:] if line.startswith("  ")]
        assert len({len(line) for line in lines}) == 1
        for line, cells in zip(lines, _cells(make(store, markdown=True)), strict=True):
            assert line.split() == " ".join(cells).split()


def test_a_stage_shows_its_own_table(store: RunStore) -> None:
    assert stage_results(store, "train") == "nothing stored"
    assert stage_results(store, "finetune") == "nothing stored"
    _write_all(store)
    assert len(stage_results(store, "train").splitlines()) == 1 + len(NETWORKS)
    assert stage_results(store, "sweep-alpha") == sweep_table(store)
    assert stage_results(store, "validate") == f"{network_table(store)}\n\n{selection_table(store)}"
    for stage, unit in (("finetune", "alpha=4,scaling=normalised,seed=0"), ("reconstruct", "other")):
        rows = [
            {"stage": stage, "unit": unit, "seed": 0, "epoch": epoch, "lr": 0.1, "train_loss": 1 / epoch}
            | {"gradient_norm": 1.0, "val_accuracy": None, "seconds": 1.0, "images_per_second": 1.0}
            for epoch in (1, 2, 4)
        ]
        store.write_table("history", f"{stage},{unit}", rows)
    head, last = stage_results(store, "finetune").splitlines()
    shown = dict(zip(head.split(), last.split(), strict=True))
    assert (shown["unit"], shown["epoch"], shown["train_loss"]) == ("alpha=4,scaling=normalised,seed=0", "4", "0.25")


def test_selections_without_their_evaluation_say_what_to_run(store: RunStore) -> None:
    _write_configurations(store, 4.0)
    _write_selections(store)
    for unit in store.finished_units("configurations"):
        store.delete_unit("configurations", unit)
    assert "run `gross search`" in selection_table(store)
