"""How a run went: the decompositions' errors, the training curves, and what the supernet is worth as a predictor."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from gross_ray.report.charts import (
    BLUE,
    COLOURS,
    DASHES,
    GREY,
    MARKS,
    MAX_DETAILS,
    Chart,
    evenly,
    layout,
    padded,
    shown,
)
from gross_ray.report.results import ResultTable, correlation_sentence, kinds_of
from gross_ray.report.searched import Searched
from gross_ray.run.store import RunStore

MAX_CURVES = 12
"""Trainings of one stage that are drawn, at most."""
MAX_WORDED = 12
"""Of more layers the cells are too low for their numbers; the figure is higher then, and each layer has its name."""
ROW = 18
"""Pixels of a layer, where there are more."""


def retrained_chart(store: RunStore, searched: Searched, validations: pd.DataFrame) -> Chart | None:
    """Return accuracy in the supernet against that on its own, or None where no configuration has both."""
    own = validations.groupby("configuration")["val_accuracy"].agg(["mean", "std", "count"])
    supernet = searched.accuracies.set_index("configuration")["supernet_accuracy"]
    both = own.join(supernet, how="inner")
    if both.empty:
        return None
    both["kind"] = both.index.map(kinds_of(store, searched))
    both[["mean", "std", "supernet_accuracy"]] *= 100
    figure = go.Figure(layout=layout("accuracy in the supernet, % (val)", "accuracy on its own, % (val)"))
    ends = padded([*both["supernet_accuracy"], *both["mean"]])
    line = {"color": GREY, "dash": "dot", "width": 1}
    figure.add_trace(go.Scatter(name="equal", x=ends, y=ends, mode="lines", line=line, hoverinfo="skip"))
    for kind, (colour, symbol) in MARKS.items():
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
        [f"the {len(rows)} of {len(both)} that are the most accurate in the supernet"] if len(rows) < len(both) else [],
    )
    return Chart("retrained", "In the supernet and trained on its own", summary, {"": figure}, details=details)


def decomposition_chart(decompositions: pd.DataFrame) -> Chart:
    """Return the relative error of each layer at each group-size, of which there must be one."""
    layers = list(dict.fromkeys(decompositions["layer"]))
    sizes = sorted(set(decompositions["group_size"]))
    errors = decompositions.groupby(["layer", "group_size"])["relative_error"].agg(["mean", "std", "count"])
    few = len(layers) <= MAX_WORDED
    figure = go.Figure(
        go.Heatmap(
            x=[str(size) for size in sizes],
            y=[shown(layer) for layer in layers],
            z=_grid(errors["mean"], layers, sizes),
            customdata=_grid(errors["count"], layers, sizes),
            zmin=0,
            zmax=1,
            colorscale=[[0, "#ffffff"], [1, BLUE]],  # so light that black can be read on all of it
            texttemplate="%{z:.2f}" if few else "",
            textfont={"color": "#000000"},
            hovertemplate="%{y}, group-size %{x}<br>relative error %{z:.4f}, mean of %{customdata}<extra></extra>",
            colorbar={"thickness": 8, "outlinewidth": 0, "title": {"text": "relative error", "side": "right"}},
            xgap=1,
            ygap=1,
        ),
        layout=layout(
            "group-size",
            "layer",
            xaxis={"type": "category", "showgrid": False},
            yaxis={"type": "category", "showgrid": False, "autorange": "reversed", "dtick": 1},
            **({} if few else {"height": 120 + ROW * len(layers)}),
        ),
    )
    layer, size = errors["mean"].idxmax()
    statuses = ", ".join(f"{count} {status}" for status, count in decompositions["status"].value_counts().items())
    summary = (
        f"Relative error of {len(decompositions)} decompositions, {len(layers)} layers at {len(sizes)} group-sizes, "
        f"each cell the mean of its {_number(errors['count'])}: the norm of what a decomposition misses over that "
        f"of the weight. The largest is {errors['mean'].max():.4f}, of {layer} at group-size {size}. The largest "
        f"cancellation is {decompositions['cancellation'].max():.2f}. The solver's ends: {statuses}."
    )
    rows = [
        [str(layer), *(_error(errors.loc[(layer, size)]) if (layer, size) in errors.index else "-" for size in sizes)]
        for layer in layers
    ]
    notes = ["each by itself, with its steps, cancellation and end: `gross show RUN decompositions --rows 0`"]
    heads = ["layer", *(f"g\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{size}" for size in sizes)]
    details = ResultTable("Relative error by group-size: mean (std, n)", heads, rows, notes)
    return Chart("decompositions", "Error of the decompositions", summary, {"": figure}, details=details)


def _grid(values: pd.Series, layers: list[str], sizes: list[int]) -> list[list[float | None]]:
    cells = values.unstack().loc[layers, sizes].to_numpy().tolist()
    return [[None if pd.isna(cell) else round(cell, 6) for cell in row] for row in cells]


def _number(counts: pd.Series) -> str:
    least, most = counts.min(), counts.max()
    return f"{least} repeat{'s' if least > 1 else ''}" if least == most else f"{least} to {most} repeats"


def _error(cell: pd.Series) -> str:
    return f"{cell['mean']:.4f} ({_spread(cell['std'], 4)}, {cell['count']:.0f})"


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


def _spread(deviation: float, digits: int = 2) -> str:
    return "-" if pd.isna(deviation) else f"{deviation:.{digits}f}"
