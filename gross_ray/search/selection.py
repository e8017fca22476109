"""Select configurations: those of the highest score under budgets, and the Pareto front (section 5.1).

Both work chunk by chunk on a space of any size, because the best of the whole are also the best of their chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gross_ray.errors import InvalidValueError
from gross_ray.search.budgets import COSTS, Budget, readable_amount
from gross_ray.space import Configuration, SearchSpace, listed


def best_under(accuracies: pd.DataFrame, budgets: Sequence[Budget], top: int) -> pd.DataFrame:
    """Return the `top` (1 or more) configurations of the highest score within all `budgets`, the best first.

    `accuracies` and the result have the columns of `scores.scored`. Ties in the score go to the lower cost (of the
    first budget, then of the next; MACs if there are no budgets), then to the smaller group-sizes: the order is total,
    so the best of the chunks' best are the best of all. Raises InvalidValueError if nothing fits, naming the smallest
    costs, or if a cost under a budget was not measured.
    """
    return best_of_chunks([accuracies], budgets, top)


def best_of_chunks(chunks: Iterable[pd.DataFrame], budgets: Sequence[Budget], top: int) -> pd.DataFrame:
    """Return `best_under` of all chunks together, with one chunk in memory at a time."""
    best: list[pd.DataFrame] = []
    smallest: dict[str, tuple[float, str]] = {}
    for chunk in chunks:
        if chunk.empty:
            continue
        best.append(_best(chunk, budgets, top))
        for cost in _costs(budgets):
            least = chunk.iloc[chunk[cost].argmin()]
            smallest[cost] = min(smallest.get(cost, (math.inf, "")), (float(least[cost]), str(least["configuration"])))
    if not best:
        raise InvalidValueError("nothing to choose from: no configuration is evaluated; run `gross search RUN` first")
    merged = _best(pd.concat(best), budgets, top)
    if merged.empty:
        percents = {budget.cost: budget.percent_of_full for budget in budgets}
        listed = ", ".join(
            f"{cost}={readable_amount(cost, least)}{percents[cost](least) if cost in percents else ''} at {name}"
            for cost, (least, name) in smallest.items()
        )
        raise InvalidValueError(f"budget {' and '.join(map(str, budgets))}: nothing fits; the smallest is {listed}")
    return merged


@dataclass(frozen=True)
class NearBest:
    """The configurations whose score is within one standard error of the best's, under the same budgets."""

    count: int
    """How many there are, with the best itself."""
    cheapest: pd.DataFrame
    """One row: the cheapest of them, in the first budget's cost (MACs without budgets)."""


def near_best(chunks: Iterable[pd.DataFrame], budgets: Sequence[Budget], best: pd.Series) -> NearBest:
    """Return the configurations of all chunks that are as good as `best`, their best row, as far as is known.

    `best` must have a standard error. One chunk is in memory at a time.
    """
    least = best["score"] - best["standard_error"]
    costs = _costs(budgets)
    order = {costs[0]: True, "score": False} | dict.fromkeys(costs[1:], True)
    count, cheapest = 0, []
    for chunk in chunks:
        near = chunk.loc[_fits(chunk, budgets) & (chunk["score"] >= least).to_numpy()]
        count += len(near)
        cheapest.append(_sorted(near.loc[near[costs[0]] == near[costs[0]].min()], order).head(1))
    return NearBest(count, _sorted(pd.concat(cheapest), order).head(1))


def select(accuracies: pd.DataFrame, budget: str, top: int) -> pd.DataFrame:
    """Return the `top` configurations of the highest score that cost no more MACs than the fixed one `budget`.

    `accuracies` is what `scores.scored` returns. The fixed configuration itself is left out; ties go to the cheaper
    one, then to the smaller group-sizes. If scores have standard errors, the cheapest configuration within one standard
    error of the best is the last row, unless it is among the others. Columns: those of the `selections` table. Raises
    InvalidValueError if `budget` was not evaluated or no other configuration fits under it.
    """
    fixed = accuracies.loc[accuracies["configuration"] == budget]
    if fixed.empty:
        raise InvalidValueError(
            f"budget {budget}: this configuration was not evaluated; choose group-sizes of the space"
        )
    limit = int(fixed["macs"].iloc[0])
    others, budgets = accuracies.loc[accuracies["configuration"] != budget], [Budget("macs", limit)]
    best = _best(others, budgets, top)
    if best.empty:
        smallest = accuracies.iloc[accuracies["macs"].argmin()]
        raise InvalidValueError(
            f"budget {budget} ({limit / 1e6:.2f} M MACs): nothing else fits under it; "
            f"the smallest is {smallest['macs'] / 1e6:.2f} M MACs at {smallest['configuration']}"
        )
    if best["standard_error"].notna().all():
        cheapest = near_best([others], budgets, best.iloc[0]).cheapest
        best = pd.concat([best, cheapest]).drop_duplicates("configuration", ignore_index=True)
    chosen = best[["configuration", "macs", "supernet_accuracy"]]
    return pd.DataFrame({"budget": budget, "budget_macs": limit, "rank": range(1, len(best) + 1)}).join(chosen)


def pareto_front(accuracies: pd.DataFrame, *, cost: str | Sequence[str] = "macs", value: str = "score") -> pd.DataFrame:
    """Return the rows that no other row dominates in cost (one or several) and value, in ascending order of cost.

    A row dominates another if it is as good in all of these and better in one. Of rows equal in all, only the one with
    the smallest group-sizes is kept; so the front of several chunks' fronts is the front of all. Raises
    InvalidValueError if a cost was not measured.
    """
    costs = [cost] if isinstance(cost, str) else list(dict.fromkeys(cost))
    if not costs:
        raise InvalidValueError(f"cost = {cost!r}: must name one or more of {', '.join(COSTS)}")
    for column in costs:
        _check_measured(accuracies, column)
    if len(costs) > 1:
        best = accuracies.loc[_undominated(np.column_stack([accuracies[costs], -accuracies[value]]))]
        return _sorted(best, dict.fromkeys(costs, True) | {value: False}).drop_duplicates(
            [*costs, value], ignore_index=True
        )
    (cost,) = costs
    ordered = accuracies.sort_values([cost, value], ascending=[True, False])
    rises = ordered[value] > ordered[value].cummax().shift(fill_value=-math.inf)
    # Rows equal to one on the front follow it directly: they stay candidates until the group-sizes decide.
    last_rise = np.maximum.accumulate(np.where(rises, np.arange(len(ordered)), 0))
    equal = (ordered[[cost, value]].to_numpy() == ordered[[cost, value]].to_numpy()[last_rise]).all(axis=1)
    front = _sorted(ordered.loc[equal], {cost: True, value: False})
    return front.drop_duplicates([cost, value], ignore_index=True)


def _undominated(points: np.ndarray, block: int = 512) -> np.ndarray:
    """Return whether no other point dominates each of the points (num_points, num_objectives; less is better)."""
    order = np.lexsort(points.T[::-1])  # a point comes after all that dominate it
    kept = np.empty((0, points.shape[1]))
    mask = np.zeros(len(points), dtype=bool)
    for rows in np.split(order, range(block, len(order), block)):
        rows = rows[~_dominated(points[rows], kept)]
        rows = rows[~_dominated(points[rows], points[rows])]
        mask[rows] = True
        kept = np.concatenate([kept, points[rows]])
    return mask


def _dominated(points: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return whether a point of `by` is as good as each point in every objective, and better in one."""
    as_good = (by[None] <= points[:, None]).all(axis=2)
    better_in_one = (by[None] < points[:, None]).any(axis=2)
    return np.any(as_good & better_in_one, axis=1)


def front_of_chunks(chunks: Iterable[pd.DataFrame], *, cost: str | Sequence[str] = "macs") -> pd.DataFrame:
    """Return `pareto_front` of all chunks (at least one) together, with one chunk in memory at a time."""
    return pareto_front(pd.concat([pareto_front(chunk, cost=cost) for chunk in chunks]), cost=cost)


def _costs(budgets: Sequence[Budget]) -> list[str]:
    """Return the costs that break ties in accuracy."""
    return list(dict.fromkeys(budget.cost for budget in budgets)) or ["macs"]


def _best(accuracies: pd.DataFrame, budgets: Sequence[Budget], top: int) -> pd.DataFrame:
    """Return the first `top` rows within all budgets, in the order of `best_under`; empty if none fits."""
    order = {"score": False} | dict.fromkeys(_costs(budgets), True)
    rows = accuracies.loc[_fits(accuracies, budgets)].nlargest(top, "score", keep="all")
    rows = rows.sort_values(list(order), ascending=list(order.values()))
    # Parsing group-sizes is slow: only for the first `top` rows and those equal to the last of them.
    numbers = rows[list(order)].to_numpy()
    last = (numbers == numbers[top - 1]).all(axis=1) if len(rows) > top else True
    return _sorted(rows.loc[(np.arange(len(rows)) < top) | last], order).head(top)


def _fits(accuracies: pd.DataFrame, budgets: Sequence[Budget]) -> np.ndarray:
    """Return whether each row is within all budgets; raises InvalidValueError if a cost was not measured."""
    fits = np.ones(len(accuracies), dtype=bool)
    for budget in budgets:
        _check_measured(accuracies, budget.cost)
        fits &= (accuracies[budget.cost] <= budget.limit).to_numpy()
    return fits


def _sorted(rows: pd.DataFrame, order: dict[str, bool]) -> pd.DataFrame:
    """Sort `rows` by the columns of `order` (True: ascending), then by group-sizes: 2-1 comes before 16-1."""
    parsed = rows.assign(group_sizes=[Configuration.parse(text) for text in rows["configuration"]])
    ordered = parsed.sort_values([*order, "group_sizes"], ascending=[*order.values(), True], ignore_index=True)
    return ordered.drop(columns="group_sizes")


def _check_measured(accuracies: pd.DataFrame, cost: str) -> None:
    if not accuracies[cost].isna().any():
        return
    if cost == "macs_paper":
        raise InvalidValueError(
            f"{cost}: a stride before the kernel, as the paper counts, leaves nothing of a small response; use macs"
        )
    raise InvalidValueError(f"{cost} is not measured for every configuration: run `gross latency RUN` first")


def uniform(space: SearchSpace, group_size: int) -> Configuration:
    """Return the configuration with `group_size` in every layer; raises InvalidValueError if a layer lacks it."""
    for layer, sizes in space.group_sizes.items():
        if group_size not in sizes:
            raise InvalidValueError(f"group-size {group_size} is not among those of {layer}: {listed(sizes)}")
    return Configuration([group_size] * len(space.layers))
