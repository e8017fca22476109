"""The figure of all configurations by cost and accuracy, with the Pareto front and a filter by budget."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from gross_ray.errors import MissingStageError
from gross_ray.report.charts import BLUE, COLOURS, GREEN, GREY, MARKS, MAX_DETAILS, Chart, evenly, layout, padded, shown
from gross_ray.report.results import ResultTable, kinds_of, runtime_in_use
from gross_ray.report.scores import score_head, score_text
from gross_ray.report.searched import Searched
from gross_ray.run.limits import full_costs
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import RELATIVE
from gross_ray.search.scores import Score
from gross_ray.search.selection import pareto_front
from gross_ray.seeds import derived_generator

MAX_POINTS = 2000
"""With more configurations, the figure is a density, and a sample of this size is drawn as points."""
MAX_MARKED = 200
"""Maximum number of points for each of the Pareto front, the fixed and the selected configurations."""
BINS = (72, 48)
"""Bins of the density along the cost and the accuracy."""
COST_TITLES = {
    "macs": ("M MACs an image", 1e6),
    "macs_paper": ("M MACs an image, counted the paper's way", 1e6),
    "parameters": ("thousand parameters", 1e3),
    "latency_ms": ("ms a batch (predicted)", 1.0),
}
"""Title of each cost's axis, and the size of its unit in the unit of the tables."""
_FRONT = "Pareto front"
_LINE = 32
"""Characters in a line of a hover label, so that it fits the screen of a phone."""
MAX_LINES = 3
"""Lines of group-sizes in a hover label: plotly cuts or omits a label that is too high for its point's position."""


def space_chart(store: RunStore, searched: Searched) -> Chart:
    """Return the figure of all configurations, with a version for each known cost; `searched` must not be empty.

    `budgets` of the chart has the Pareto front over all configurations, for each version. The best configuration within
    any budget follows from it exactly, even if only a sample is drawn.
    """
    accuracies = sample = searched.accuracies
    kinds = accuracies["configuration"].map(kinds_of(store, searched))
    marked = {kind: accuracies[kinds == kind] for kind in MARKS}
    if len(accuracies) > MAX_POINTS:
        generator = derived_generator(store.experiment.seed, "report", "sample")
        sample = accuracies.iloc[
            torch.randperm(len(accuracies), generator=generator)[:MAX_POINTS].sort().values.numpy()
        ]
    fronts = {cost: pareto_front(accuracies, cost=cost) for cost in searched.costs}
    versions, budgets = {}, {}
    for cost, front in fronts.items():
        title, unit = COST_TITLES[cost]
        versions[title] = _figure(
            searched, cost, front, sample, marked, _full_network(store, cost), runtime_in_use(store)
        )
        budgets[title] = {
            "scale": unit,
            "unit": title,
            "least": float(accuracies[cost].min()) / unit,
            "most": float(accuracies[cost].max()) / unit,
            "layers": list(searched.layers),
            "configurations": [shown(name) for name in front["configuration"]],
            "costs": front[cost].tolist(),
            "scores": (searched.score.scale * front["score"]).tolist(),
            "digits": searched.score.digits,
            "what": searched.score.unit,
        }
    return Chart(
        "space",
        "Configurations by cost and accuracy in the supernet",
        _summary(store, searched, fronts["macs"], len(sample), marked),
        versions,
        "cost",
        _front_table(fronts["macs"], searched.score),
        budgets,
        tall=True,
    )


def _full_network(store: RunStore, cost: str) -> tuple[float, float] | None:
    """Return the full network's cost and mean validation accuracy; None if one of them is not known."""
    networks = store.read_table("networks", ["val_accuracy"])
    if networks.empty or cost not in RELATIVE:
        return None
    try:
        return full_costs(store, [cost])[cost], float(networks["val_accuracy"].mean())
    except MissingStageError:
        return None


def _figure(
    searched: Searched,
    cost: str,
    front: pd.DataFrame,
    sample: pd.DataFrame,
    marked: dict[str, pd.DataFrame],
    full: tuple[float, float] | None,
    runtime: str,
) -> go.Figure:
    accuracies = searched.accuracies
    title, unit = COST_TITLES[cost]
    score = searched.score
    costs, scores = accuracies[cost] / unit, score.scale * accuracies["score"]
    dense = len(sample) < len(accuracies)
    x, y = [costs.min(), costs.max()], [scores.min(), scores.max()]
    if full is not None and score.of_accuracy:
        x, y = [*x, full[0] / unit], [*y, 100 * full[1]]
    axis = f"ms for a {runtime} (predicted)" if cost == "latency_ms" else title
    ranges = {"xaxis": {"range": padded(x)}, "yaxis": {"range": padded(y)}}
    figure = go.Figure(layout=layout(axis, score.title, **ranges))
    if dense:
        figure.add_trace(_density(costs, scores))

    kinds: dict[str, list[str]] = {}
    for kind, rows in [*marked.items(), (_FRONT, front)]:
        for name in rows["configuration"]:
            kinds.setdefault(name, []).append(kind)

    def add(name: str, rows: pd.DataFrame, **style: Any) -> None:
        figure.add_trace(
            go.Scatter(
                name=name,
                x=(rows[cost] / unit).tolist(),
                y=(score.scale * rows["score"]).tolist(),
                customdata=[_about(row, searched, kinds) for row in rows.to_dict("records")],
                hovertemplate="<b>%{customdata[0]}</b>%{customdata[1]}"
                f"<br>%{{y:.{score.digits}f}}{score.unit} in the supernet"
                "<br>%{customdata[2]}<br>%{customdata[3]}<extra></extra>",
                **style,
            )
        )

    points = f"{len(sample):,} of {len(accuracies):,} configurations" if dense else "configurations"
    faint = {"color": GREY, "size": 4 if dense else 7, "opacity": 0.6 if dense else 0.8}
    add(points, sample, mode="markers", marker=faint)
    figure.add_trace(_stairs(front[cost] / unit, score.scale * front["score"]))
    rows = front.iloc[evenly(range(len(front)), MAX_MARKED)]
    add(_FRONT, rows, mode="markers", marker={"color": BLUE, "size": 7}, legendgroup=_FRONT)
    for kind, (colour, symbol) in MARKS.items():
        rows = marked[kind].iloc[evenly(range(len(marked[kind])), MAX_MARKED)]
        if len(rows):
            size = 13 if symbol == "star" else 11
            add(kind, rows, mode="markers", marker={"color": colour, "size": size, "symbol": symbol})
    if full is not None and score.of_accuracy:
        figure.add_trace(_mark_of_full((x[-1], y[-1]), title))
    best = {"color": GREEN, "size": 18, "symbol": "circle-open", "line": {"width": 3}}
    # For the legend only: the page's script draws the ring at the best configuration.
    figure.add_trace(go.Scatter(name="best within the budget", x=[None], y=[None], mode="markers", marker=best))
    return figure


def _mark_of_full(place: tuple[float, float], unit: str) -> go.Scatter:
    mark = {"color": COLOURS[7], "size": 12, "symbol": "x"}
    hover = "<b>full network</b><br>%{y:.2f} % (val)<br>%{x:.4g} " + unit + "<extra></extra>"
    return go.Scatter(name="full network", x=[place[0]], y=[place[1]], mode="markers", marker=mark, hovertemplate=hover)


def _stairs(costs: pd.Series, scores: pd.Series) -> go.Scatter:
    """Return the line through all steps of the front, without a legend entry: its marks have one."""
    line = {"color": BLUE, "shape": "hv", "width": 2}
    x, y = costs.tolist(), scores.tolist()
    group = {"name": _FRONT, "legendgroup": _FRONT, "showlegend": False}
    return go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", **group)


def _density(costs: pd.Series, scores: pd.Series) -> go.Heatmap:
    """Return the number of configurations in each cell as a heatmap on a logarithmic scale; empty cells stay blank."""
    counts, x, y = np.histogram2d(costs, scores, bins=BINS)
    log = np.log10(np.where(counts > 0, counts, np.nan)).T
    tens = range(int(np.nanmax(log)) + 1)
    return go.Heatmap(
        name="density",
        x=((x[1:] + x[:-1]) / 2).tolist(),
        y=((y[1:] + y[:-1]) / 2).tolist(),
        z=[[None if np.isnan(cell) else round(cell, 3) for cell in row] for row in log.tolist()],
        zmin=0,
        colorscale=[[0, "rgba(29,143,156,0.1)"], [1, "rgba(29,143,156,0.9)"]],
        colorbar={
            "title": {"text": "configurations", "side": "right"},
            "tickvals": list(tens),
            "ticktext": [f"{10**ten:,}" for ten in tens],
            "thickness": 8,
            "outlinewidth": 0,
            "len": 0.6,
        },
        hoverinfo="skip",
        showlegend=False,
    )


def _about(row: dict[Any, Any], searched: Searched, kinds: dict[str, list[str]]) -> list[str]:
    """Return the texts of a configuration's hover label, shortened to fit: name, kind, costs and group-sizes.

    The last item is the whole name, from which the line beneath the figure shows all group-sizes.
    """
    name = row["configuration"]
    costs = [f"{row['macs'] / 1e6:.2f} M\N{NO-BREAK SPACE}MACs", f"{row['parameters']:,}\N{NO-BREAK SPACE}parameters"]
    if "latency_ms" in searched.costs:
        costs.append(f"{row['latency_ms']:.3f}\N{NO-BREAK SPACE}ms")
    kind = f" ({', '.join(kinds[name])})" if name in kinds else ""
    sizes = [f"{layer}:\N{NO-BREAK SPACE}{size}" for layer, size in zip(searched.layers, name.split("-"), strict=True)]
    cost, layers = ", ".join(costs), ", ".join(sizes)
    short = name if len(name) <= _LINE else name[: name.rfind("-", 0, _LINE) + 1] + "\N{HORIZONTAL ELLIPSIS}"
    return [shown(short), kind, "<br>".join(_lines(cost)), "<br>".join(_lines(layers, MAX_LINES)), name]


def _lines(text: str, most: int | None = None) -> list[str]:
    """Return text as lines of a hover label, at most `most`; an ellipsis marks that text was cut."""
    lines = textwrap.wrap(
        text,
        _LINE,
        break_long_words=False,
        break_on_hyphens=False,
        max_lines=most,
        placeholder=" \N{HORIZONTAL ELLIPSIS}",
    )
    return [shown(line) for line in lines]


def _summary(
    store: RunStore, searched: Searched, front: pd.DataFrame, num_points: int, marked: dict[str, pd.DataFrame]
) -> str:
    num, whole, strategy = len(searched.accuracies), searched.space_size(store), store.experiment.search.strategy
    least, best = front.iloc[0], front.iloc[-1]
    chosen = "" if strategy == "exhaustive" else f" that the strategy `{strategy}` chose"
    text = (
        f"{num:,}{f' of {whole:,}' if num < whole else ''} configurations{chosen}, each with its "
        f"{searched.score.over(searched.num_supernets)} on the validation split. "
        f"{len(front):,} of them are {'their' if num < whole else 'the'} Pareto front of MACs: from "
        f"{least['configuration']} ({_words(least, searched)}) to {best['configuration']} ({_words(best, searched)})."
    )
    if num_points < num:
        text += (
            f" Above {MAX_POINTS:,} configurations the figure is a density: the stronger a cell's colour, the more "
            f"configurations; {num_points:,} points, drawn at random, have labels. The front and the best within a "
            "budget are those of all configurations."
        )
    many = {"steps of the front": len(front)} | {kind: len(rows) for kind, rows in marked.items()}
    cut = [f"{MAX_MARKED} of {count:,} {what}" for what, count in many.items() if count > MAX_MARKED]
    return text + (f" Only evenly spaced ones are marked: {', '.join(cut)}." if cut else "")


def _words(row: pd.Series, searched: Searched) -> str:
    return f"{row['macs'] / 1e6:.2f} M MACs, {searched.score.text(row['score'])}{searched.score.unit}"


def _front_table(front: pd.DataFrame, score: Score) -> ResultTable:
    steps = evenly(range(len(front)), MAX_DETAILS)
    rows = [
        [str(row["configuration"]), f"{row['macs'] / 1e6:.2f}", f"{row['parameters']:,}", score_text(score, row)]
        for _, row in front.iloc[steps].iterrows()
    ]
    notes = [] if len(steps) == len(front) else [f"{len(steps)} of {len(front)} steps, evenly spaced"]
    heads = ["configuration", "M MACs", "parameters", score_head(front)]
    return ResultTable("The Pareto front of MACs and accuracy", heads, rows, notes)
