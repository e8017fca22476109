"""The search by a strategy: rounds of proposals, each stored before it is evaluated, so that a search is continued.

Round 0 is the fixed configurations, or without any those of the smallest and of the largest group-sizes, and what
another search evaluated (`pipelines.stages.reuse`). Then the experiment's budgets and limits take turns; each has a
strategy of its own, which learns from the rounds of all. A strategy's proposals follow from its seed and from what it
learned, so that a run that is killed continues with the proposals that it would have made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from gross_ray.errors import InvalidValueError, MissingStageError
from gross_ray.run.opened import Run
from gross_ray.run.store import SEARCH_ENDED
from gross_ray.search.budgeted import BudgetedSpace
from gross_ray.search.budgets import Budget
from gross_ray.search.cost import LayerCosts, layer_costs
from gross_ray.search.selection import supernet_accuracies, uniform
from gross_ray.search.strategies import Strategy, strategy
from gross_ray.seeds import derive_seed
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet
from pipelines.stages import latencies
from pipelines.stages.supernets import Supernet
from pipelines.units import Unit

ROUNDS = SEARCH_ENDED[0]
ROUNDS_A_SEARCH = 20
"""A round is this share of all evaluations, but for LEAST and MOST."""
LEAST, MOST = 8, 512
PARTS = 4
"""Units of one supernet and round."""


@dataclass(frozen=True, kw_only=True)
class RoundPart(Unit):
    """Some of a round's configurations in one supernet."""

    supernet: Supernet
    round: int
    number: int
    """Which part of the round."""
    configurations: tuple[Configuration, ...]

    @property
    def name(self) -> str:
        """Like alpha=0,scaling=index,seed=0,round=3,part=1."""
        return f"{self.supernet.name},round={self.round},part={self.number}"

    @property
    def shared(self) -> str:
        """The supernet's weights."""
        return self.supernet.name

    @property
    def part(self) -> tuple[int, int]:
        """What it evaluates, whichever the supernet is."""
        return self.round, self.number

    def configurations_of(self, _: SearchSpace) -> list[Configuration]:
        """Return the configurations to evaluate."""
        return list(self.configurations)


def stored(run: Run) -> list[list[Configuration]]:
    """Return the rounds so far."""
    return run.once(ROUNDS, lambda: _read_rounds(run))


def _read_rounds(run: Run) -> list[list[Configuration]]:
    rounds: list[list[Configuration]] = []
    while run.store.has_checkpoint(ROUNDS, f"round={len(rounds)}"):
        _, about = run.store.load_checkpoint(ROUNDS, f"round={len(rounds)}")
        rounds.append([Configuration.parse(text) for text in about["configurations"]])
    return rounds


def begin(run: Run, known: Sequence[Configuration] = ()) -> None:
    """Store round 0, unless it is stored: what every search evaluates, and those whose accuracies are `known`."""
    if not run.store.has_checkpoint(ROUNDS, "round=0"):
        asked = {*run.experiment.search.budgets, *run.experiment.validation.fixed}
        first = [uniform(run.space, size) for size in sorted(asked)]
        first = first or list(dict.fromkeys([run.space[0], run.space[-1]]))
        _store(run, 0, sorted({*first, *known}) if known else first)


def units(supernet: Supernet, number: int, configurations: Sequence[Configuration]) -> list[RoundPart]:
    """Return the units that evaluate a round in one supernet."""
    step = ceil(len(configurations) / PARTS)
    cut = [tuple(configurations[part * step : (part + 1) * step]) for part in range(PARTS)]
    return [
        RoundPart(supernet=supernet, round=number, number=part, configurations=some, cost=len(some))
        for part, some in enumerate(cut)
        if some
    ]


def end(run: Run) -> None:
    """Store that a search by a strategy has ended: it may have fewer rounds than it was given evaluations for."""
    run.store.save_checkpoint(*SEARCH_ENDED, {}, {})


def ended(run: Run) -> bool:
    """Return whether a search by a strategy has ended."""
    return run.store.has_checkpoint(*SEARCH_ENDED)


class Proposals:
    """The strategies of a search, one for each of the experiment's budgets."""

    def __init__(self, run: Run) -> None:
        """Make them; raises InvalidValueError for a budget below the cheapest configuration."""
        self._run = run
        options = run.experiment.search
        self._left = options.evaluations
        self._size = min(max(options.evaluations // ROUNDS_A_SEARCH, LEAST), MOST)
        macs = additive_cost(run, "macs")
        self._strategies: list[Strategy] = []
        for size in options.budgets:
            fixed = uniform(run.space, size)
            limit = macs.of_one(fixed)
            within = BudgetedSpace(run.space, [macs], [Budget("macs", limit)])
            self._strategies.append(strategy(options.strategy, within, _seed(run, f"budget={size}")))
        for text in options.limits:
            budgets = Budget.parse_all(text)
            costs = {macs.name: macs} | {one.cost: additive_cost(run, one.cost) for one in budgets}
            within = BudgetedSpace(run.space, list(costs.values()), budgets)
            self._strategies.append(strategy(options.strategy, within, _seed(run, f"limit={text}")))
        self._number = 0

    def learn(self, round_: Sequence[Configuration], names: Sequence[str]) -> None:
        """Take the accuracies of a round from the stored units `names`: the median over the supernets of each."""
        rows = self._run.store.read_units("configurations", names)
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
        there = stored(self._run)[self._number :]
        if there:  # another version of a library may propose otherwise: what is evaluated counts
            return there[0]
        if proposed:
            _store(self._run, self._number, proposed)
        return proposed


def additive_cost(run: Run, cost: str) -> LayerCosts:
    """Return a cost of the run's configurations, layer by layer.

    Raises MissingStageError for a latency that is not measured.
    """
    if cost == "latency_ms":
        model = latencies.in_force(run)
        if model is None:
            raise MissingStageError(
                f"search.limits has latency_ms, and {run.store.storage} no measurement of it that counts: "
                "run `gross latency` on it before the search; of several the one that is measured or read last counts"
            )
        return model.costs
    return layer_costs(empty_supernet(run.base.network, run.space.group_sizes), run.base.input_shape, cost)


def check_limits(run: Run) -> None:
    """Raise what `additive_cost` does for the experiment's limits, or InvalidValueError where nothing is within one."""
    options = run.experiment.search
    for text in options.limits:
        budgets = Budget.parse_all(text)
        timed = any(budget.cost == "latency_ms" for budget in budgets) and options.strategy == "exhaustive"
        if timed and latencies.measured(run.store) and latencies.in_force(run) is None:
            continue  # what is stored with the configurations counts
        BudgetedSpace(run.space, [additive_cost(run, budget.cost) for budget in budgets], budgets)


def _seed(run: Run, name: str) -> int:
    return derive_seed(run.experiment.seed, ROUNDS, name) % 2**32


def _store(run: Run, number: int, configurations: Sequence[Configuration]) -> None:
    run.store.save_checkpoint(ROUNDS, f"round={number}", {}, {"configurations": list(map(str, configurations))})
    run.changed()
