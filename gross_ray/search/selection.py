"""Which configuration to take: the most accurate one under a budget (section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gross_ray.errors import InvalidValueError
from gross_ray.space import Configuration


def supernet_accuracies(configurations: pd.DataFrame) -> pd.DataFrame:
    """Return one row a configuration: its costs and `supernet_accuracy`, the median over the supernets.

    `configurations` is that table; the accuracies are those of the validation split.
    """
    grouped = configurations.groupby("configuration", sort=False)
    return grouped.agg(
        macs=("macs", "first"),
        macs_paper=("macs_paper", "first"),
        parameters=("parameters", "first"),
        supernet_accuracy=("val_accuracy", "median"),
    ).reset_index()


def select(accuracies: pd.DataFrame, budget: str, top: int) -> pd.DataFrame:
    """Return the `top` most accurate configurations that cost no more MACs than the fixed configuration `budget`.

    `accuracies` is what `supernet_accuracies` returns. The fixed configuration itself is left out; ties go to the
    cheaper one, then to the smaller group-sizes. Columns: those of the `selections` table. Raises InvalidValueError
    if `budget` was not evaluated or nothing else fits under it.
    """
    fixed = accuracies.loc[accuracies["configuration"] == budget]
    if fixed.empty:
        raise InvalidValueError(
            f"budget {budget}: this configuration was not evaluated; choose group-sizes of the space"
        )
    limit = int(fixed["macs"].iloc[0])
    fitting = accuracies.loc[(accuracies["macs"] <= limit) & (accuracies["configuration"] != budget)]
    if fitting.empty:
        smallest = accuracies.loc[accuracies["macs"].idxmin()]
        raise InvalidValueError(
            f"budget {budget} ({limit / 1e6:.2f} M MACs): nothing else fits under it; "
            f"the smallest is {smallest['macs'] / 1e6:.2f} M MACs at {smallest['configuration']}"
        )
    ranked = fitting.assign(parsed=[Configuration.parse(text) for text in fitting["configuration"]]).sort_values(
        ["supernet_accuracy", "macs", "parsed"], ascending=[False, True, True]
    )
    best = ranked.head(top)
    return pd.DataFrame(
        {
            "budget": budget,
            "budget_macs": limit,
            "rank": range(1, len(best) + 1),
            "configuration": best["configuration"].to_numpy(),
            "macs": best["macs"].to_numpy(),
            "supernet_accuracy": best["supernet_accuracy"].to_numpy(),
        }
    )


def pareto_front(accuracies: pd.DataFrame, *, cost: str = "macs", value: str = "supernet_accuracy") -> pd.DataFrame:
    """Return the rows that no other row beats in both cost and value, in ascending order of cost."""
    ordered = accuracies.sort_values([cost, value], ascending=[True, False])
    best_before = ordered[value].cummax().shift(fill_value=float("-inf"))
    return ordered.loc[ordered[value] > best_before]


def uniform(space_layers: Sequence[Sequence[int]], group_size: int) -> Configuration:
    """Return the configuration with `group_size` in every layer; raises InvalidValueError where a layer lacks it."""
    for place, sizes in enumerate(space_layers):
        if group_size not in sizes:
            choices = ", ".join(map(str, sizes))
            raise InvalidValueError(f"group-size {group_size} is not among those of layer {place + 1}: {choices}")
    return Configuration([group_size] * len(space_layers))
