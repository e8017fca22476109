"""The search by a strategy: rounds of proposals, each stored before it is evaluated, so that a search is continued.

Round 0 is the fixed configurations, or without any those of the smallest and of the largest group-sizes, and what
another search evaluated (`pipelines.reuse`). Then the experiment's budgets and limits take turns; each has a strategy
of its own, which learns from the rounds of all. A strategy's proposals follow from its seed and from what it learned,
so that a run that is killed goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from gross_ray.errors import InvalidValueError, MissingStageError
from gross_ray.run.store import SEARCH_ENDED, RunStore
from gross_ray.search.budgeted import AdditiveCost, BudgetedSpace
from gross_ray.search.cost import CostTable
from gross_ray.search.selection import Budget, supernet_accuracies, uniform
from gross_ray.search.strategies import Strategy, strategy
from gross_ray.seeds import derive_seed
from gross_ray.space import Configuration
from gross_ray.supernet.build import empty_supernet
from pipelines.networks import Base, load_base
from pipelines.predictions import measured, stored_model
from pipelines.units import Unit

ROUNDS = SEARCH_ENDED[0]
ROUNDS_A_SEARCH = 20
"""A round is this share of all evaluations, but for LEAST and MOST."""
LEAST, MOST = 8, 512
PARTS = 4
"""Units of one supernet and round."""


def stored(store: RunStore) -> list[list[Configuration]]:
    """Return the rounds so far."""
    rounds: list[list[Configuration]] = []
    while store.has_checkpoint(ROUNDS, f"round={len(rounds)}"):
        _, about = store.load_checkpoint(ROUNDS, f"round={len(rounds)}")
        rounds.append([Configuration.parse(text) for text in about["configurations"]])
    return rounds


def begin(store: RunStore, known: Sequence[Configuration] = ()) -> None:
    """Store round 0, what every search evaluates and those whose accuracies are `known`, unless it is there."""
    if not store.has_checkpoint(ROUNDS, "round=0"):
        space = load_base(store).space
        asked = {*store.experiment.search.budgets, *store.experiment.validation.fixed}
        first = [uniform(space, size) for size in sorted(asked)] or list(dict.fromkeys([space[0], space[-1]]))
        _store(store, 0, sorted({*first, *known}) if known else first)


def units(supernet: Unit, number: int, configurations: Sequence[Configuration]) -> list[Unit]:
    """Return the units that evaluate a round in one supernet."""
    step = ceil(len(configurations) / PARTS)
    return [
        Unit(
            f"{supernet.name},round={number},part={part}",
            {"supernet": supernet.name, **supernet.arguments, "configurations": list(map(str, some))},
            len(some),
            shared=supernet.name,
        )
        for part in range(PARTS)
        if (some := configurations[part * step : (part + 1) * step])
    ]


def end(store: RunStore) -> None:
    """Note that a search by a strategy has ended: it may have fewer rounds than it was given evaluations for."""
    store.save_checkpoint(*SEARCH_ENDED, {}, {})


def ended(store: RunStore) -> bool:
    """Return whether a search by a strategy has ended."""
    return store.has_checkpoint(*SEARCH_ENDED)


class Proposals:
    """The strategies of a search, one for each of the experiment's budgets."""

    def __init__(self, store: RunStore) -> None:
        """Make them; raises InvalidValueError for a budget below the cheapest configuration."""
        self._store, base = store, load_base(store)
        options = store.experiment.search
        self._left = options.evaluations
        self._size = min(max(options.evaluations // ROUNDS_A_SEARCH, LEAST), MOST)
        macs = additive_cost(store, base, "macs")
        self._strategies: list[Strategy] = []
        for size in options.budgets:
            fixed = uniform(base.space, size)
            limit = float(macs.of(BudgetedSpace(base.space, [macs]).places([fixed]))[0])
            within = BudgetedSpace(base.space, [macs], [Budget("macs", limit)])
            self._strategies.append(strategy(options.strategy, within, _seed(store, f"budget={size}")))
        for text in options.limits:
            budgets = Budget.parse_all(text)
            costs = {macs.name: macs} | {one.cost: additive_cost(store, base, one.cost) for one in budgets}
            within = BudgetedSpace(base.space, list(costs.values()), budgets)
            self._strategies.append(strategy(options.strategy, within, _seed(store, f"limit={text}")))
        self._number = 0

    def learn(self, round_: Sequence[Configuration], names: Sequence[str]) -> None:
        """Take the accuracies of a round from the stored units `names`: the median over the supernets of each."""
        rows = self._store.read_units("configurations", names)
        found = supernet_accuracies(rows)
        accuracies = dict(
            zip(map(Configuration.parse, found["configuration"]), found["supernet_accuracy"], strict=True)
        )
        if set(accuracies) != set(round_):
            raise InvalidValueError(f"round {self._number} of the search is stored in part: run `gross search` again")
        self._left -= len(round_) if self._number else 0
        for one in self._strategies:
            one.learn(accuracies)
        self._number += 1

    def next_round(self) -> list[Configuration]:
        """Return the next round, as it was stored or else proposed and stored now; empty at the end."""
        size = min(self._size, self._left)
        proposed: list[Configuration] = []
        for turn in range(len(self._strategies)):
            if size > 0 and not proposed:
                proposed = self._strategies[(self._number - 1 + turn) % len(self._strategies)].propose(size)
        there = stored(self._store)[self._number :]
        if there:  # another version of a library may propose otherwise: what is evaluated counts
            return there[0]
        if proposed:
            _store(self._store, self._number, proposed)
        return proposed


def additive_cost(store: RunStore, base: Base, cost: str) -> AdditiveCost:
    """Return a cost of a base network's configurations, layer by layer.

    Raises MissingStageError for a latency that is not measured.
    """
    if cost == "latency_ms":
        model = stored_model(store)
        if model is None:
            raise MissingStageError(
                f"search.limits has latency_ms, and {store.storage} no measurement of it that counts: "
                "run `gross latency` on it before the search; of several the one that is measured or read last counts"
            )
        shared = model.offset_ms + model.slope * model.rest_ms
        times = ({size: model.slope * ms for size, ms in one.items()} for one in model.layer_ms.values())
        return AdditiveCost.of_parts(cost, shared, list(times))
    supernet = empty_supernet(base.network, base.space.group_sizes)
    name, convention = ("macs", "paper") if cost == "macs_paper" else (cost, "actual")
    return AdditiveCost.of_parts(cost, *CostTable.of(supernet, base.input_shape, convention=convention).parts(name))


def check_limits(store: RunStore) -> None:
    """Raise what `additive_cost` does for the experiment's limits, or InvalidValueError where nothing is within one."""
    options = store.experiment.search
    for text in options.limits:
        budgets, base = Budget.parse_all(text), load_base(store)
        timed = any(budget.cost == "latency_ms" for budget in budgets)
        if timed and options.strategy == "exhaustive" and measured(store) and stored_model(store) is None:
            continue  # what is stored with the configurations counts
        BudgetedSpace(base.space, [additive_cost(store, base, budget.cost) for budget in budgets], budgets)


def _seed(store: RunStore, name: str) -> int:
    return derive_seed(store.experiment.seed, ROUNDS, name) % 2**32


def _store(store: RunStore, number: int, configurations: Sequence[Configuration]) -> None:
    store.save_checkpoint(ROUNDS, f"round={number}", {}, {"configurations": list(map(str, configurations))})
