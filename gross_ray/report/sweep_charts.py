"""Figure 1 of the paper: how the sampling temperature alpha shapes the accuracies of a supernet (section 5.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from gross_ray.report.charts import COLOURS, DASHES, SYMBOLS, Chart, layout, shown
from gross_ray.report.results import ResultTable, millions, temperature
from gross_ray.run.searched import evaluated_parts
from gross_ray.run.store import RunStore
from gross_ray.space import Configuration

MAX_PROFILE_POINTS = 4000
"""With more points, the right side of Figure 1 shows means over brackets of MACs."""
BRACKETS = 40
"""Number of these brackets."""
_KEY = ["alpha", "scaling", "seed"]


def sweep_charts(store: RunStore, sweep: pd.DataFrame) -> list[Chart]:
    """Return the left and the right side of Figure 1; `sweep`, rows of `alpha_sweep`, must not be empty."""
    temperatures = sorted({(row.alpha, row.scaling) for row in sweep.itertuples()})
    alphas = sorted({alpha for alpha, _ in temperatures})
    scalings = sorted({scaling for _, scaling in temperatures})
    styles = {
        (alpha, scaling): {
            "line": {"color": COLOURS[alphas.index(alpha) % len(COLOURS)], "dash": DASHES[scalings.index(scaling)]},
            "marker": {
                "color": COLOURS[alphas.index(alpha) % len(COLOURS)],
                "symbol": SYMBOLS[scalings.index(scaling)],
            },
        }
        for alpha, scaling in temperatures
    }
    charts = [_left(sweep, styles)]
    profiles = _profiles(store, sweep)
    if len(profiles):
        charts.append(_right(profiles, styles))
    return charts


def _left(sweep: pd.DataFrame, styles: dict[tuple[float, str], dict[str, Any]]) -> Chart:
    """Draw the accuracy in the supernet minus that of the fixed configuration on its own, mean over the seeds."""
    configurations = sorted(set(sweep["configuration"]), key=Configuration.parse)
    figure = go.Figure(
        layout=layout(
            "configuration",
            "supernet less fixed, points (val)",
            xaxis={
                "type": "category",
                "categoryorder": "array",
                "categoryarray": [shown(configuration) for configuration in configurations],
            },
            yaxis={"zeroline": True},
        )
    )
    spreads = []
    for (alpha, scaling), style in styles.items():
        rows = sweep[(sweep["alpha"] == alpha) & (sweep["scaling"] == scaling)]
        by_configuration = 100 * rows.groupby("configuration")["difference"].agg(["mean", "std"])
        compared = [configuration for configuration in configurations if configuration in by_configuration.index]
        found, seeds = by_configuration.loc[compared], rows["seed"].nunique()
        name = f"alpha {temperature(alpha, scaling)}"
        figure.add_trace(
            go.Scatter(
                name=shown(name),
                x=[shown(configuration) for configuration in compared],
                y=found["mean"].tolist(),
                error_y={"array": found["std"].fillna(0).tolist(), "thickness": 1, "visible": seeds > 1},
                mode="lines+markers",
                hovertemplate=f"<b>{shown(name)}</b><br>%{{x}}<br>%{{y:+.2f}} points, mean of {seeds}<extra></extra>",
                **(style | {"marker": style["marker"] | {"size": 8}}),
            )
        )
        spreads.append((float(found["mean"].max() - found["mean"].min()), name))
    flattest = min(spreads)
    summary = (
        f"Accuracy in the supernet minus that of the same configuration trained on its own, at "
        f"{len(configurations)} fixed configurations for {len(styles)} sampling temperatures; mean over the seeds, "
        f"bars: standard deviation. The flattest profile is that of {flattest[1]}: its means lie within "
        f"{flattest[0]:.2f} points of each other."
    )
    return Chart(
        "figure-1-left", "Figure 1, left: the supernet less the fixed configuration on its own", summary, {"": figure}
    )


def _profiles(store: RunStore, sweep: pd.DataFrame) -> pd.DataFrame:
    """Return the mean accuracy of every configuration at each temperature, over the seeds that the sweep compared.

    With more than MAX_PROFILE_POINTS rows, the names of the configurations are dropped.
    """
    compared = sweep[_KEY].drop_duplicates()
    parts: list[pd.DataFrame] = []
    rows = 0
    for part in evaluated_parts(store, [*_KEY, "configuration", "macs", "val_accuracy"]):
        ours = part.merge(compared, on=_KEY)
        if len(ours):
            grouped = ours.groupby(["alpha", "scaling", "configuration"], sort=False)
            parts.append(grouped.agg(macs=("macs", "first"), accuracy=("val_accuracy", "mean")).reset_index())
            rows += len(parts[-1])
            if rows > MAX_PROFILE_POINTS:
                parts = [part.drop(columns="configuration", errors="ignore") for part in parts]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["alpha", "scaling"])


def _right(profiles: pd.DataFrame, styles: dict[tuple[float, str], dict[str, Any]]) -> Chart:
    """Draw the accuracies of all configurations in the supernets of each temperature against their MACs."""
    named = "configuration" in profiles
    figure = go.Figure(layout=layout("M MACs an image", "accuracy in the supernet, % (val)"))
    limits = np.linspace(profiles["macs"].min(), profiles["macs"].max(), BRACKETS + 1)
    rows = []
    for (alpha, scaling), style in styles.items():
        ours = profiles[(profiles["alpha"] == alpha) & (profiles["scaling"] == scaling)].sort_values("macs")
        if ours.empty:
            continue
        name = f"alpha {temperature(alpha, scaling)}"
        third = np.array_split(100 * ours["accuracy"].to_numpy(), 3)
        rows.append([name, str(len(ours)), *(f"{part.mean():.2f}" if len(part) else "-" for part in third)])
        if named:
            look = {"mode": "markers", "marker": style["marker"] | {"size": 5, "opacity": 0.75}}
            text = [shown(configuration) for configuration in ours["configuration"]]
        else:
            bracket = np.clip(np.searchsorted(limits, ours["macs"], side="right") - 1, 0, BRACKETS - 1)
            counts = ours.groupby(bracket).size()
            ours = ours.groupby(bracket)[["macs", "accuracy"]].mean()
            look, text = {"mode": "lines", "line": style["line"]}, [f"{count:,} configurations" for count in counts]
        figure.add_trace(
            go.Scatter(
                name=shown(name),
                x=(ours["macs"] / 1e6).tolist(),
                y=(100 * ours["accuracy"]).tolist(),
                text=text,
                hovertemplate=f"<b>%{{text}}</b><br>{shown(name)}<br>%{{x:.2f}} M MACs<br>%{{y:.2f}} %<extra></extra>",
                **look,
            )
        )
    what = (
        "each point is its mean accuracy over the seeds."
        if named
        else f"too many for points: the line shows the mean of each of {BRACKETS} brackets of MACs."
    )
    low, high = (millions(limit) for limit in (limits[0], limits[-1]))
    summary = (
        f"Accuracy in the supernet of all configurations, from {low} to {high} M MACs, for each sampling temperature; "
        f"{what} The table has the means of the cheapest, middle and most expensive third."
    )
    heads = ["temperature", "configurations", "cheapest third", "middle third", "most expensive third"]
    details = ResultTable("Mean accuracy in the supernet by thirds of MACs, % (val)", heads, rows)
    return Chart(
        "figure-1-right",
        "Figure 1, right: all configurations in the supernets of each temperature",
        summary,
        {"": figure},
        details=details,
    )
