"""Which configurations to evaluate where a space is too large for all of them: strategies behind one interface.

A strategy proposes configurations that keep to the budgets, and learns from their accuracies; it never proposes one
that it proposed or learned of before. What it proposes follows from its seed and from what it was told alone, so that
a search is resumed by telling it again.
"""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import numpy as np

from gross_ray.errors import GrossRayError, InvalidValueError
from gross_ray.search.budgeted import BudgetedSpace
from gross_ray.search.surrogate import Surrogate
from gross_ray.space import Configuration

FEW = 100_000
"""Up to so many configurations are listed and shuffled, beyond they are drawn."""
FEW_ASKED = 8192
"""A surrogate is asked about all where no more fit; else about so many at most, and the neighbours of the best."""
LEAST_DRAWN = 16
"""Evaluations before a surrogate is fitted; more where the layers have more group-sizes."""
MOST_FITTED = 1000
"""Accuracies that it is fitted to, at most: half of them the best."""
MOST_REPEATS = 20
"""After so many times FEW known configurations in a row, a strategy ends."""
MOST_ASKED = 32
"""After so many in a row of NSGA-II's that are known or do not fit, the rest of a batch is drawn."""


class Strategy(ABC):
    """Proposes configurations that fit the budgets, each once, and learns what came of them."""

    def __init__(self, space: BudgetedSpace, seed: int) -> None:
        """Take what may be proposed, and the seed of all choices."""
        self.space = space
        self._generator = np.random.default_rng(seed)
        self._known: dict[Configuration, float | None] = {}

    def propose(self, num: int) -> list[Configuration]:
        """Return up to `num` new configurations in the order of the space, which shares prefixes; none at the end."""
        found = list(itertools.islice(self._new(num), num))
        self._known |= dict.fromkeys(found)
        return sorted(found)

    def learn(self, accuracies: Mapping[Configuration, float]) -> None:
        """Take accuracies (0 to 1) of own proposals, or of any others that are known."""
        self._known |= accuracies

    @abstractmethod
    def _candidates(self, num: int) -> Iterator[Configuration]:
        """Give configurations that fit, new or not, for about `num` new ones."""

    def _new(self, num: int) -> Iterator[Configuration]:
        given: set[Configuration] = set()
        in_vain = 0
        for one in self._candidates(num):
            in_vain += 1
            if one not in self._known and one not in given:
                given.add(one)
                in_vain = 0
                yield one
            elif in_vain == MOST_REPEATS * FEW:
                return

    @property
    def _evaluated(self) -> dict[Configuration, float]:
        return {one: accuracy for one, accuracy in self._known.items() if accuracy is not None}


class Exhaustive(Strategy):
    """All that fit, in the order of the space."""

    def __init__(self, space: BudgetedSpace, seed: int = 0) -> None:
        """Take what is to be walked; nothing is drawn."""
        super().__init__(space, seed)
        self._rest = iter(space)

    def _candidates(self, num: int) -> Iterator[Configuration]:
        return self._rest


class Random(Strategy):
    """Drawn evenly from all that fit, without replacement: what every other strategy has to beat."""

    def __init__(self, space: BudgetedSpace, seed: int) -> None:
        """Take what is drawn from."""
        super().__init__(space, seed)
        self._drawn = _drawn(space, self._generator)

    def _candidates(self, num: int) -> Iterator[Configuration]:
        return self._drawn


class BreadthFirst(Strategy):
    """From the uniform configurations, one layer's group-size exchanged at a time; the best are gone on from first.

    The search of the paper's later version. Of the configurations that are evaluated, the `width` most accurate whose
    neighbours are not all known are the frontier. Where nothing is left to go on from, it starts from drawn ones.
    """

    def __init__(self, space: BudgetedSpace, seed: int, *, width: int = 4) -> None:
        """Take the space and the frontier's width."""
        super().__init__(space, seed)
        if width < 1:
            raise InvalidValueError(f"width = {width}: a frontier has 1 configuration or more")
        self._width = width
        self._starts = _starts(space)
        self._closed: set[Configuration] = set()
        self._drawn = _drawn(space, self._generator)

    def _candidates(self, num: int) -> Iterator[Configuration]:
        yield from self._starts
        evaluated = self._evaluated
        ranked = iter(sorted(evaluated.keys() - self._closed, key=lambda one: (-evaluated[one], one)))
        while frontier := list(itertools.islice(ranked, self._width)):
            of_each = [self._new_neighbours(one) for one in frontier]
            yield from (one for group in itertools.zip_longest(*of_each) for one in group if one is not None)
        yield from self._drawn

    def _new_neighbours(self, configuration: Configuration) -> list[Configuration]:
        neighbours = self.space.configurations(self.space.neighbours(configuration))
        new = [one for one in neighbours if one not in self._known]
        if not new:
            self._closed.add(configuration)
        return new


class Surrogated(Strategy):
    """Those that a Gaussian process fitted to all accuracies so far holds for the best, or may: the one to try first.

    Starts with the uniform configurations and drawn ones. In a space of many, the process is asked about drawn ones and
    the best so far, then about the neighbours of those that it likes best.
    """

    def __init__(self, space: BudgetedSpace, seed: int) -> None:
        """Take what may be proposed."""
        super().__init__(space, seed)
        self._starts = _starts(space)
        self._drawn = _drawn(space, self._generator)
        self._few = list(space) if space.most <= FEW_ASKED else None

    def _candidates(self, num: int) -> Iterator[Configuration]:
        yield from self._starts
        evaluated = self._evaluated
        enough = max(LEAST_DRAWN, sum(len(sizes) - 1 for sizes in self.space.space.group_sizes.values()))
        if len(self._known) >= enough and len(evaluated) > 1:
            yield from self._liked(num, evaluated)
        yield from self._drawn

    def _liked(self, num: int, evaluated: dict[Configuration, float]) -> list[Configuration]:
        """Return the `num` unknown ones of the highest mean plus standard deviation."""
        ranked = sorted(evaluated, key=lambda one: (-evaluated[one], one))
        kept = ranked[: MOST_FITTED // 2]
        others = ranked[MOST_FITTED // 2 :]
        kept += [others[place] for place in self._generator.permutation(len(others))[: MOST_FITTED // 2]]
        surrogate = Surrogate.of(self.space.places(kept), np.array([evaluated[one] for one in kept]))
        if self._few is not None:
            self._few = [one for one in self._few if one not in self._known]
            return self._best_of(self._few, surrogate, num)
        pool = {*itertools.islice(self._drawn, FEW_ASKED // 4), *self._around(ranked[:num])}
        for _ in range(len(self.space.space.layers)):
            liked = self._best_of(sorted(pool - self._known.keys()), surrogate, num)
            pool |= (around := self._around(liked) - pool)
            if not around:
                break
        return self._best_of(sorted(pool - self._known.keys()), surrogate, num)

    def _around(self, configurations: list[Configuration]) -> set[Configuration]:
        found = [self.space.configurations(self.space.neighbours(one)) for one in configurations]
        return set(itertools.chain.from_iterable(found))

    def _best_of(self, pool: list[Configuration], surrogate: Surrogate, num: int) -> list[Configuration]:
        if not pool:
            return []
        mean, deviation = surrogate.predict(self.space.places(pool))
        return [pool[place] for place in np.argsort(-(mean + deviation), kind="stable")[:num]]


class Evolution(Strategy):
    """NSGA-II, by Optuna's sampler: accuracy up and every budgeted cost down (MACs where there is no budget)."""

    def __init__(self, space: BudgetedSpace, seed: int, *, population: int = 32) -> None:
        """Take the space and the size of a generation. Raises GrossRayError where Optuna is not installed."""
        super().__init__(space, seed)
        try:
            import optuna
        except ImportError:
            raise GrossRayError(
                "strategy evolution needs optuna: pip install 'gross-ray[optuna]', or take breadth-first"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        names = [budget.cost for budget in space.budgets] or [cost.name for cost in space.costs[:1]]
        self._costs = [cost for cost in space.costs if cost.name in names]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        directions = [up, *(down for _ in self._costs)]
        self._study = optuna.create_study(directions=directions, sampler=sampler)
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            layer: optuna.distributions.IntDistribution(0, len(sizes) - 1)
            for layer, sizes in space.space.group_sizes.items()
        }
        self._pending: dict[Configuration, list[optuna.Trial]] = {}
        self._drawn = _drawn(space, self._generator)

    def learn(self, accuracies: Mapping[Configuration, float]) -> None:
        """Take accuracies; those of others become members of the population's history too."""
        import optuna

        super().learn(accuracies)
        for one, accuracy in accuracies.items():
            places = self.space.places([one])
            values = [accuracy, *(float(cost.of_places(places)[0]) for cost in self._costs)]
            for trial in self._pending.pop(one, []):
                self._study.tell(trial, values)
                break
            else:
                self._study.add_trial(
                    optuna.create_trial(
                        params=dict(zip(self._distributions, places[0].tolist(), strict=True)),
                        distributions=self._distributions,
                        values=values,
                    )
                )

    def _candidates(self, num: int) -> Iterator[Configuration]:
        import optuna

        in_vain = 0
        while in_vain < MOST_ASKED:
            in_vain += 1
            trial = self._study.ask(self._distributions)
            places = np.array([[trial.params[layer] for layer in self._distributions]])
            one = self.space.configurations(places)[0]
            if not self.space.fits(places)[0]:
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)  # never evaluated
                continue
            accuracy = self._known.get(one)
            if accuracy is not None:
                self._study.tell(trial, [accuracy, *(float(cost.of_places(places)[0]) for cost in self._costs)])
                continue
            if one not in self._known and one not in self._pending:
                in_vain = 0
            self._pending.setdefault(one, []).append(trial)
            yield one
        yield from self._drawn


STRATEGIES: dict[str, type[Strategy]] = {
    "exhaustive": Exhaustive,
    "random": Random,
    "breadth-first": BreadthFirst,
    "evolution": Evolution,
    "surrogate": Surrogated,
}
"""Strategies by name."""


def strategy(name: str, space: BudgetedSpace, seed: int) -> Strategy:
    """Return the strategy called `name`; raises InvalidValueError, listing the names, if there is none."""
    if name not in STRATEGIES:
        raise InvalidValueError(f"strategy {name!r}: there are {', '.join(STRATEGIES)}")
    return STRATEGIES[name](space, seed)


def _drawn(space: BudgetedSpace, generator: np.random.Generator) -> Iterator[Configuration]:
    """Draw evenly without end where there are many; else all that fit, in an order that is drawn.

    No generator: `yield from` closes one when its own ends.
    """
    if space.most <= FEW:
        everything = list(space)
        return iter([everything[place] for place in generator.permutation(len(everything))])
    draws = (space.configurations(space.draw(256, generator)) for _ in itertools.count())
    return itertools.chain.from_iterable(draws)


def _starts(space: BudgetedSpace) -> list[Configuration]:
    """Return the uniform configurations that fit, the largest group-size first, or else the cheapest one."""
    sizes = sorted(set.intersection(*(set(each) for each in space.space.group_sizes.values())), reverse=True)
    uniform = [Configuration([size] * len(space.space.layers)) for size in sizes]
    fitting = [one for one, fits in zip(uniform, space.fits(space.places(uniform)), strict=True) if fits]
    if fitting:
        return fitting
    cheapest = space.costs[0].cheapest
    return [cheapest] if space.fits(space.places([cheapest])).all() else []
