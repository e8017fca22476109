"""The part of a space within budgets, against listing the whole space."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from gross_ray.errors import InvalidValueError
from gross_ray.search import budgeted
from gross_ray.search.budgeted import BudgetedSpace
from gross_ray.search.budgets import Budget
from gross_ray.search.cost import LayerCosts
from gross_ray.space import Configuration, SearchSpace

SPACE = SearchSpace({"a": (1, 2, 4), "b": (1, 8, 16, 32), "c": (2, 4, 64)})


def cost_of(space: SearchSpace, name: str, shared: float, *by_layer: list[float]) -> LayerCosts:
    layers = zip(space.group_sizes.items(), by_layer, strict=True)
    return LayerCosts(name, shared, {layer: dict(zip(sizes, parts, strict=True)) for (layer, sizes), parts in layers})


MACS = cost_of(SPACE, "macs", 100, [1, 2, 4], [3, 24, 48, 96], [10, 20, 320])
LATENCY = cost_of(SPACE, "latency_ms", 0.5, [0.3, 0.1, 0.2], [0.1, 0.1, 0.05, 0.2], [0.4, 0.5, 0.3])


def total(cost: LayerCosts, configuration: Configuration) -> float:
    return cost.shared + sum(parts[size] for parts, size in zip(cost.by_layer.values(), configuration, strict=True))


def listed(*budgets: Budget) -> list[Configuration]:
    costs = {cost.name: cost for cost in (MACS, LATENCY)}
    return [one for one in SPACE if all(total(costs[each.cost], one) <= each.limit for each in budgets)]


BUDGETS = [
    (),
    (Budget("macs", 114),),
    (Budget("macs", 160.5),),
    (Budget("macs", 1e6),),
    (Budget("latency_ms", 1.1),),
    (Budget("macs", 215), Budget("latency_ms", 1.15)),
]


@pytest.mark.parametrize("budgets", BUDGETS, ids=lambda budgets: " and ".join(map(str, budgets)) or "none")
def test_what_fits_is_walked_counted_and_drawn_evenly(budgets: tuple[Budget, ...]) -> None:
    within, expected = BudgetedSpace(SPACE, [MACS, LATENCY], budgets), listed(*budgets)
    assert list(within) == expected
    every = within.indices(list(SPACE))
    assert within.configurations(every[within.fits(every)]) == expected
    assert within.configurations(every) == list(SPACE)
    if len(budgets) < 2:
        assert len(expected) <= within.size_bound <= len(expected) + 1
    drawn = Counter(within.configurations(within.draw(4000, np.random.default_rng(0))))
    assert drawn.keys() == set(expected)
    if len(expected) > 1:
        assert chisquare(list(drawn.values())).pvalue > 1e-3


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_what_fits_a_random_budget(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    space = SearchSpace({f"layer{place}": [2**power for power in range(num)] for place, num in enumerate(sizes)})
    parts = [data.draw(st.lists(st.floats(0, 10), min_size=num, max_size=num)) for num in sizes]
    cost = cost_of(space, "macs", data.draw(st.floats(0, 10)), *parts)
    sums = cost.of(list(space))
    limit = float(data.draw(st.sampled_from(sorted({*sums.tolist(), *(sums * 1.01).tolist()}))))
    if limit <= 0:
        return
    within = BudgetedSpace(space, [cost], [Budget("macs", limit)])
    expected = [one for one, found in zip(space, sums, strict=True) if found <= limit]
    assert list(within) == expected
    drawn = within.configurations(within.draw(50, np.random.default_rng(0)))
    assert set(drawn) <= set(expected)


def test_the_neighbours_differ_in_one_layer_and_fit() -> None:
    within = BudgetedSpace(SPACE, [MACS], [Budget("macs", 160)])
    own = Configuration((2, 8, 4))
    expected = [one for one in listed(Budget("macs", 160)) if sum(a != b for a, b in zip(one, own, strict=True)) == 1]
    assert sorted(within.neighbours(own)) == expected
    assert len(expected) == 4  # 1-8-4, 4-8-4, 2-1-4, 2-8-2


def test_a_huge_space_is_drawn_from_at_once() -> None:
    space = SearchSpace({f"layer{place}": (1, 4, 16, 32) for place in range(16)})  # 4.3e9 configurations
    cost = cost_of(space, "macs", 0, *([1.0, 4.0, 16.0, 32.0] for _ in range(16)))
    within = BudgetedSpace(space, [cost], [Budget("macs", 20)])  # all 1 but for one 4: 17 of them
    drawn = within.configurations(within.draw(2000, np.random.default_rng(0)))
    assert set(drawn) == set(within)
    assert len(set(drawn)) == 17


def test_a_budget_that_nothing_keeps_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValueError, match=r"budget macs=113: nothing fits; the smallest is macs=114 at 1-1-2$"):
        BudgetedSpace(SPACE, [MACS], [Budget("macs", 113)])
    with pytest.raises(InvalidValueError, match=r"latency_ms is not known here; known costs: macs"):
        BudgetedSpace(SPACE, [MACS], [Budget("latency_ms", 1)])
    monkeypatch.setattr(budgeted, "MOST_DRAWS", 2**10)
    apart = BudgetedSpace(SPACE, [MACS, LATENCY], [Budget("macs", 114), Budget("latency_ms", 1.0)])
    assert list(apart) == []
    with pytest.raises(InvalidValueError, match="budget macs=114 and latency_ms=1: of .* none fits the others too"):
        apart.draw(1, np.random.default_rng(0))
