"""The configurations of a search space that fit budgets: draw from them uniformly, or list them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from gross_ray.errors import InvalidValueError
from gross_ray.search.budgets import Budget, readable_amount
from gross_ray.search.cost import LayerCosts, group_size_indices
from gross_ray.space import Configuration, SearchSpace

STEPS = 2000
"""Number of steps into which a budget is divided to count the configurations that fit."""
MOST_DRAWS = 2**22
"""After this many draws without a fit, `draw` raises: no configuration fits all budgets at once."""

# Shapes: N configurations, L layers, S group-sizes of a layer.


class BudgetedSpace:
    """The configurations of a space that fit all budgets."""

    def __init__(self, space: SearchSpace, costs: Sequence[LayerCosts], budgets: Sequence[Budget] = ()) -> None:
        """Raise InvalidValueError for a budget on a cost not in `costs`, or below the cheapest configuration."""
        self.space, self.budgets = space, tuple(budgets)
        self.costs = tuple(_within(cost, space) for cost in costs)
        self._by_name = {cost.name: cost for cost in self.costs}
        self._sizes = [np.array(sizes) for sizes in space.group_sizes.values()]
        for budget in budgets:
            if budget.cost not in self._by_name:
                known = ", ".join(self._by_name) or "none"
                raise InvalidValueError(f"budget {budget}: {budget.cost} is not known here; known costs: {known}")
            cost = self._by_name[budget.cost]
            if cost.minimum > budget.limit:
                share = budget.percent_of_full(cost.minimum)
                smallest = f"{budget.cost}={readable_amount(budget.cost, cost.minimum)}{share} at {cost.cheapest}"
                raise InvalidValueError(f"budget {budget}: nothing fits; the smallest is {smallest}")

    def indices(self, configurations: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the index of each group-size among those of its layer, (N, L) int64."""
        return group_size_indices(self.space, configurations)

    def configurations(self, indices: np.ndarray) -> list[Configuration]:
        """Return the configurations with these indices of group-sizes, (N, L)."""
        columns = [sizes[indices[:, layer]].tolist() for layer, sizes in enumerate(self._sizes)]
        return [Configuration(sizes) for sizes in zip(*columns, strict=True)]

    def fits(self, indices: np.ndarray) -> np.ndarray:
        """Return whether each configuration fits all budgets, (N,) bool."""
        fitting = np.ones(len(indices), dtype=bool)
        for budget in self.budgets:
            fitting &= self._by_name[budget.cost].of_indices(indices) <= budget.limit
        return fitting

    def neighbours(self, configuration: Sequence[int]) -> list[Configuration]:
        """Return the configurations that fit and differ from this one in the group-size of one layer."""
        own = self.indices([configuration])[0]
        rows = [
            [*own[:layer], index, *own[layer + 1 :]]
            for layer, sizes in enumerate(self._sizes)
            for index in range(len(sizes))
            if index != own[layer]
        ]
        indices = np.array(rows, dtype=np.int64).reshape(len(rows), len(own))
        return self.configurations(indices[self.fits(indices)])

    def __iter__(self) -> Iterator[Configuration]:
        """List all that fit, in the order of the space; a prefix that already exceeds a budget is skipped."""
        limited = [(self._by_name[budget.cost], budget.limit) for budget in self.budgets]
        least_rest = [np.cumsum([0.0, *(parts.min() for parts in reversed(cost.parts))])[::-1] for cost, _ in limited]
        layers = len(self._sizes)
        chosen: list[int] = []

        def walk(spent: list[float]) -> Iterator[Configuration]:
            depth = len(chosen)
            if depth == layers:
                indices = np.array([chosen])
                if self.fits(indices)[0]:  # sums in another order may round differently
                    yield self.configurations(indices)[0]
                return
            for index in range(len(self._sizes[depth])):
                now = [total + cost.parts[depth][index] for total, (cost, _) in zip(spent, limited, strict=True)]
                slack = 1 + 1e-12
                if all(
                    total + rest[depth + 1] <= limit * slack
                    for total, rest, (_, limit) in zip(now, least_rest, limited, strict=True)
                ):
                    chosen.append(index)
                    yield from walk(now)
                    chosen.pop()

        return walk([float(cost.shared) for cost, _ in limited])

    @property
    def size_bound(self) -> float:
        """An upper bound on the number of configurations that fit, usually a close one."""
        return float(self._completions[0][STEPS]) if self.budgets else float(self.space.size)

    def draw(self, num: int, generator: np.random.Generator) -> np.ndarray:
        """Draw `num` configurations uniformly, with replacement, from all that fit; return their indices, (num, L).

        Raises InvalidValueError if none of MOST_DRAWS draws fits all budgets.
        """
        found = np.empty((0, len(self._sizes)), dtype=np.int64)
        drawn, ask = 0, num
        while len(found) < num:
            indices = self._draw(ask, generator)
            drawn += ask
            found = np.concatenate([found, indices[self.fits(indices)]])
            if not len(found) and drawn >= MOST_DRAWS:
                raise InvalidValueError(
                    f"budget {' and '.join(map(str, self.budgets))}: of {drawn} configurations that fit "
                    f"{self.budgets[self._tightest]}, none fits the others too; raise one of them"
                )
            lacking = (num - len(found)) * drawn / max(len(found), 1)
            ask = int(min(max(1.1 * lacking, 64), MOST_DRAWS // 4))
        return found[:num]

    def _draw(self, num: int, generator: np.random.Generator) -> np.ndarray:
        """Draw uniformly from the configurations that fit the tightest budget, and a few beyond it (`_steps` round)."""
        if not self.budgets:
            return np.stack([generator.integers(len(sizes), size=num) for sizes in self._sizes], axis=1)
        left = np.full(num, STEPS)
        columns = []
        for depth, steps in enumerate(self._steps):
            after = left[:, None] - steps  # (num, S)
            ways = np.where(after >= 0, self._completions[depth + 1][np.maximum(after, 0)], 0.0)
            chances = ways.cumsum(axis=1)
            index = (generator.random((num, 1)) * chances[:, -1:] >= chances).sum(axis=1)
            columns.append(index)
            left -= steps[index]
        return np.stack(columns, axis=1)

    @cached_property
    def _tightest(self) -> int:
        """Index of the budget that admits the smallest share of the range from its least to its greatest cost."""

        def share(budget: Budget) -> float:
            cost = self._by_name[budget.cost]
            return (budget.limit - cost.minimum) / max(cost.maximum - cost.minimum, 1e-300)

        return int(np.argmin([share(budget) for budget in self.budgets]))

    @cached_property
    def _steps(self) -> list[np.ndarray]:
        """For each layer, the steps of the tightest budget that each group-size uses, (S,), rounded down."""
        budget = self.budgets[self._tightest]
        cost = self._by_name[budget.cost]
        least = [parts.min() for parts in cost.parts]
        left = max(budget.limit - cost.shared - sum(least), 1e-200)
        return [
            np.minimum(np.floor((parts - low) / left * STEPS * (1 - 1e-9)), STEPS + 1).astype(np.int64)
            for parts, low in zip(cost.parts, least, strict=True)
        ]

    @cached_property
    def _completions(self) -> list[np.ndarray]:
        """For each depth, in how many ways the layers from there on fit into 0 to STEPS steps, (STEPS + 1,)."""
        ways = [np.ones(STEPS + 1)]
        for steps in reversed(self._steps):
            after = np.arange(STEPS + 1)[:, None] - steps
            ways.append(np.where(after >= 0, ways[-1][np.maximum(after, 0)], 0.0).sum(axis=1))
        return ways[::-1]


def _within(cost: LayerCosts, space: SearchSpace) -> LayerCosts:
    """Return a cost of the space's own layers and choices."""
    by_layer = {
        layer: {size: cost.by_layer[layer][size] for size in sizes} for layer, sizes in space.group_sizes.items()
    }
    return replace(cost, by_layer=by_layer)
