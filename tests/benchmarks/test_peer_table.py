"""The table of `benchmarks/peers.py` against the same computed by hand from made rows."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from peer_table import FULL, ROWS, chosen_rate, compared, picture, read, table_text, write

OURS = [(0.01, seed, val, test) for seed, val, test in ((0, 0.80, 0.75), (1, 0.81, 0.77), (2, 0.82, 0.76))]
PEER = [(0.05, seed, val, test) for seed, val, test in ((0, 0.70, 0.70), (1, 0.72, 0.73), (2, 0.71, 0.74))]


def rows_of(method: str, trainings: list[tuple[float, int, float, float]], **more: Any) -> list[dict[str, Any]]:
    costs = {"network": "net", "budget": "macs=40%", "macs": 2e6, "ort_ms_1": 0.2}
    return [
        {**costs, "method": method, "lr": lr, "seed": seed, "val_accuracy": val, "test_accuracy": test, **more}
        for lr, seed, val, test in trainings
    ]


def test_means_deviations_and_the_standard_error_of_the_difference() -> None:
    table = compared(pd.DataFrame(rows_of("ours", OURS) + rows_of("peer", PEER))).set_index("method")
    ours, peer = [0.75, 0.77, 0.76], [0.70, 0.73, 0.74]
    assert table.loc["ours", "mean"] == pytest.approx(statistics.mean(ours))
    assert table.loc["peer", "std"] == pytest.approx(statistics.stdev(peer))
    assert table.loc["peer", "n"] == 3
    difference = statistics.mean(ours) - statistics.mean(peer)
    error = math.sqrt(statistics.variance(ours) / 3 + statistics.variance(peer) / 3)
    assert table.loc["peer", "difference"] == pytest.approx(difference)
    assert table.loc["peer", "standard_error"] == pytest.approx(error)
    assert table.loc["peer", "ahead"] and not table.loc["ours", "ahead"]
    assert math.isnan(table.loc["ours", "difference"])


@pytest.mark.parametrize(("shift", "ahead"), [(0.001, True), (-0.001, False)])
def test_ahead_is_by_more_than_one_standard_error(shift: float, ahead: bool) -> None:
    spread = [(0.05, seed, 0.7, accuracy) for seed, accuracy in enumerate((0.70, 0.72, 0.74))]
    error = math.sqrt(2 * statistics.variance([0.70, 0.72, 0.74]) / 3)
    ours = [(lr, seed, val, test + error + shift) for lr, seed, val, test in spread]
    table = compared(pd.DataFrame(rows_of("ours", ours) + rows_of("peer", spread))).set_index("method")
    assert table.loc["peer", "ahead"] == ahead


def test_the_rate_is_chosen_on_the_validation_split() -> None:
    better_on_test = [(0.005, seed, val - 0.1, test + 0.1) for _, seed, val, test in PEER]
    rows = pd.DataFrame(rows_of("peer", better_on_test + PEER))
    assert chosen_rate(rows) == 0.05
    rows[["val_accuracy", "test_accuracy"]] = rows[["test_accuracy", "val_accuracy"]].to_numpy()
    assert chosen_rate(rows) == 0.005


def test_rates_with_fewer_seeds_do_not_count() -> None:
    lucky = [(0.02, 0, 0.99, 0.99)]
    assert chosen_rate(pd.DataFrame(rows_of("peer", lucky + PEER))) == 0.05
    assert chosen_rate(pd.DataFrame(rows_of("peer", lucky + PEER[:1]))) == 0.02


def test_a_rate_that_diverged_is_not_chosen() -> None:
    diverged = [(0.1, 0, 0.9, 0.9), (0.1, 1, 0.9, 0.9), (0.1, 2, math.nan, math.nan)]
    assert chosen_rate(pd.DataFrame(rows_of("peer", diverged + PEER))) == 0.05
    table = compared(pd.DataFrame(rows_of("ours", OURS) + rows_of("peer", diverged))).set_index("method")
    assert math.isnan(table.loc["peer", "mean"]) and not table.loc["peer", "ahead"]


def test_budgets_are_compared_apart() -> None:
    other = rows_of("ours", [(lr, seed, val, test - 0.2) for lr, seed, val, test in OURS], budget="macs=60%")
    rows = rows_of("ours", OURS) + rows_of("peer", PEER) + other + rows_of("peer", PEER, budget="macs=60%")
    table = compared(pd.DataFrame(rows)).set_index(["budget", "method"])
    assert table.loc[("macs=40%", "peer"), "ahead"] and not table.loc[("macs=60%", "peer"), "ahead"]


def test_stored_rows_are_read_back_and_shown(tmp_path: Path) -> None:
    rows = rows_of("ours", OURS) + rows_of("peer", PEER) + rows_of(FULL, [(0.0, 0, 0.9, 0.85)], budget="")
    for number, row in enumerate(rows):
        write(tmp_path, ROWS, f"row={number}", row)
    stored = read([tmp_path], ROWS)
    assert len(stored) == len(rows)
    text = table_text(stored)
    assert "76.00 (1.00, 3)" in text and "+3.67" in text and "ahead" in text and "85.00 %" in text
    figure = picture(stored)
    points = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data}
    assert points["full network"] == [(0.2, pytest.approx(85.0))]
    assert points["ours"] == [(0.2, pytest.approx(76.0))] and points["peer"] == [
        (0.2, pytest.approx(72.3333, abs=1e-3))
    ]
