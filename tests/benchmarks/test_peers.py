"""`benchmarks/peers.py --miniature`: every method within its budget, with the same training, and nothing done twice."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import peer_plan
import peers
import pytest
import torch
from hooked import hooked_macs
from peer_decisions import METHODS, NARROWER, TAYLOR, Bench, cost_of
from peer_plan import Plan, Training
from peer_table import FULL, MORE, NETWORKS, ROWS, read

SMALL = peers.MINIATURE


@dataclass(frozen=True)
class Finished:
    """A finished miniature."""

    out: Path
    plan: Plan
    rows: pd.DataFrame
    """The rows of its trainings."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    out = tmp_path_factory.mktemp("peers")
    threads = torch.get_num_threads()
    peers.main(["run", str(out), "--miniature"])
    asked = peers._parser().parse_args(["run", str(out), "--miniature"])
    vars(asked).update(SMALL)
    rows = read([out], ROWS)
    yield Finished(out, Plan(out=out, asked=asked), rows[rows["method"] != FULL])
    torch.set_num_threads(threads)


def test_every_method_has_every_rate_and_the_best_one_with_every_seed(finished: Finished) -> None:
    methods = {*METHODS, TAYLOR + MORE}
    cells = finished.rows.groupby(["method", "budget"])
    assert {*cells.groups} == {(method, budget) for method in methods for budget in SMALL["budgets"]}
    for _, cell in cells:
        first, later = cell[cell["seed"] == 0], cell[cell["seed"] != 0]
        assert sorted(first["lr"]) == sorted(SMALL["rates"]) and later["seed"].tolist() == [1]
        (again,) = later["lr"]
        chosen = first.set_index("lr")["val_accuracy"]
        assert chosen[again] == chosen.max()


def test_networks_are_within_their_budget_and_cost_what_their_rows_say(finished: Finished) -> None:
    bench, full = finished.plan.bench, hooked_macs(finished.plan.bench.base)
    for method in METHODS:
        for budget in SMALL["budgets"]:
            decision = finished.plan.decision(method, budget)
            assert decision is not None
            network = bench.build(decision, seed=1)
            macs = hooked_macs(network)
            stored = finished.rows[(finished.rows["method"] == method) & (finished.rows["budget"] == budget)]
            assert {*stored["macs"]} == {macs} == {decision.macs}
            assert {*stored["parameters"]} == {sum(parameter.numel() for parameter in network.parameters())}
            cost, limit = cost_of(budget)
            assert macs <= limit * full or cost != "macs"
    assert (finished.rows[["ort_ms_1", "ort_ms_64", "full_ort_ms_1"]] > 0).all().all()
    assert (finished.rows["ort_ms_64"] > finished.rows["ort_ms_1"]).all()


def test_all_methods_train_on_as_many_images(finished: Finished) -> None:
    images = finished.rows.groupby("method")["train_images"].unique()
    same = [method for method in METHODS if method != NARROWER]
    assert all(images[method].tolist() == [SMALL["epochs"] * SMALL["images"]] for method in same)
    assert images[NARROWER].tolist() == [SMALL["epochs"] * SMALL["images"] + SMALL["base_images"]]
    decided = finished.rows[finished.rows["method"] == "ours"].groupby("budget")["decision_images"].first()
    # The command has 128 images in an epoch: an epoch each for the supernet's and the one candidate's two trainings.
    assert decided.tolist() == [4 * 128] * 2
    assert images[TAYLOR + MORE].tolist() == [SMALL["epochs"] * SMALL["images"] + 4 * 128]
    assert (finished.rows[finished.rows["method"] != "ours"]["decision_images"] == 0).all()


def test_a_repeated_command_does_nothing_again(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("does again what is stored")

    files = {file: file.stat().st_mtime_ns for file in finished.out.rglob("*.parquet")}
    for module, name in ((peer_plan, "train_network"), (Bench, "decide"), (Bench, "full")):
        monkeypatch.setattr(module, name, refuse)
    peers.main(["run", str(finished.out), "--miniature"])
    assert "all trainings are stored" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in finished.out.rglob("*.parquet")} == files


def test_the_time_ends_before_a_training_and_the_next_command_does_only_that_one(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = next((finished.out / "tables" / ROWS).glob("tucker,*seed=1.parquet"))
    before = pd.read_parquet(lost)
    lost.unlink()
    peers.main(["run", str(finished.out), "--miniature", "--minutes", "0"])
    assert "the time is over: 1 trainings left" in capsys.readouterr().out and not lost.exists()
    peers.main(["run", str(finished.out), "--miniature"])
    assert "[0 left] four-conv" in capsys.readouterr().out
    again = pd.read_parquet(lost)
    pd.testing.assert_frame_equal(again.drop(columns="minutes"), before.drop(columns="minutes"))


def test_all_seeds_are_those_of_every_rate(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished.plan.asked, "all_seeds", True)
    cells = len(SMALL["methods"]) * len(SMALL["budgets"])
    missing = list(finished.plan.trainings())
    assert len(missing) == finished.plan.left() == cells
    assert {one.seed for one in missing} == {1}


def test_a_budget_that_no_network_keeps_is_passed_over(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Bench, "decide", lambda *_: None)
    plan = replace(finished.plan, out=tmp_path, beyond=set())
    vars(plan)["bench"] = finished.plan.bench  # a cached property
    monkeypatch.setattr(Bench, "full", lambda *_: finished.plan.decision("tucker", "macs=60%"))
    assert list(plan.trainings()) == [] and plan.left() == 0
    assert capsys.readouterr().out.count("no network is within the budget") == len(METHODS) * len(SMALL["budgets"])


def test_a_training_that_diverges_is_a_row_without_accuracies(finished: Finished, tmp_path: Path) -> None:
    decision = finished.plan.decision("tucker", "macs=60%")
    assert decision is not None
    longer = argparse.Namespace(**vars(finished.plan.asked) | {"epochs": 2})
    plan = replace(finished.plan, out=tmp_path, asked=longer)
    vars(plan)["bench"] = finished.plan.bench  # a cached property
    plan.train(Training(decision=decision, lr=1e30, seed=0))
    (row,) = read([tmp_path], ROWS).to_dict("records")
    assert math.isnan(row["val_accuracy"]) and math.isnan(row["test_accuracy"]) and row["lr"] == 1e30


def test_the_table_and_the_picture_are_made_from_the_rows(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers.main(["table", str(finished.out)])
    text = capsys.readouterr().out
    assert all(method in text for method in METHODS) and "the full network has" in text
    with pytest.raises(SystemExit, match="stored twice"):
        peers.main(["table", str(finished.out), str(finished.out)])
    page = tmp_path / "picture.html"
    peers.main(["picture", str(finished.out), "--to", str(page)])
    assert "pruning-taylor+" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["run"], "name the folder"),
        (["run", "OUT"], "--network is missing"),
        (["run", "OUT", "--network", "resnet20", "--data", "sample"], "--weights is missing"),
        (
            ["run", "OUT", "--network", "resnet20", "--data", "sample", "--weights", "w", "--methods", NARROWER],
            "only for",
        ),
        (["run", "OUT", "--network", "four-conv", "--data", "sample", "--weights", "w"], "--base-images"),
        (
            ["run", "OUT", "--network", "resnet20", "--data", "sample", "--weights", "w", "--budgets", "macs=2M"],
            "percent",
        ),
        (["table", "OUT"], "no training is stored"),
        (["picture", "OUT", "OUT", "--to", "a.html"], "one network"),
        (["picture", "OUT", "--to", "a.png"], "ends in .html"),
    ],
)
def test_mistakes_get_one_line(words: list[str], rule: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rule) as error:
        peers.main([str(tmp_path) if word == "OUT" else word for word in words])
    assert "\n" not in str(error.value)


def test_a_folder_is_of_one_network_and_its_options(finished: Finished) -> None:
    asked = peers._parser().parse_args(["run", str(finished.out), "--miniature"])
    vars(asked).update(SMALL | {"epochs": 7})
    with pytest.raises(SystemExit, match="was made with epochs = 1, not 7"):
        Plan(out=finished.out, asked=asked).pin()


def test_decisions_are_stored_once_for_a_method_and_its_longer_training(finished: Finished) -> None:
    stored = read([finished.out], NETWORKS)
    assert sorted(stored["method"]) == sorted(METHODS * len(SMALL["budgets"]))
