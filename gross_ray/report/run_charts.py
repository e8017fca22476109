"""Figures of a run's quality: the decompositions' errors, training curves, and the supernet as a predictor."""

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
from gross_ray.report.results import ResultTable, correlation_sentence, kinds_of, mean_text
from gross_ray.report.searched import Searched
from gross_ray.run.store import RunStore

MAX_CURVES = 12
"""Maximum number of trainings drawn for one stage."""
MAX_WORDED = 12
"""Maximum number of layers whose cells show their numbers; with more layers, the figure is higher instead."""
ROW = 18
"""Height of a layer in pixels, if there are more than MAX_WORDED layers."""


def retrained_chart(store: RunStore, searched: Searched, validations: pd.DataFrame) -> Chart | None:
    """Return the figure of accuracy in the supernet against accuracy on its own; None if no configuration has both."""
    own = validations.groupby("configuration")["val_accuracy"].agg(["mean", "std", "count"])
    score = searched.score
    supernet = searched.accuracies.set_index("configuration")["score"]
    both = own.join(supernet, how="inner")
    if both.empty:
        return None
    both["kind"] = both.index.map(kinds_of(store, searched))
    both[["mean", "std"]] *= 100
    both["score"] *= score.scale
    figure = go.Figure(layout=layout(score.title, "accuracy on its own, % (val)"))
    if score.of_accuracy:
        ends = padded([*both["score"], *both["mean"]])
        line = {"color": GREY, "dash": "dot", "width": 1}
        figure.add_trace(go.Scatter(name="equal", x=ends, y=ends, mode="lines", line=line, hoverinfo="skip"))
    for kind, (colour, symbol) in MARKS.items():
        rows = both[both["kind"] == kind]
        if len(rows):
            figure.add_trace(
                go.Scatter(
                    name=kind,
                    x=rows["score"].tolist(),
                    y=rows["mean"].tolist(),
                    error_y={"array": rows["std"].fillna(0).tolist(), "thickness": 1},
                    customdata=[[shown(name), int(n)] for name, n in zip(rows.index, rows["count"], strict=True)],
                    mode="markers",
                    marker={"color": colour, "symbol": symbol, "size": 11},
                    hovertemplate=f"<b>%{{customdata[0]}}</b> ({kind})"
                    f"<br>%{{x:.{score.digits}f}}{score.unit} in the supernet"
                    "<br>%{y:.2f} % on its own (n = %{customdata[1]})<extra></extra>",
                )
            )
    sentence = correlation_sentence(store, supernet, validations)
    equal = "; on the dotted line they are equal" if score.of_accuracy else ""
    summary = (
        f"{len(both)} configurations: {score.over(searched.num_supernets)}, and mean accuracy when trained on their "
        f"own (bars: standard deviation), both on the validation split{equal}. "
        f"{sentence[0].upper()}{sentence[1:]}."
    )
    rows = [
        [
            str(name),
            row["kind"],
            f"{row['score']:.{score.digits}f}",
            mean_text(row["mean"], row["std"], row["count"]),
        ]
        for name, row in both.sort_values("score", ascending=False).head(MAX_DETAILS).iterrows()
    ]
    details = ResultTable(
        "In the supernet and on its own (val)",
        ["configuration", "kind", "in supernet", "on its own: mean (std, n)"],
        rows,
        [f"the {len(rows)} of {len(both)} that are most accurate in the supernet"] if len(rows) < len(both) else [],
    )
    return Chart("retrained", "In the supernet and trained on its own", summary, {"": figure}, details=details)


def decomposition_chart(decompositions: pd.DataFrame) -> Chart:
    """Return the figure of relative error by layer and group-size; `decompositions` must not be empty."""
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
            colorscale=[[0, "#ffffff"], [1, BLUE]],  # light enough to read black text everywhere
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
        f"each cell the mean of its {_number(errors['count'])}: the norm of the residual over the norm of the weight. "
        f"The largest is {errors['mean'].max():.4f}, of {layer} at group-size {size}. The largest "
        f"cancellation is {decompositions['cancellation'].max():.2f}. Status of the solver: {statuses}."
    )
    cells = {key: mean_text(mean, std, count, digits=4) for key, mean, std, count in errors.itertuples(name=None)}
    rows = [[str(layer), *(cells.get((layer, size), "-") for size in sizes)] for layer in layers]
    notes = ["each decomposition with steps, cancellation and status: `gross show RUN decompositions --rows 0`"]
    heads = ["layer", *(f"g\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{size}" for size in sizes)]
    details = ResultTable("Relative error by group-size: mean (std, n)", heads, rows, notes)
    return Chart("decompositions", "Error of the decompositions", summary, {"": figure}, details=details)


def _grid(values: pd.Series, layers: list[str], sizes: list[int]) -> list[list[float | None]]:
    cells = values.unstack().loc[layers, sizes].to_numpy().tolist()
    return [[None if pd.isna(cell) else round(cell, 6) for cell in row] for row in cells]


def _number(counts: pd.Series) -> str:
    least, most = counts.min(), counts.max()
    return f"{least} repeat{'s' if least > 1 else ''}" if least == most else f"{least} to {most} repeats"


def rates_chart(tests: pd.DataFrame) -> Chart:
    """Return the figure of the loss by learning rate in each range test; `tests` must not be empty."""
    figure = go.Figure(
        layout=layout("learning rate", "training loss", xaxis={"type": "log"}, yaxis={"type": "log"}, showlegend=False)
    )
    rows = []
    for number, (schedule, tried) in enumerate(tests.groupby("schedule", sort=False)):
        colour = COLOURS[number % len(COLOURS)]
        finite = tried.dropna(subset="train_loss")
        chosen = finite[finite["chosen"]]
        style: dict[str, Any] = {"name": shown(schedule), "legendgroup": shown(schedule)}
        text = "%{fullData.name}<br>learning rate %{x:g}<br>loss %{y:.4g}<extra></extra>"
        line = {"color": colour, "width": 1.5}
        x, y = finite["lr"].tolist(), finite["train_loss"].tolist()
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines+markers", line=line, hovertemplate=text, **style))
        mark = {"color": colour, "size": 13, "symbol": "star"}
        x, y = chosen["lr"].tolist(), chosen["train_loss"].tolist()
        figure.add_trace(
            go.Scatter(x=x, y=y, mode="markers", marker=mark, hovertemplate=text, **style | {"showlegend": False})
        )
        diverged = ", ".join(f"{rate:g}" for rate in tried.loc[tried["train_loss"].isna(), "lr"])
        rows.append([str(schedule), f"{x[0]:g}", f"{y[0]:.4g}", diverged or "-"])
    found = ", ".join(f"{schedule} {rate}" for schedule, rate, *_ in rows)
    summary = (
        "Mean training loss after a few steps at each learning rate, always from the same weights and with the same "
        f"batches; the rate with a star is used: {found}."
    )
    details = ResultTable("Learning rates found", ["schedule", "learning rate", "its loss", "diverged at"], rows)
    return Chart("rates", "Range tests of the learning rates", summary, {"": figure}, details=details)


def curves_chart(history: pd.DataFrame) -> Chart:
    """Return the training curves of each stage; `history` must not be empty."""
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
                mean_text(accuracy.mean(), accuracy.std(), len(accuracy)) if len(accuracy) else "-",
            ]
        )
    units = history.groupby("stage", sort=False)["unit"].nunique()
    many = [f"{MAX_CURVES} of the {count} of {stage}" for stage, count in units.items() if count > MAX_CURVES]
    summary = (
        "Training loss and, if measured, accuracy on the validation split after each epoch, of "
        f"{units.sum()} trainings in {len(units)} stages."
        + (f" At most {MAX_CURVES} evenly spaced curves are drawn for a stage: {', '.join(many)}." if many else "")
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
    for number, unit in enumerate(evenly(units, MAX_CURVES)):
        rows, name = epochs[epochs["unit"] == unit], shown(unit)
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS)]
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
            y = [None if pd.isna(accuracy) else 100 * accuracy for accuracy in rows["val_accuracy"]]
            text = "%{fullData.name}<br>epoch %{x}<br>%{y:.2f} % (val)<extra></extra>"
            figure.add_trace(go.Scatter(x=x, y=y, yaxis="y2", showlegend=False, hovertemplate=text, **style))
    return figure


def _second_axis() -> dict[str, Any]:
    title = {"text": "accuracy, % (val)", "standoff": 8}
    return {"domain": [0.54, 1.0], "anchor": "x", "automargin": True, "zeroline": False, "title": title}
