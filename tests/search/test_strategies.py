"""The contract of all strategies, and what each of them is to do."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from gross_ray.errors import GrossRayError, InvalidValueError
from gross_ray.search import strategies
from gross_ray.search.budgeted import BudgetedSpace
from gross_ray.search.budgets import Budget
from gross_ray.search.cost import LayerCosts
from gross_ray.search.strategies import STRATEGIES, BreadthFirst, Random, Strategy, Surrogated, strategy
from gross_ray.space import DENSE, Configuration, SearchSpace

SIZES = (1, 2, 4, 8, 16)
SPACE = SearchSpace({"conv2": SIZES, "conv3": SIZES, "conv4": SIZES})
COST = LayerCosts(
    "macs", 10.0, {f"conv{number}": {size: size * 2.0 ** (4 - number) for size in SIZES} for number in (2, 3, 4)}
)


def within(limit: float | None) -> BudgetedSpace:
    return BudgetedSpace(SPACE, [COST], [] if limit is None else [Budget("macs", limit)])


def accuracy(configuration: Configuration) -> float:
    """Better with more of each layer, with noise that has nothing to do with it."""
    noise = hash(tuple(configuration)) % 1000 / 1e6
    return 0.8 + 0.01 * sum(np.log2(configuration)) - 0.0005 * configuration[0] + noise


def searched(found: Strategy, batch: int, most: int = 10**9) -> list[Configuration]:
    proposed: list[Configuration] = []
    while len(proposed) < most and (batch_of := found.propose(min(batch, most - len(proposed)))):
        proposed += batch_of
        found.learn({one: accuracy(one) for one in batch_of})
    return proposed


@pytest.mark.parametrize("name", STRATEGIES)
def test_layers_may_stay_dense(name: str) -> None:
    space = SearchSpace({"conv2": (1, 4, DENSE), "conv3": (1, 4), "conv4": (1, 4, DENSE)})
    parts = {layer: {size: float(size or 9) for size in sizes} for layer, sizes in space.group_sizes.items()}
    budgeted = BudgetedSpace(space, [LayerCosts("macs", 0.0, parts)], [Budget("macs", 17.0)])
    found, proposed = strategy(name, budgeted, 0), []
    while batch := found.propose(4):
        proposed += batch
        found.learn({one: 0.5 + 0.01 * sum(size or 9 for size in one) for one in batch})
    assert len(proposed) == len(set(proposed))
    assert set(proposed) == {one for one in space if sum(size or 9 for size in one) <= 17}
    assert any(DENSE in one for one in proposed)


@pytest.mark.parametrize("limit", [None, 60.0, 17.0])
@pytest.mark.parametrize("batch", [1, 7, 40])
@pytest.mark.parametrize("name", STRATEGIES)
def test_each_that_fits_is_proposed_once(name: str, batch: int, limit: float | None) -> None:
    proposed = searched(strategy(name, within(limit), 0), batch)
    assert len(proposed) == len(set(proposed))
    assert set(proposed) == set(within(limit))


@pytest.mark.parametrize("name", STRATEGIES)
def test_batches_are_full_and_in_the_order_of_the_space(name: str) -> None:
    found = strategy(name, within(60.0), 0)
    for _ in range(4):
        batch = found.propose(12)
        assert len(batch) == 12
        assert batch == sorted(batch)
        found.learn({one: accuracy(one) for one in batch})


@pytest.mark.parametrize("name", STRATEGIES)
def test_told_again_it_proposes_the_same(name: str) -> None:
    first, again = (strategy(name, within(60.0), 3) for _ in range(2))
    for _ in range(5):
        batch = first.propose(6)
        assert again.propose(6) == batch
        for one in (first, again):
            one.learn({each: accuracy(each) for each in batch})


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_others_evaluated_is_not_proposed(name: str) -> None:
    known = list(within(60.0))[::3]
    found = strategy(name, within(60.0), 0)
    found.learn({one: accuracy(one) for one in known})
    proposed = searched(found, 8)
    assert set(proposed) == set(within(60.0)) - set(known)
    assert len(proposed) == len(set(proposed))


@pytest.mark.parametrize("name", ["random", "evolution", "surrogate"])
def test_the_seed_decides(name: str) -> None:
    first, second = (searched(strategy(name, within(None), seed), 10, 40) for seed in (0, 1))
    assert first != second


def huge(limit: float) -> BudgetedSpace:
    space = SearchSpace({f"layer{place}": (1, 4, 16, 32) for place in range(16)})
    cost = LayerCosts("macs", 0, {layer: {size: size for size in sizes} for layer, sizes in space.group_sizes.items()})
    return BudgetedSpace(space, [cost], [Budget("macs", limit)])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_space_too_large_to_list(name: str) -> None:
    space = huge(200.0)
    found = strategy(name, space, 0)
    proposed = searched(found, 40, 120)
    assert len(set(proposed)) == 120
    assert space.fits(space.indices(proposed)).all()


def test_a_large_space_with_few_that_are_new_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "FEW", 10)  # so that they are drawn, not listed
    assert set(searched(Random(within(30.0), 0), 5)) == set(within(30.0))


def test_breadth_first_exchanges_one_group_size_of_the_best() -> None:
    found = BreadthFirst(within(60.0), 0, width=1)
    starts = found.propose(3)
    assert starts == [Configuration([size] * 3) for size in (1, 2, 4)]
    found.learn({one: accuracy(one) for one in starts})
    best = max(starts, key=accuracy)
    for one in found.propose(5):
        assert sum(a != b for a, b in zip(one, best, strict=True)) == 1
    with pytest.raises(InvalidValueError, match="width = 0"):
        BreadthFirst(within(60.0), 0, width=0)


def test_a_budget_that_no_uniform_configuration_keeps_to_starts_from_the_cheapest() -> None:
    space = SearchSpace({"a": (1, 2), "b": (4, 8)})
    cost = LayerCosts("macs", 0, {"a": {1: 1, 2: 2}, "b": {4: 4, 8: 8}})
    assert BreadthFirst(BudgetedSpace(space, [cost], [Budget("macs", 9)]), 0).propose(1) == [Configuration((1, 4))]


@pytest.mark.parametrize("limit", [None, 60.0])
def test_a_surrogate_finds_the_best_sooner_than_chance(limit: float | None) -> None:
    space = within(limit)
    best = max(space, key=accuracy)

    def needed(name: str, seed: int) -> int:
        return searched(strategy(name, space, seed), 4).index(best)

    seeds = range(7)
    by_chance, by_surrogate = (sorted(needed(name, seed) for seed in seeds)[3] for name in ("random", "surrogate"))
    assert by_surrogate < by_chance
    assert by_surrogate < len(SPACE) / 5


def test_a_surrogate_goes_uphill_in_a_large_space() -> None:
    space = huge(200.0)
    by_chance, by_surrogate = (
        max(map(accuracy, searched(strategy(name, space, 0), 40, 200))) for name in ("random", "surrogate")
    )
    assert by_surrogate > by_chance


def test_a_surrogate_is_fitted_to_a_part_of_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "MOST_FITTED", 20)
    assert set(searched(Surrogated(within(60.0), 0), 9)) == set(within(60.0))


def test_unknown_names_and_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValueError, match="strategy 'best': must be one of exhaustive, random, breadth-first"):
        strategy("best", within(None), 0)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(GrossRayError, match="needs optuna: pip install"):
        strategy("evolution", within(None), 0)
