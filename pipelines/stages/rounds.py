"""The search by a strategy: rounds of proposals, each stored before its evaluation, so that a search can be resumed.

Round 0 consists of the fixed configurations (if there are none, the first and the last configuration of the space)
and those that another search evaluated (`pipelines.stages.reuse`). Then the experiment's budgets and limits
take turns. Each has its own strategy, which learns from all rounds. A strategy's proposals depend only on its seed and
on what it learned, so that a killed run continues with the proposals that it would have made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import pandas as pd

from gross_ray.errors import InvalidValueError, MissingStageError
from gross_ray.run.limits import limits
from gross_ray.run.opened import Run
from gross_ray.run.store import SEARCH_ENDED
from gross_ray.search.budgeted import BudgetedSpace
from gross_ray.search.budgets import Budget
from gross_ray.search.cost import LayerCosts, layer_costs
from gross_ray.search.scores import Score, Scoreboard, by_supernet
from gross_ray.search.selection import uniform
from gross_ray.search.strategies import Strategy, strategy
from gross_ray.seeds import derive_seed
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet
from pipelines.stages import latencies, supernets
from pipelines.stages.supernets import InSupernet, Supernet

SEARCH = "search"
"""Name of the stage."""
ROUNDS = SEARCH_ENDED[0]
ROUNDS_A_SEARCH = 20
"""All evaluations are divided into about this many rounds, of LEAST to MOST configurations."""
LEAST, MOST = 8, 512
PARTS = 4
"""Units for each supernet and round."""


@dataclass(frozen=True, kw_only=True)
class RoundPart(InSupernet):
    """A part of a round's configurations, to be evaluated in one supernet."""

    round: int
    number: int
    """Index of the part in its round."""
    configurations: tuple[Configuration, ...]

    @property
    def name(self) -> str:
        """Like alpha=0,scaling=index,seed=0,round=3,part=1."""
        return f"{self.supernet.name},round={self.round},part={self.number}"

    def configurations_of(self, _: SearchSpace) -> list[Configuration]:
        """Return the configurations to evaluate."""
        return list(self.configurations)


def stored(run: Run) -> list[list[Configuration]]:
    """Return the stored rounds."""
    return run.once(ROUNDS, lambda: _read_rounds(run), depends=[SEARCH])


def _read_rounds(run: Run) -> list[list[Configuration]]:
    rounds: list[list[Configuration]] = []
    while run.store.has_checkpoint(ROUNDS, f"round={len(rounds)}"):
        _, about = run.store.load_checkpoint(ROUNDS, f"round={len(rounds)}")
        rounds.append([Configuration.parse(text) for text in about["configurations"]])
    return rounds


def begin(run: Run, evaluated: pd.DataFrame | None = None) -> None:
    """Store round 0, unless it is stored: the configurations of every search, and all that are evaluated already.

    These are `evaluated`, rows of another run's table `configurations`, and the rows of round 0 that are stored here:
    after a loss of the file with its configurations, they are kept, though perhaps in other units.
    """
    if run.store.has_checkpoint(ROUNDS, "round=0"):
        return
    asked = {*run.experiment.search.budgets, *run.experiment.validation.fixed}
    first = [uniform(run.space, size) for size in sorted(asked)]
    first = first or list(dict.fromkeys([run.space[0], run.space[-1]]))
    ours = _stored_units(run, 0)
    frames = [run.store.read_units("configurations", ours)] if ours else []
    frames += [] if evaluated is None else [evaluated]
    if frames:
        rows = pd.concat(frames).drop_duplicates(["supernet", "configuration"]).assign(latency_ms=None)
        known = {Configuration.parse(text) for text in evaluated_in_all(rows, supernets.searched(run))}
        first = first if known.issubset(first) else sorted({*first, *known})
        for name in set(ours) - _put(run, rows, first):
            run.store.delete_unit("configurations", name)
    _store(run, 0, first)


def evaluated_in_all(rows: pd.DataFrame, units: Sequence[Supernet]) -> set[str]:
    """Return the configurations that rows of the table `configurations` evaluate in each of these supernets."""
    by_supernet = {name: set(part["configuration"]) for name, part in rows.groupby("supernet")}
    return set.intersection(*(by_supernet.get(unit.name, set()) for unit in units))


def _all_supernets(run: Run) -> list[Supernet]:
    return list(dict.fromkeys([*supernets.searched(run), *supernets.swept(run)]))


def _stored_units(run: Run, number: int) -> list[str]:
    """Return the names of a round's stored units, whatever their configurations."""
    stored = run.store.finished_units("configurations")
    parts = [
        RoundPart(supernet=unit, round=number, number=part, configurations=()).name
        for unit in _all_supernets(run)
        for part in range(PARTS)
    ]
    return [name for name in parts if name in stored]


def _put(run: Run, rows: pd.DataFrame, configurations: Sequence[Configuration]) -> set[str]:
    """Store the units of round 0 whose configurations all have rows, and return their names; others are evaluated."""
    names = set()
    for unit in _all_supernets(run):
        by_name = rows[rows["supernet"] == unit.name].set_index("configuration", drop=False)
        for part in units(unit, 0, configurations):
            texts = list(map(str, part.configurations))
            if set(texts).issubset(by_name.index):
                taken = by_name.loc[texts].to_dict("records")
                run.store.write_table("configurations", part.name, taken, layers=run.space.layers)
                names.add(part.name)
    return names


def size_of(evaluations: int) -> int:
    """Return the number of configurations in a round of a search of so many evaluations."""
    return min(max(evaluations // ROUNDS_A_SEARCH, LEAST), MOST)


def units(supernet: Supernet, number: int, configurations: Sequence[Configuration]) -> list[RoundPart]:
    """Return the units that evaluate a round in one supernet."""
    step = ceil(len(configurations) / PARTS)
    parts = [tuple(configurations[part * step : (part + 1) * step]) for part in range(PARTS)]
    return [
        RoundPart(supernet=supernet, round=number, number=index, configurations=part, cost=len(part))
        for index, part in enumerate(parts)
        if part
    ]


def end(run: Run) -> None:
    """Store that the search has finished, which the number of rounds does not tell: it may finish early."""
    run.store.save_checkpoint(*SEARCH_ENDED, {}, {})


def ended(run: Run) -> bool:
    """Return whether the search has finished."""
    return run.store.has_checkpoint(*SEARCH_ENDED)


class Proposals:
    """The strategies of a search, one for each of the experiment's budgets and limits."""

    def __init__(self, run: Run) -> None:
        """Make the strategies; raises InvalidValueError for a budget below the cheapest configuration."""
        self._run = run
        options = run.experiment.search
        self._left = options.evaluations
        self._size = size_of(options.evaluations)
        macs = additive_cost(run, "macs")
        self._score = Score(options.score)
        self._board = Scoreboard(self._score)
        self._strategies: list[Strategy] = []
        for size in options.budgets:
            fixed = uniform(run.space, size)
            limit = macs.of_one(fixed)
            within = BudgetedSpace(run.space, [macs], [Budget("macs", limit)])
            self._strategies.append(strategy(options.strategy, within, _seed(run, f"budget={size}")))
        for text, budgets in zip(options.limits, limits(run.store), strict=True):
            costs = {macs.name: macs} | {budget.cost: additive_cost(run, budget.cost) for budget in budgets}
            within = BudgetedSpace(run.space, list(costs.values()), budgets)
            self._strategies.append(strategy(options.strategy, within, _seed(run, f"limit={text}")))
        self._number = 0

    def learn(self, round_: Sequence[Configuration], names: Sequence[str]) -> None:
        """Learn the scores of a round, whose evaluations are the stored units `names`."""
        rows = self._run.store.read_units("configurations", names, ["configuration", "seed", self._score.column])
        configurations = list(map(Configuration.parse, rows["configuration"].drop_duplicates()))
        values = by_supernet(rows, self._score, np.unique(rows["seed"]))
        if set(configurations) != set(round_) or np.isnan(values).any():
            raise InvalidValueError(f"round {self._number} of the search is stored in part: run `gross search` again")
        self._left -= len(round_) if self._number else 0
        self._board.teach(self._strategies, self._board.add(configurations, values))
        self._number += 1

    def next_round(self) -> list[Configuration]:
        """Return the next round: the stored one, or else a proposal, which is stored now; empty at the end."""
        size = min(self._size, self._left)
        proposed: list[Configuration] = []
        for turn in range(len(self._strategies)):
            if size > 0 and not proposed:
                proposed = self._strategies[(self._number - 1 + turn) % len(self._strategies)].propose(size)
        later = stored(self._run)[self._number :]
        if later:  # another version of a library may propose other configurations: the stored ones count
            return later[0]
        if proposed:
            _store(self._run, self._number, proposed)
        return proposed


def additive_cost(run: Run, cost: str) -> LayerCosts:
    """Return a cost of the run's configurations by layer; raises MissingStageError for an unmeasured latency."""
    if cost == "latency_ms":
        model = latencies.in_force(run)
        if model is None:
            raise MissingStageError(
                f"search.limits has latency_ms, but {run.store.storage} has no measurement in use: run `gross latency` "
                "on it before the search; if there are several, the last one measured or read is used"
            )
        return model.costs
    return layer_costs(empty_supernet(run.base.network, run.space.group_sizes), run.base.input_shape, cost)


def check_limits(run: Run) -> None:
    """Raise the errors of `additive_cost` for the experiment's limits, and InvalidValueError for an unreachable one."""
    for budgets in limits(run.store):
        BudgetedSpace(run.space, [additive_cost(run, budget.cost) for budget in budgets], budgets)


def _seed(run: Run, name: str) -> int:
    return derive_seed(run.experiment.seed, ROUNDS, name) % 2**32


def _store(run: Run, number: int, configurations: Sequence[Configuration]) -> None:
    run.store.save_checkpoint(ROUNDS, f"round={number}", {}, {"configurations": list(map(str, configurations))})
    run.changed(SEARCH)
