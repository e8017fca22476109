"""How a run went: the decompositions' errors, the training curves, and what the supernet is worth as a predictor."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from gross_ray.report.charts import (
    COLOURS,
    DASHES,
    GREY,
    MAX_DETAILS,
    ORANGE,
    PURPLE,
    Chart,
    evenly,
    layout,
    padded,
    shown,
)
from gross_ray.report.results import ResultTable, correlation_sentence
from gross_ray.results.store import RunStore

MAX_CURVES = 12
"""Trainings of one stage that are drawn, at most."""


def retrained_chart(store: RunStore, accuracies: pd.DataFrame, validations: pd.DataFrame) -> Chart | None:
    """Return accuracy in the supernet against that on its own, or None where no configuration has both."""
    own = validations.groupby("configuration")["val_accuracy"].agg(["mean", "std", "count"])
    supernet = accuracies.set_index("configuration")["supernet_accuracy"]
    both = own.join(supernet, how="inner").join(validations.groupby("configuration")["kind"].first())
    if both.empty:
        return None
    both[["mean", "std", "supernet_accuracy"]] *= 100
    figure = go.Figure(layout=layout("accuracy in the supernet, % (val)", "accuracy on its own, % (val)"))
    ends = padded([*both["supernet_accuracy"], *both["mean"]])
    line = {"color": GREY, "dash": "dot", "width": 1}
    figure.add_trace(go.Scatter(name="equal", x=ends, y=ends, mode="lines", line=line, hoverinfo="skip"))
    for kind, colour, symbol in (("fixed", ORANGE, "square"), ("selected", PURPLE, "star")):
        rows = both[both["kind"] == kind]
        if len(rows):
            figure.add_trace(
                go.Scatter(
                    name=kind,
                    x=rows["supernet_accuracy"].tolist(),
                    y=rows["mean"].tolist(),
                    error_y={"array": rows["std"].fillna(0).tolist(), "thickness": 1},
                    customdata=[[shown(one), int(n)] for one, n in zip(rows.index, rows["count"], strict=True)],
                    mode="markers",
                    marker={"color": colour, "symbol": symbol, "size": 11},
                    hovertemplate=f"<b>%{{customdata[0]}}</b> ({kind})<br>%{{x:.2f}} % in the supernet"
                    "<br>%{y:.2f} % on its own (n = %{customdata[1]})<extra></extra>",
                )
            )
    sentence = correlation_sentence(store, supernet, validations)
    summary = (
        f"{len(both)} configurations: median accuracy in the supernets, and mean accuracy when trained on their own "
        f"(bars: standard deviation), both on the validation split; on the dotted line they are equal. "
        f"{sentence[0].upper()}{sentence[1:]}."
    )
    rows = [
        [
            str(name),
            row["kind"],
            f"{row['supernet_accuracy']:.2f}",
            f"{row['mean']:.2f} ({_spread(row['std'])}, {row['count']:.0f})",
        ]
        for name, row in both.sort_values("supernet_accuracy", ascending=False).head(MAX_DETAILS).iterrows()
    ]
    details = ResultTable(
        "In the supernet and on its own, % (val)",
        ["configuration", "kind", "in supernet", "on its own: mean (std, n)"],
        rows,
    )
    return Chart("retrained", "In the supernet and trained on its own", summary, {"": figure}, details=details)


def decomposition_chart(decompositions: pd.DataFrame) -> Chart:
    """Return the relative error of each layer at each group-size, of which there must be one."""
    layers = list(dict.fromkeys(decompositions["layer"]))
    sizes = sorted(set(decompositions["group_size"]))
    errors = decompositions.groupby(["layer", "group_size"])["relative_error"].mean().unstack().loc[layers, sizes]
    cells = [[None if pd.isna(cell) else round(cell, 6) for cell in row] for row in errors.to_numpy().tolist()]
    figure = go.Figure(
        go.Heatmap(
            x=[str(size) for size in sizes],
            y=[shown(layer) for layer in layers],
            z=cells,
            zmin=0,
            colorscale="Cividis",
            texttemplate="%{z:.2f}",
            hovertemplate="%{y}, group-size %{x}<br>relative error %{z:.4f}<extra></extra>",
            colorbar={"thickness": 8, "outlinewidth": 0, "title": {"text": "relative error", "side": "right"}},
            xgap=1,
            ygap=1,
        ),
        layout=layout(
            "group-size",
            "layer",
            xaxis={"type": "category", "showgrid": False},
            yaxis={"type": "category", "showgrid": False, "autorange": "reversed"},
        ),
    )
    worst = decompositions.loc[decompositions["relative_error"].idxmax()]
    statuses = ", ".join(f"{count} {status}" for status, count in decompositions["status"].value_counts().items())
    summary = (
        f"Relative error of {len(decompositions)} decompositions, {len(layers)} layers at {len(sizes)} group-sizes: "
        "the norm of what a decomposition misses over that of the weight. The largest is "
        f"{worst['relative_error']:.4f}, of {worst['layer']} at group-size {worst['group_size']}. "
        f"The solver's ends: {statuses}."
    )
    rows = [
        [
            str(row.layer),
            str(row.group_size),
            f"{row.relative_error:.4f}",
            f"{row.cancellation:.2f}",
            str(row.steps),
            str(row.status),
            f"{row.seconds:.1f}",
        ]
        for row in decompositions.head(MAX_DETAILS).itertuples()
    ]
    heads = ["layer", "group-size", "relative error", "cancellation", "steps", "status", "seconds"]
    more = len(decompositions) - len(rows)
    notes = [f"and {more} more: gross show RUN decompositions --rows 0"] if more else []
    details = ResultTable("The decompositions", heads, rows, notes)
    return Chart("decompositions", "Error of the decompositions", summary, {"": figure}, details=details)


def curves_chart(history: pd.DataFrame) -> Chart:
    """Return the curves of each stage's trainings, of which there must be one."""
    versions, rows = {}, []
    for stage, epochs in history.groupby("stage", sort=False):
        versions[str(stage)] = _curves(epochs)
        last = epochs.groupby("unit", sort=False).tail(1)
        accuracy = 100 * last["val_accuracy"].dropna()
        rows.append(
            [
                str(stage),
                str(len(last)),
                str(epochs["epoch"].max()),
                f"{last['train_loss'].mean():.4g}",
                f"{accuracy.mean():.2f} ({_spread(accuracy.std())}, {len(accuracy)})" if len(accuracy) else "-",
            ]
        )
    units = history.groupby("stage", sort=False)["unit"].nunique()
    many = [f"{MAX_CURVES} of the {count} of {stage}" for stage, count in units.items() if count > MAX_CURVES]
    summary = (
        "Training loss and, where it was measured, accuracy on the validation split after each epoch, of "
        f"{units.sum()} trainings in {len(units)} stages."
        + (f" At most {MAX_CURVES} curves are drawn for a stage, evenly chosen: {', '.join(many)}." if many else "")
    )
    heads = ["stage", "trainings", "epochs", "last loss, mean", "last accuracy, %: mean (std, n)"]
    details = ResultTable("Where the trainings ended", heads, rows)
    return Chart("curves", "Training curves", summary, versions, "stage", details, tall=True)


def _curves(epochs: pd.DataFrame) -> go.Figure:
    measured = epochs["val_accuracy"].notna().any()
    figure = go.Figure(
        layout=layout(
            "epoch",
            "training loss",
            yaxis={"domain": [0.0, 0.46 if measured else 1.0]},
            xaxis={"anchor": "y", "rangemode": "tozero"},
            **({"yaxis2": _second_axis()} if measured else {}),
        )
    )
    units = list(dict.fromkeys(epochs["unit"]))
    for place, unit in enumerate(evenly(units, MAX_CURVES)):
        rows, name = epochs[epochs["unit"] == unit], shown(unit)
        colour, dash = COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS)]
        style: dict[str, Any] = {
            "mode": "lines+markers" if len(rows) < 40 else "lines",
            "legendgroup": name,
            "name": name,
        }
        style |= {"line": {"color": colour, "dash": dash, "width": 1.5}, "marker": {"size": 4, "color": colour}}
        text = "%{fullData.name}<br>epoch %{x}<br>%{y:.4g}<extra></extra>"
        x = rows["epoch"].tolist()
        figure.add_trace(go.Scatter(x=x, y=rows["train_loss"].tolist(), hovertemplate=text, **style))
        if measured:
            y = [None if pd.isna(one) else 100 * one for one in rows["val_accuracy"]]
            text = "%{fullData.name}<br>epoch %{x}<br>%{y:.2f} % (val)<extra></extra>"
            figure.add_trace(go.Scatter(x=x, y=y, yaxis="y2", showlegend=False, hovertemplate=text, **style))
    return figure


def _second_axis() -> dict[str, Any]:
    title = {"text": "accuracy, % (val)", "standoff": 8}
    return {"domain": [0.54, 1.0], "anchor": "x", "automargin": True, "zeroline": False, "title": title}


def _spread(deviation: float) -> str:
    return "-" if pd.isna(deviation) else f"{deviation:.2f}"
