"""The table and the picture of `benchmarks/peers.py`, from its stored rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.report.charts import COLOURS, GREY, layout
from gross_ray.report.results import ResultTable
from gross_ray.report.terminal import as_text

FULL, OURS = "full", "ours"
"""Methods of the rows: the network before it is cut, and gross_ray's."""
MORE = "+"
"""Suffix of a method that trains on as many more images as the decision of ours needed."""
ROWS, NETWORKS = "peers", "peer_networks"
"""The tables: one row for each training, and one for each network that was cut."""


def read(folders: Sequence[Path], table: str) -> pd.DataFrame:
    """Return the rows of a table in several folders; empty if none is stored."""
    files = sorted(file for folder in folders for file in (folder / "tables" / table).glob("*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True) if files else pd.DataFrame()


def write(folder: Path, table: str, unit: str, row: dict[str, object]) -> None:
    """Store one row as a file of its own, completely or not at all."""
    path = folder / "tables" / table / f"{unit}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_not_at_all(path) as partial:
        pd.DataFrame([row]).to_parquet(partial, index=False)


def chosen_rate(rows: pd.DataFrame) -> float:
    """Return the learning rate of the highest mean validation accuracy, of those with the most seeds.

    `rows` are trainings of one network. A rate with a training that diverged is chosen only if all have one.
    """
    by_rate = rows.groupby("lr")["val_accuracy"].agg(n="size", mean=lambda values: values.mean(skipna=False))
    complete = by_rate[by_rate["n"] == by_rate["n"].max()]
    return float(complete["mean"].fillna(-1.0).idxmax())


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each network, budget and method: its best rate, and how far ours is ahead of it.

    Columns: network, budget, method, lr, n, mean and std of the test accuracy, macs, ort_ms_1, difference (the mean of
    ours minus this mean), its standard_error, and ahead (whether the difference is larger than that).
    """
    found = []
    for (network, budget, method), group in rows[rows["method"] != FULL].groupby(["network", "budget", "method"]):
        rate = chosen_rate(group)
        best = group[group["lr"] == rate]
        accuracies = best["test_accuracy"]
        found.append(
            {
                "network": network,
                "budget": budget,
                "method": method,
                "lr": rate,
                "n": len(best),
                "mean": accuracies.mean(skipna=False),
                "std": accuracies.std(skipna=False),
                "macs": best["macs"].iloc[0],
                "ort_ms_1": best["ort_ms_1"].iloc[0],
            }
        )
    table = pd.DataFrame(found, columns=["network", "budget", "method", "lr", "n", "mean", "std", "macs", "ort_ms_1"])
    ours = table[table["method"] == OURS][["network", "budget", "mean", "std", "n"]]
    both = table.merge(ours, on=["network", "budget"], how="left", suffixes=("", "_of_ours"))
    table["difference"] = (both["mean_of_ours"] - both["mean"]).where(both["method"] != OURS)
    variance = both["std_of_ours"] ** 2 / both["n_of_ours"] + both["std"] ** 2 / both["n"]
    table["standard_error"] = variance.pow(0.5).where(both["method"] != OURS)
    table["ahead"] = table["difference"] > table["standard_error"]
    return table


def table_text(rows: pd.DataFrame) -> str:
    """Return the comparison as a table for the terminal, and the accuracy of the full network."""
    lines = [
        [
            str(one["network"]),
            str(one["budget"]),
            str(one["method"]),
            f"{_percent(one['mean'])} ({_percent(one['std'])}, {one['n']})",
            f"{one['lr']:g}",
            f"{one['macs'] / 1e6:.2f}",
            f"{one['ort_ms_1']:.3g}",
            *_verdict(one),
        ]
        for one in compared(rows)
        .sort_values(["network", "budget", "mean"], ascending=[True, True, False])
        .to_dict("records")
    ]
    heads = ["network", "budget", "method", "accuracy, % (test): mean (std, n)", "rate", "M MACs", "ms"]
    heads += ["ours ahead by", "standard error", ""]
    full = rows[rows["method"] == FULL]
    notes = [
        f"{one['network']}: the full network has {_percent(one['test_accuracy'])} %, {one['macs'] / 1e6:.2f} M MACs "
        f"and {one['ort_ms_1']:.3g} ms"
        for one in full.to_dict("records")
    ]
    notes.append("the rate of a method is that of its highest mean accuracy on the validation split")
    notes.append("+: trained with as many more images as the supernet and the candidates of ours")
    return as_text(ResultTable("Ours and its peers within the same budgets", heads, lines, notes))


def _percent(accuracy: float) -> str:
    return "-" if math.isnan(accuracy) else f"{100 * accuracy:.2f}"


def _verdict(one: dict[str, float]) -> list[str]:
    if math.isnan(one["difference"]):
        return ["-", "-", ""]
    known = not math.isnan(one["standard_error"])
    verdict = "ahead" if one["ahead"] else "behind" if one["difference"] < -one["standard_error"] else "neither"
    return [f"{100 * one['difference']:+.2f}", _percent(one["standard_error"]), verdict if known else ""]


def picture(rows: pd.DataFrame) -> go.Figure:
    """Return test accuracy over milliseconds for one image: the full network, ours and each peer, with one std."""
    table = compared(rows)
    (network,) = rows["network"].unique()
    figure = go.Figure(layout=layout("ms for one image, ONNX Runtime, 1 thread", f"accuracy of {network}, % (test)"))
    figure.update_layout(showlegend=True)
    methods = list(dict.fromkeys(method.removesuffix(MORE) for method in table["method"]))
    for method, group in table.groupby("method"):
        points, colour = group.sort_values("ort_ms_1"), methods.index(str(method).removesuffix(MORE))
        figure.add_scatter(
            x=points["ort_ms_1"].tolist(),
            y=(100 * points["mean"]).tolist(),
            error_y={"array": (100 * points["std"]).tolist(), "visible": True},
            text=points["budget"].tolist(),
            name=method,
            mode="lines+markers",
            line={"color": COLOURS[colour], "dash": "dot" if str(method).endswith(MORE) else "solid"},
        )
    full = rows[rows["method"] == FULL]
    figure.add_scatter(
        x=full["ort_ms_1"].tolist(),
        y=(100 * full["test_accuracy"]).tolist(),
        name="full network",
        mode="markers",
        marker={"color": GREY, "symbol": "star", "size": 11},
    )
    return figure
