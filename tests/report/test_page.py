"""The page against numbers computed from the stored rows by plain Python, and against names that try to break out."""

from __future__ import annotations

import bisect
import html
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from parsed_page import ParsedPage, traces
from runs import (
    FIXED,
    FOUR_CONV,
    SELECTED,
    SETTINGS,
    STAGES,
    TEMPERATURES,
    finished_run,
    new_run,
    write_configurations,
    write_curve,
    write_decompositions,
    write_networks,
    write_selections,
    write_start,
)
from scipy import stats

import gross_ray
from gross_ray.errors import GrossRayError, InvalidValueError, StorageError
from gross_ray.report import charts, space_chart
from gross_ray.report.page import html_page, write_page
from gross_ray.report.results import kinds_of
from gross_ray.report.searched import Searched
from gross_ray.report.space_chart import COST_TITLES, MAX_POINTS
from gross_ray.report.sweep_charts import MAX_PROFILE_POINTS
from gross_ray.report.terminal import results
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import COSTS

ROOT = Path(gross_ray.__file__).parents[1]
TABLE_2 = "Full network and fixed configurations (test split, Table 2)"
TABLE_3 = "Selected under the budget of a fixed configuration (Table 3)"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return finished_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(store: RunStore) -> ParsedPage:
    return ParsedPage(html_page(store))


@pytest.fixture(scope="module")
def searched(store: RunStore) -> dict[str, Row]:
    return medians(store)


def medians(store: RunStore) -> dict[str, Row]:
    """Each configuration's costs and median accuracy over the supernets that are searched, in plain Python."""
    rows = store.read_table("configurations").to_dict("records")
    found: dict[str, Row] = {}
    for row in rows:
        if (row["alpha"], row["scaling"]) == (4.0, "normalised"):
            one = found.setdefault(row["configuration"], {cost: row[cost] for cost in COSTS} | {"all": []})
            one["all"].append(row["val_accuracy"])
    return {name: one | {"accuracy": statistics.median(one["all"])} for name, one in found.items()}


def best(searched: dict[str, Row], cost: str, budget: float) -> str | None:
    """The most accurate within a budget by brute force; ties to the cheaper, then to the smaller group-sizes."""
    fitting = [name for name, one in searched.items() if one[cost] <= budget]
    sizes = {name: [int(size) for size in name.split("-")] for name in fitting}
    order = sorted(fitting, key=lambda name: (-searched[name]["accuracy"], searched[name][cost], sizes[name]))
    return order[0] if order else None


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({statistics.stdev(values):.2f}, {len(values)})"


def accuracies(store: RunStore, column: str = "test_accuracy") -> dict[str, list[float]]:
    own = defaultdict(list)
    for row in store.read_table("validations").to_dict("records"):
        own[row["configuration"]].append(100 * row[column])
    return own


def test_table_2(store: RunStore, page: ParsedPage) -> None:
    full = [100 * value for value in store.read_table("networks")["test_accuracy"]]
    own, table = accuracies(store), page.tables[TABLE_2]
    macs = {row.configuration: row.macs for row in store.read_table("validations").itertuples()}
    assert table.heads == ["network", "median", "mean (std, n)", "M MACs"]
    assert table.rows == [
        ["full", f"{statistics.median(full):.2f}", mean(full), "4.42"],
        *(
            [f"fixed {one}", f"{statistics.median(own[one]):.2f}", mean(own[one]), f"{macs[one] / 1e6:.2f}"]
            for one in FIXED  # the paper's order: the largest first
        ),
    ]


def test_table_3(store: RunStore, page: ParsedPage, searched: dict[str, Row]) -> None:
    own, expected = accuracies(store), []
    for budget, chosen in SELECTED.items():
        for one in (budget, *chosen):
            gain = f"{statistics.mean(own[one]) - statistics.mean(own[budget]):+.2f}"
            p = stats.ttest_ind(own[one], own[budget], equal_var=False).pvalue
            gain += " (<0.001)" if p < 0.001 else f" ({p:.3f})"
            named = f"{one} (fixed)" if one == budget else one
            costs = [f"{searched[one]['macs'] / 1e6:.2f}", f"{100 * searched[one]['accuracy']:.2f}"]
            expected.append([named, *costs, mean(own[one]), "-" if one == budget else gain])
    assert page.tables[TABLE_3].rows == expected


def test_limits_and_configurations_by_name(tmp_path: Path) -> None:
    store = new_run(tmp_path / "run", [*SETTINGS, 'search.limits=["macs=2.7M","latency_ms=1"]'])
    for write in STAGES.values():
        write(store)
    row = {"configuration": "2-2-2", "kind": "selected", "seed": 0, "val_accuracy": 0.5, "test_accuracy": 0.75}
    row |= {"macs": 2_000_000, "macs_paper": 1, "parameters": 1}
    store.write_table("validations", "2-2-2,seed=0", [row])
    page, told = ParsedPage(html_page(store)), results(store)
    fitting = {name: one for name, one in medians(store).items() if one["macs"] <= 2_700_000}
    first = sorted(fitting, key=lambda name: (-fitting[name]["accuracy"], fitting[name]["macs"]))[:2]
    within = "Most accurate within macs=2.7M"
    assert [row[1] for row in page.tables[within].rows] == first
    own = accuracies(store)
    assert [row[-1] for row in page.tables[within].rows] == [mean(own[name]) if own[name] else "-" for name in first]
    assert [line.split()[1] for line in told.split(within)[1].splitlines()[2:4]] == first
    missing = "Most accurate within latency_ms=1"
    assert any(missing in line and "latency_ms is not measured" in line for line in page.missing)
    assert f"{missing}\nmissing: latency_ms is not measured" in told
    assert page.tables["Also trained on their own"].rows == [["2-2-2", "2.00", "50.00 (-, 1)", "75.00 (-, 1)"]]


def test_what_a_search_selected_is_told_from_what_was_only_trained(store: RunStore, tmp_path: Path) -> None:
    """Whatever `kind` says: a configuration named on the command line, or one of a run that was taken over."""
    searched = Searched.of(store)
    selected = {one for some in SELECTED.values() for one in some}
    assert kinds_of(store, searched) == dict.fromkeys(FIXED, "fixed") | dict.fromkeys(selected, "selected")
    named = finished_run(tmp_path / "run")
    for unit in named.units("selections"):
        named.delete_unit("selections", unit)
    assert {one for one, kind in kinds_of(named, searched).items() if kind == "also trained"} == selected
    page = ParsedPage(html_page(named))
    space = traces(page.charts["space"]["versions"][COST_TITLES["macs"][0]])
    assert {about[4] for about in space["also trained"]["customdata"]} == selected and "selected" not in space
    assert set(traces(page.charts["retrained"]["versions"][""])) == {"equal", "fixed", "also trained"}


@pytest.mark.parametrize("by", [0, 1], ids=["selections", "checkpoint"])
def test_a_search_by_a_strategy_says_of_how_many_it_chose(tmp_path: Path, by: int) -> None:
    settings = ["search.strategy=random", "search.evaluations=100", "supernet.seeds=2"]
    store = new_run(tmp_path / "run", settings)
    write_decompositions(store)
    write_configurations(store, seeds=2, limit=18)
    page = ParsedPage(html_page(store))
    assert "18 of 252 configurations that the strategy `random` chose, each" in page.plots["space"]
    assert "Missing: at most 164 of 200 evaluations (run gross search)." in page.missing
    end = (lambda: write_selections(store)), (lambda: store.save_checkpoint("search-rounds", "ended", {}, {}))
    end[by]()  # it found no more than these within its budgets
    assert not any("evaluations" in what for what in ParsedPage(html_page(store)).missing)


def test_a_long_front_is_drawn_whole_and_what_is_marked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space_chart, "MAX_MARKED", 5)
    store = finished_run(tmp_path / "run")
    page = ParsedPage(html_page(store))
    for title, figure in page.charts["space"]["versions"].items():
        line, points = (trace for trace in figure["data"] if trace["name"] == "Pareto front")
        stairs = page.charts["space"]["budgets"][title]
        assert line["y"] == pytest.approx(stairs["scores"])
        assert len(line["y"]) > 5 == len(points["y"])
    steps = len(page.charts["space"]["budgets"][COST_TITLES["macs"][0]]["costs"])
    assert f"Only evenly spaced ones are marked: 5 of {steps} steps of the front." in page.plots["space"]


def test_limits_alone_tell_what_they_lack(tmp_path: Path) -> None:
    alone = ["search.budgets=[]", "validation.fixed=[]", "sweep.alphas=[]", 'search.limits=["macs=2.7M"]']
    store = new_run(tmp_path / "run", [*SETTINGS[:3], *alone])
    write_decompositions(store)
    write_configurations(store, latency=True)
    fitting = {name: one for name, one in medians(store).items() if one["macs"] <= 2_700_000}
    best = sorted(fitting, key=lambda name: (-fitting[name]["accuracy"], fitting[name]["macs"]))[:2]
    for place, name in enumerate(best):
        row = {"configuration": name, "kind": "selected", "seed": 0, "val_accuracy": 0.5 + place / 4}
        row |= {"test_accuracy": 0.75, "macs": 2_000_000, "macs_paper": 1, "parameters": 1}
        store.write_table("validations", f"{name},seed=0", [row])
    told = results(store)
    assert "(Table 3)" not in told and "Also trained" not in told
    assert "missing: 2 of 4 trainings of these configurations on their own (run `gross validate`)" in told
    assert "rank correlation of 2 configurations: it needs 3 or more" in told
    page = ParsedPage(html_page(store))
    assert any("2 of 4 trainings of these configurations" in line for line in page.missing)
    store.delete_unit("configurations", store.units("configurations")[0])
    assert "missing: 252 of 1,260 evaluations (run `gross search`)" in results(store)


def test_every_table_has_a_caption_and_heads_of_rows_and_columns(page: ParsedPage) -> None:
    assert page.elements["table"] == page.elements["caption"] == len(page.tables) == 11
    for table in page.tables.values():
        assert {len(row) for row in table.rows} == {len(table.heads)}
        assert table.scopes == {("th", "col"): len(table.heads), ("th", "row"): len(table.rows)}


def test_the_terminals_cells_are_the_pages(store: RunStore, page: ParsedPage) -> None:
    lines = [line for line in results(store, markdown=True).splitlines() if line.startswith("|")]
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    in_page = [row for table in page.tables.values() for row in (table.heads, *table.rows)]
    assert len(printed) == 21
    assert [row for row in printed if row not in in_page] == []


def test_all_configurations_are_points_where_they_are(page: ParsedPage, searched: dict[str, Row]) -> None:
    assert list(page.charts["space"]["versions"]) == [COST_TITLES[cost][0] for cost in COSTS[:3]]  # no latency here
    for cost, figure in zip(COSTS, page.charts["space"]["versions"].values(), strict=False):
        points = traces(figure)["configurations"]
        unit = COST_TITLES[cost][1]
        at = {about[4]: (x, y) for about, x, y in zip(points["customdata"], points["x"], points["y"], strict=True)}
        assert at.keys() == searched.keys()
        for name, (x, y) in at.items():
            assert (x * unit, y / 100) == pytest.approx((searched[name][cost], searched[name]["accuracy"]))
        for kind, names in (("fixed", FIXED), ("selected", [one for some in SELECTED.values() for one in some])):
            assert {about[4] for about in traces(figure)[kind]["customdata"]} == set(names)
    (about,) = [about for about in points["customdata"] if about[4] == "2-16-64"]
    assert about[0] == "2-16-64"
    assert about[3].split(", ") == ["conv2:\xa02", "conv3:\xa016", "conv4:\xa064"]


def test_the_full_network_is_marked_where_it_is(tmp_path: Path) -> None:
    store = new_run(tmp_path / "run")
    write_configurations(store, latency=True)
    versions = ParsedPage(html_page(store)).charts["space"]["versions"]
    assert all("full network" not in traces(figure) for figure in versions.values()), "none is stored"
    write_networks(store)
    accuracy = 100 * store.read_table("networks")["val_accuracy"].mean()
    versions = ParsedPage(html_page(store)).charts["space"]["versions"]
    for cost, where in (("macs", 4.42), ("parameters", 133.93), ("latency_ms", 9.5)):
        figure = versions[COST_TITLES[cost][0]]
        mark = traces(figure)["full network"]
        assert (mark["x"], mark["y"]) == (pytest.approx([where]), pytest.approx([accuracy]))
        assert figure["layout"]["xaxis"]["range"][1] > where
        in_runtime = "ms for a batch of 1 in torch (predicted)"
        assert (figure["layout"]["xaxis"]["title"]["text"] == in_runtime) == (cost == "latency_ms")
        assert figure["data"][-1]["name"] == "best within the budget", "the page's script draws the ring there"
    assert "full network" not in traces(versions[COST_TITLES["macs_paper"][0]])


def test_the_staircase_names_the_best_within_every_budget(page: ParsedPage, searched: dict[str, Row]) -> None:
    for cost, stairs in zip(COSTS, page.charts["space"]["budgets"].values(), strict=False):
        assert stairs["costs"] == sorted(stairs["costs"])
        limits = sorted({one[cost] + shift for one in searched.values() for shift in (-1, 0, 1)})
        assert len(limits) > 500
        for limit in limits:
            place = bisect.bisect_right(stairs["costs"], limit) - 1
            named = stairs["configurations"][place] if place >= 0 else None
            assert named == best(searched, cost, limit)
            assert named is None or stairs["scores"][place] == 100 * searched[named]["accuracy"]


def test_figure_1_left(store: RunStore, page: ParsedPage) -> None:
    rows = store.read_table("alpha_sweep").to_dict("records")
    figure = traces(page.charts["figure-1-left"]["versions"][""])
    assert len(figure) == len(TEMPERATURES)
    for alpha, scaling in TEMPERATURES:
        line = figure[f"alpha {alpha:g} {scaling}" if alpha else "alpha 0"]
        assert line["x"] == list(FIXED)[::-1]  # the smallest group-sizes first
        for name, height, bar in zip(line["x"], line["y"], line["error_y"]["array"], strict=True):
            key = (alpha, scaling, name)
            found = [r["difference"] for r in rows if (r["alpha"], r["scaling"], r["configuration"]) == key]
            assert (height, bar) == pytest.approx((100 * statistics.mean(found), 100 * statistics.stdev(found)))


def test_figure_1_right(store: RunStore, page: ParsedPage) -> None:
    by_key = defaultdict(list)
    for row in store.read_table("configurations").to_dict("records"):
        by_key[row["alpha"], row["scaling"], row["configuration"]].append(row["val_accuracy"])
    for alpha, scaling in TEMPERATURES:
        trace = traces(page.charts["figure-1-right"]["versions"][""])[
            f"alpha {alpha:g} {scaling}" if alpha else "alpha 0"
        ]
        assert len(trace["text"]) == 252
        for name, height in zip(trace["text"], trace["y"], strict=True):
            assert height == pytest.approx(100 * statistics.mean(by_key[alpha, scaling, name]))


def test_supernet_against_its_own(store: RunStore, page: ParsedPage, searched: dict[str, Row]) -> None:
    own = accuracies(store, "val_accuracy")
    figure = traces(page.charts["retrained"]["versions"][""])
    shown = {}
    for kind in ("fixed", "selected"):
        for about, x, y in zip(figure[kind]["customdata"], figure[kind]["x"], figure[kind]["y"], strict=True):
            shown[about[0]] = (x, y, about[1])
    assert shown.keys() == own.keys()
    for name, (x, y, n) in shown.items():
        assert (x, y, n) == pytest.approx(
            (100 * searched[name]["accuracy"], statistics.mean(own[name]), len(own[name]))
        )
    (line,) = [line for line in results(store).splitlines() if line.startswith("rank correlation")]
    assert line[1:] in page.texts["figcaption"]
    assert line[1:] in page.plots["retrained"]


def test_decompositions_curves_and_times(store: RunStore, page: ParsedPage) -> None:
    (heat,) = page.charts["decompositions"]["versions"][""]["data"]
    errors = {(r.layer, r.group_size): r.relative_error for r in store.read_table("decompositions").itertuples()}
    for layer, row in zip(heat["y"], heat["z"], strict=True):
        for size, cell in zip(heat["x"], row, strict=True):
            assert cell == (round(errors[layer, int(size)], 6) if int(size) in FOUR_CONV[layer] else None)
    history = store.read_table("history")
    assert list(page.charts["curves"]["versions"]) == ["train", "reconstruct", "finetune", "validate-finetune"]
    for stage, figure in page.charts["curves"]["versions"].items():
        units = history.loc[history["stage"] == stage, "unit"].nunique()
        measured = history.loc[history["stage"] == stage, "val_accuracy"].notna().any()
        assert len(figure["data"]) == min(units, 12) * (2 if measured else 1)
    assert "12 of the 40 of validate-finetune" in page.plots["curves"]
    assert "each cell the mean of its 1 repeat: " in page.plots["decompositions"]
    grid = page.tables["Relative error by group-size: mean (std, n)"]
    assert grid.heads == ["layer", *(f"g\xa0=\xa0{2**power}" for power in range(7))]
    assert grid.rows[0] == ["conv2", *(f"{errors['conv2', 2**power]:.4f} (-, 1)" for power in range(6)), "-"]
    first = traces(page.charts["curves"]["versions"]["finetune"])["alpha=4,scaling=normalised,seed=0"]
    rows = history[(history["stage"] == "finetune") & (history["seed"] == 0)]
    assert first["y"] == pytest.approx((100 * rows["val_accuracy"]).tolist())  # the second of the name: accuracy
    times = {row[0]: row[1:] for row in page.tables["Time of training and decomposing"].rows}
    assert times["train"] == ["5", "0:35:25"]  # 5 x 100 epochs of 4.25 s
    assert times["decompose"] == ["19", "0:02:22"]  # 142.5 s
    assert times["these together"][1] == "6:24:52"
    fields = page.tables[
        f"The experiment: {len(store.experiment.fields())} fields, fingerprint {store.experiment.fingerprint()}"
    ].rows
    assert [row[0] for row in fields] == list(store.experiment.fields())
    assert ["sweep.alphas", "[0.0, 2.0, 4.0, 8.0]"] in fields
    (start,) = page.tables["Starts of a command on this run folder"].rows
    assert start == ["2026-11-23 22:47:00", "0.1.0", "3.11.7", "2.15.0", "0.29.2", "2.60.0", "vm", "cpu", "2"]


def test_the_title_names_the_network_and_the_data(page: ParsedPage) -> None:
    assert page.texts["title"] == page.texts["h1"] == "four-conv on sample"


def test_every_figure_has_words_with_numbers(page: ParsedPage) -> None:
    assert list(page.plots) == list(page.charts)
    assert len(page.plots) == page.elements["figure"] == page.elements["figcaption"] == 6
    for text in page.plots.values():
        assert any(letter.isdigit() for letter in text)
        assert len(text) > 100
    assert ("html", "lang", "en") in page.attributes


def test_nothing_is_fetched(page: ParsedPage) -> None:
    for tag, name, value in page.attributes:
        if name in ("src", "href", "action", "srcset", "data"):
            assert value is not None and value.startswith("#"), (tag, name, value)
    assert page.elements["link"] == page.elements["img"] == page.elements["iframe"] == 0
    assert "@import" not in page.texts["style"] and "url(" not in page.texts["style"]
    assert "connect-src" not in html_policy(page) and html_policy(page).startswith("default-src 'none'")


def html_policy(page: ParsedPage) -> str:
    (policy,) = [value for _, name, value in page.attributes if name == "content" and "default-src" in (value or "")]
    return policy or ""


def test_a_finished_run_lacks_nothing(page: ParsedPage) -> None:
    assert page.missing == []


def test_an_unfinished_run_says_what_is_missing_and_what_makes_it(tmp_path: Path) -> None:
    unfinished = new_run(tmp_path / "run")
    expected = {
        None: ["train", "search", "search", "search", "sweep-alpha", "decompose", "train", "run"],  # nothing at all
        "start": ["train", "search", "search", "search", "sweep-alpha", "decompose", "train", "train"],
        "train": ["validate", "search", "search", "search", "sweep-alpha", "decompose"],
        "decompose": ["validate", "search", "search", "search", "sweep-alpha"],
        "finetune": ["validate", "search", "search", "search", "sweep-alpha"],
        "search": ["validate", "validate", "validate", "sweep-alpha"],
        "validate": ["sweep-alpha"],
        "sweep-alpha": [],
    }
    for stage, commands in expected.items():
        if stage is not None:
            STAGES[stage](unfinished)
        parsed = ParsedPage(html_page(unfinished))
        named = [what.partition("run gross ")[2].split(")")[0].split(" or ")[0].rstrip(".") for what in parsed.missing]
        assert sorted(named) == sorted(commands), (stage, parsed.missing)
    assert len(parsed.charts) == 6


def test_a_search_and_a_sweep_that_are_under_way_say_how_far(tmp_path: Path) -> None:
    part = new_run(tmp_path / "run")
    write_decompositions(part)
    write_configurations(part, seeds=2)
    STAGES["sweep-alpha"](part)
    for seed in (2, 3):
        part.delete_unit("configurations", f"alpha=4,scaling=normalised,seed={seed},start=0,stop=252")
        part.delete_unit("alpha_sweep", f"alpha=4,scaling=normalised,seed={seed}")
    missing = ParsedPage(html_page(part)).missing
    assert "Missing: 504 of 1,260 evaluations (run gross search)." in missing
    assert "Missing: 2 of 35 supernets of the sweep (run gross sweep-alpha)." in missing


def test_a_sweep_that_is_not_asked_for_is_not_missing(tmp_path: Path) -> None:
    store = new_run(tmp_path / "run", [*SETTINGS, "sweep.alphas=[]"])
    parsed = ParsedPage(html_page(store))
    sweep = ("section", "id", "sweep")
    assert not any("sweep" in what for what in parsed.missing) and sweep not in parsed.attributes
    assert "sweep-alpha" not in results(store)
    STAGES["sweep-alpha"](store)  # made all the same
    assert sweep in ParsedPage(html_page(store)).attributes
    assert "Sampling temperature" in results(store)


def test_table_3_has_the_latencies_where_they_are_stored(tmp_path: Path) -> None:
    store = new_run(tmp_path / "run")
    write_configurations(store, latency=True)
    write_selections(store)
    rows = store.read_table("configurations").groupby("configuration")["latency_ms"].first()
    page = ParsedPage(html_page(store))
    table = page.tables[TABLE_3]
    assert table.heads[:3] == ["configuration", "M MACs", "ms"]
    assert {row[0].removesuffix(" (fixed)"): row[2] for row in table.rows} == {
        name: f"{rows[name]:.3f}" for name in [*SELECTED, *(one for some in SELECTED.values() for one in some)]
    }
    (note,) = [line for line in results(store).splitlines() if line.startswith("ms: ")]
    assert (
        "one batch of 1 in torch 2 on a phone, 2 threads" in note
        and "median error of the predictions is 1.2 %, over 20" in note
    )


HOSTILE = '</script><b>bold & "quoted"</b><!--'


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    store = new_run(tmp_path / "run", [f"name={HOSTILE}", "supernet.seeds=1"])
    layers = {HOSTILE: (1, 2, 4), "conv3": (1, 2)}
    write_configurations(store, layers, seeds=1)
    write_decompositions(store, layers)
    write_start(store)
    history = {"stage": HOSTILE, "unit": HOSTILE, "seed": 0, "epoch": 1, "lr": 0.1, "train_loss": 1.0}
    history |= {"gradient_norm": 1.0, "val_accuracy": 0.5, "seconds": 1.0, "images_per_second": 1.0}
    store.write_table("history", "hostile", [history])
    validation = {"configuration": HOSTILE, "kind": "fixed", "seed": 0, "val_accuracy": 0.5, "test_accuracy": 0.5}
    store.write_table("validations", "hostile", [validation | {"macs": 1, "macs_paper": 1, "parameters": 1}])
    network = dict.fromkeys(("seed", "val_correct", "val_total", "macs", "parameters"), 1)
    store.write_table("networks", "hostile", [network | {"val_accuracy": 0.5, "test_accuracy": 0.5}])
    text = html_page(store)
    parsed = ParsedPage(text)
    assert parsed.elements["b"] == 0 and parsed.elements["script"] == 3
    assert text.count("</script>") == 3
    assert f"fixed {HOSTILE}" in [row[0] for row in parsed.tables[TABLE_2].rows]
    assert HOSTILE in parsed.texts["p"]
    assert any(HOSTILE in cells[0]["title"] for cells in parsed.strips.values())
    assert HOSTILE in parsed.plots["decompositions"]
    assert {html.unescape(one) for one in parsed.charts["decompositions"]["versions"][""]["data"][0]["y"]} == set(
        layers
    )
    for figure in (figure for chart in parsed.charts.values() for figure in chart["versions"].values()):
        assert "<b>bold" not in json.dumps(figure["data"])  # plotly's labels too are a small HTML
    assert HOSTILE in parsed.charts["curves"]["versions"]  # the chooser's option, plain text


def test_many_configurations_are_a_density_and_a_sample(tmp_path: Path) -> None:
    store = new_run(tmp_path / "run", ["supernet.seeds=2", "search.top=2"])
    layers = {f"features.{place}": (1, 2, 4, 8) for place in range(6)}
    write_configurations(store, layers, seeds=2, latency=True)
    write_selections(store)
    searched = medians(store)
    assert len(searched) == 4**6 > MAX_POINTS
    first, again = (ParsedPage(html_page(store)).charts["space"] for _ in range(2))
    assert first == again
    assert list(first["versions"]) == [title for title, _ in COST_TITLES.values()]
    for cost, (title, figure) in zip(COSTS, first["versions"].items(), strict=True):
        named = traces(figure)
        counts = [round(10**cell) for row in named["density"]["z"] for cell in row if cell is not None]
        assert sum(counts) == pytest.approx(len(searched), rel=0.01)  # logarithms of three digits
        points = named[f"{MAX_POINTS:,} of {len(searched):,} configurations"]
        assert len({about[4] for about in points["customdata"]}) == MAX_POINTS
        unit = COST_TITLES[cost][1]
        for about, x, y in zip(points["customdata"], points["x"], points["y"], strict=True):
            one = searched[about[4]]
            assert (x * unit, y / 100) == pytest.approx((one[cost], one["accuracy"]))
        stairs = first["budgets"][title]
        for limit in sorted({one[cost] for one in searched.values()})[::40]:
            place = bisect.bisect_right(stairs["costs"], limit) - 1
            assert stairs["configurations"][place] == best(searched, cost, limit)
    assert "2,000 points" in ParsedPage(html_page(store)).plots["space"]


def test_many_profiles_are_means_of_brackets(tmp_path: Path) -> None:
    store = new_run(tmp_path / "run")
    layers = {f"conv{place}": (1, 2, 4, 8) for place in range(5)}
    write_configurations(store, layers, TEMPERATURES, seeds=1)
    STAGES["sweep-alpha"](store)
    for unit in store.units("configurations"):
        if unit.endswith("stop=252"):
            store.delete_unit("configurations", unit)
    assert len(TEMPERATURES) * 4**5 > MAX_PROFILE_POINTS
    figure = traces(ParsedPage(html_page(store)).charts["figure-1-right"]["versions"][""])
    rows = store.read_table("configurations").to_dict("records")
    for alpha, scaling in TEMPERATURES:
        trace = figure[f"alpha {alpha:g} {scaling}" if alpha else "alpha 0"]
        counts = [int(text.split()[0]) for text in trace["text"]]
        assert sum(counts) == 4**5
        ours = [r["val_accuracy"] for r in rows if (r["alpha"], r["scaling"]) == (alpha, scaling)]
        weighted = sum(count * height for count, height in zip(counts, trace["y"], strict=True)) / 4**5
        assert weighted == pytest.approx(100 * statistics.mean(ours))


def test_only_the_supernets_that_are_searched_count(store: RunStore) -> None:
    found = Searched.of(store)
    assert (len(found.accuracies), found.num_supernets, found.num_evaluations) == (252, 5, 1260)
    assert found.layers == tuple(FOUR_CONV)
    assert found.costs == ("macs", "macs_paper", "parameters")


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_seen_on_light_and_dark() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = (ROOT / "gross_ray" / "report" / "templates" / "page.css").read_text(encoding="utf-8")
    for theme in style.split("@media"):
        found = dict(
            part.strip().split(": ")
            for part in theme.partition("--page")[2].join(["--page", ""]).split(";")
            if part.strip().startswith("--") and ": " in part
        )
        page = found["--page"]
        assert all(contrast(found[name], page) >= 4.5 for name in ("--text", "--faint", "--link"))
        assert contrast(found["--text"], found["--missing"]) >= 4.5
        assert all(contrast(colour, page) >= 3 for colour in (*charts.COLOURS, charts.GREY))


def test_the_page_goes_into_the_run_folder_and_disturbs_nothing(tmp_path: Path) -> None:
    store = new_run(tmp_path / "run")
    write_start(store)
    before = store.read_table("runs")
    where = Path(write_page(store))
    assert where == store.path / "report.html"
    first = where.read_text(encoding="utf-8")
    assert first.startswith("<!DOCTYPE html>")
    (store.path / ".report.html.0a.tmp").write_text("what a killed writer left")
    again = RunStore.create(store.path, store.experiment)
    with again.lock():
        again.remove_leftovers()
    assert sorted(file.name for file in store.path.iterdir()) == [".lock", "experiment.json", "report.html", "tables"]
    assert again.damaged == []
    assert again.read_table("runs").equals(before)
    write_curve(store, "train", "seed=0", 0, 3, 0.5)
    write_page(store)
    assert where.read_text(encoding="utf-8") != first


def test_the_page_is_whole_or_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_run(tmp_path / "run")
    target = tmp_path / "page.html"
    assert write_page(store, target) == str(target)
    before = target.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="page.html"):
        write_page(store, target)
    assert target.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html", "run"]
    with pytest.raises(InvalidValueError, match="there is no folder"):
        write_page(store, tmp_path / "none" / "page.html")
    assert not (tmp_path / "none").exists()


def test_the_page_goes_into_a_bucket(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")):
        monkeypatch.setenv(name, value)
    address = f"s3://runs/report?scheme=http&endpoint_override=127.0.0.1:{s3_port}&region=us-east-1"
    store = RunStore.create(address, new_run_experiment())
    assert write_page(store) == "s3://runs/report/report.html"
    assert store.storage.read("report.html").startswith(b"<!DOCTYPE html>")
    assert RunStore.create(address, store.experiment).experiment == store.experiment


def new_run_experiment() -> Any:
    from gross_ray.presets import preset

    return preset("quickstart")


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(GrossRayError, match=f"pip install {package}.*--markdown"):
        html_page(new_run(tmp_path / "run"))


@pytest.mark.parametrize(("modules", "expected"), [("page, terminal, results", "False"), ("charts", "True")])
def test_plotly_is_imported_only_where_a_page_is_made(modules: str, expected: str) -> None:
    code = f"import sys; from gross_ray.report import {modules}; print('plotly' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == expected


def test_evenly_keeps_the_ends() -> None:
    for length in range(1, 30):
        found = charts.evenly(range(length), 7)
        assert found == sorted(set(found)) and (found[0], found[-1]) == (0, length - 1)
        assert len(found) == min(length, 7)
    assert not math.isnan(charts.padded([3.0])[0]) and charts.padded([0.0, 0.0])[0] < 0 < charts.padded([0.0, 0.0])[1]


def test_every_mark_has_a_glyph_in_the_legend(page: ParsedPage) -> None:
    script = (Path(charts.__file__).parent / "templates" / "page.js").read_text()
    listed = script.partition("GLYPHS = {")[2].partition("}")[0]
    glyphs = {part.partition(":")[0].strip().strip('"') for part in listed.split(", ")}
    found = {
        trace.get("marker", {}).get("symbol", "circle")
        for chart in page.charts.values()
        for version in chart["versions"].values()
        for trace in version["data"]
    }
    assert "x" in found and {one for one in found if isinstance(one, str)} <= glyphs
