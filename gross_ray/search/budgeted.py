"""The part of a search space that keeps to budgets, which are on sums over the layers: drawn from evenly, or walked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from gross_ray.errors import InvalidValueError
from gross_ray.search.budgets import Budget, written
from gross_ray.search.cost import LayerCosts, group_size_places
from gross_ray.space import Configuration, SearchSpace

STEPS = 2000
"""Into so many steps a budget is cut where configurations are counted."""
MOST_DRAWS = 2**22
"""Drawn in vain before a search says that nothing keeps to all budgets at once."""

# Shapes: N configurations, L layers, S group-sizes of a layer.


class BudgetedSpace:
    """The configurations of a space that keep to all budgets."""

    def __init__(self, space: SearchSpace, costs: Sequence[LayerCosts], budgets: Sequence[Budget] = ()) -> None:
        """Take the space, and costs that every budget names one of.

        Raises InvalidValueError for a budget on another cost, and for one below the cheapest configuration.
        """
        self.space, self.budgets = space, tuple(budgets)
        self.costs = tuple(
            replace(cost, by_layer={layer: cost.by_layer[layer] for layer in space.layers}) for cost in costs
        )
        self._by_name = {cost.name: cost for cost in self.costs}
        self._sizes = [np.array(sizes) for sizes in space.group_sizes.values()]
        for budget in budgets:
            if budget.cost not in self._by_name:
                there = ", ".join(self._by_name) or "none"
                raise InvalidValueError(f"budget {budget}: {budget.cost} is not known here; known costs: {there}")
            cost = self._by_name[budget.cost]
            if cost.minimum > budget.limit:
                smallest = f"{budget.cost}={written(cost.minimum)} at {cost.cheapest}"
                raise InvalidValueError(f"budget {budget}: nothing fits; the smallest is {smallest}")

    def places(self, configurations: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the places of members' group-sizes among those of their layers, (N, L) int64."""
        return group_size_places(self.space, configurations)

    def configurations(self, places: np.ndarray) -> list[Configuration]:
        """Return the members whose group-sizes have these places, (N, L)."""
        columns = [sizes[places[:, layer]].tolist() for layer, sizes in enumerate(self._sizes)]
        return [Configuration(sizes) for sizes in zip(*columns, strict=True)]

    def fits(self, places: np.ndarray) -> np.ndarray:
        """Return which of the configurations keep to all budgets, (N,) bool."""
        fitting = np.ones(len(places), dtype=bool)
        for budget in self.budgets:
            fitting &= self._by_name[budget.cost].of_places(places) <= budget.limit
        return fitting

    def neighbours(self, configuration: Sequence[int]) -> np.ndarray:
        """Return the places of those members that differ in the group-size of one layer and fit, (N, L)."""
        own = self.places([configuration])[0]
        rows = [
            [*own[:layer], place, *own[layer + 1 :]]
            for layer, sizes in enumerate(self._sizes)
            for place in range(len(sizes))
            if place != own[layer]
        ]
        found = np.array(rows, dtype=np.int64).reshape(len(rows), len(own))
        return found[self.fits(found)]

    def __iter__(self) -> Iterator[Configuration]:
        """Walk all that fit, in the order of the space; what cannot fit any more is not gone into."""
        limited = [(self._by_name[budget.cost], budget.limit) for budget in self.budgets]
        least_rest = [np.cumsum([0.0, *(parts.min() for parts in reversed(cost.parts))])[::-1] for cost, _ in limited]
        layers = len(self._sizes)
        chosen: list[int] = []

        def walk(spent: list[float]) -> Iterator[Configuration]:
            depth = len(chosen)
            if depth == layers:
                one = np.array([chosen])
                if self.fits(one)[0]:  # sums in another order may round differently
                    yield self.configurations(one)[0]
                return
            for place in range(len(self._sizes[depth])):
                now = [total + cost.parts[depth][place] for total, (cost, _) in zip(spent, limited, strict=True)]
                slack = 1 + 1e-12
                if all(
                    total + rest[depth + 1] <= limit * slack
                    for total, rest, (_, limit) in zip(now, least_rest, limited, strict=True)
                ):
                    chosen.append(place)
                    yield from walk(now)
                    chosen.pop()

        return walk([float(cost.shared) for cost, _ in limited])

    @property
    def most(self) -> float:
        """At least as many as fit, and rarely many more."""
        return float(self._completions[0][STEPS]) if self.budgets else float(self.space.size)

    def draw(self, num: int, generator: np.random.Generator) -> np.ndarray:
        """Return the places of `num` members that fit, (num, L), each drawn evenly from all that do.

        Raises InvalidValueError where of MOST_DRAWS none keeps to all budgets.
        """
        found = np.empty((0, len(self._sizes)), dtype=np.int64)
        drawn, ask = 0, num
        while len(found) < num:
            places = self._draw(ask, generator)
            drawn += ask
            found = np.concatenate([found, places[self.fits(places)]])
            if not len(found) and drawn >= MOST_DRAWS:
                raise InvalidValueError(
                    f"budget {' and '.join(map(str, self.budgets))}: of {drawn} configurations that keep to "
                    f"{self.budgets[self._tightest]}, none keeps to the others too; raise one of them"
                )
            lacking = (num - len(found)) * drawn / max(len(found), 1)
            ask = int(min(max(1.1 * lacking, 64), MOST_DRAWS // 4))
        return found[:num]

    def _draw(self, num: int, generator: np.random.Generator) -> np.ndarray:
        """Draw evenly from all that keep to the tightest budget, counted in steps rounded down: a little more."""
        if not self.budgets:
            return np.stack([generator.integers(len(sizes), size=num) for sizes in self._sizes], axis=1)
        left = np.full(num, STEPS)
        columns = []
        for depth, steps in enumerate(self._steps):
            behind = left[:, None] - steps  # (num, S)
            ways = np.where(behind >= 0, self._completions[depth + 1][np.maximum(behind, 0)], 0.0)
            chances = ways.cumsum(axis=1)
            place = (generator.random((num, 1)) * chances[:, -1:] >= chances).sum(axis=1)
            columns.append(place)
            left -= steps[place]
        return np.stack(columns, axis=1)

    @cached_property
    def _tightest(self) -> int:
        """The budget that leaves the least of the way from its cheapest to its dearest configuration."""

        def share(budget: Budget) -> float:
            cost = self._by_name[budget.cost]
            return (budget.limit - cost.minimum) / max(cost.maximum - cost.minimum, 1e-300)

        return int(np.argmin([share(budget) for budget in self.budgets]))

    @cached_property
    def _steps(self) -> list[np.ndarray]:
        """For each layer the steps of the tightest budget that each group-size takes, (S,), rounded down."""
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
        """For each depth, in how many ways the layers from it on fit into so many steps, (STEPS + 1,)."""
        ways = [np.ones(STEPS + 1)]
        for steps in reversed(self._steps):
            behind = np.arange(STEPS + 1)[:, None] - steps
            ways.append(np.where(behind >= 0, ways[-1][np.maximum(behind, 0)], 0.0).sum(axis=1))
        return ways[::-1]
