"""Search strategies: which configurations of a large space to evaluate.

A strategy proposes configurations that fit the budgets and learns from their accuracies; it never proposes one that it
proposed or learned before. Its proposals depend only on its seed and on the calls of `propose` and `learn`, so a search
resumes by repeating these calls.
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
from gross_ray.space import Configuration, ordered

FEW = 100_000
"""A space with at most this many configurations is listed and shuffled; a larger one is drawn from."""
FEW_ASKED = 8192
"""The surrogate predicts all configurations if no more than this fit; else a sample and neighbours of the best."""
LEAST_DRAWN = 16
"""Configurations proposed before the surrogate is fitted; more if the layers have more group-sizes in all."""
MOST_FITTED = 1000
"""The most accuracies that the surrogate is fitted to; half of them are the best."""
MOST_REPEATS = 20
"""A strategy stops after this many times FEW known configurations in a row."""
MOST_ASKED = 32
"""After this many proposals of NSGA-II in a row that are known or do not fit, the rest of a batch is drawn."""


class Strategy(ABC):
    """Proposes configurations that fit the budgets, each once, and learns their accuracies."""

    ranks = True
    """Whether proposals depend on the scores of what was evaluated."""
    smooths = False
    """Whether the strategy smooths the scores on its own."""

    def __init__(self, space: BudgetedSpace, seed: int) -> None:
        self.space = space
        self._generator = np.random.default_rng(seed)
        self._known: dict[Configuration, float | None] = {}

    def propose(self, num: int) -> list[Configuration]:
        """Return up to `num` new configurations, sorted as the space is (so they share prefixes); empty at the end."""
        new = list(itertools.islice(self._new(num), num))
        self._known |= dict.fromkeys(new)
        return sorted(new)

    def learn(self, accuracies: Mapping[Configuration, float]) -> None:
        """Record scores (higher is better) of proposed configurations, or of any others; later ones replace them."""
        self._known |= accuracies

    @abstractmethod
    def _candidates(self, num: int) -> Iterator[Configuration]:
        """Yield configurations that fit, in the order to try, until about `num` of them are new."""

    def _new(self, num: int) -> Iterator[Configuration]:
        proposed: set[Configuration] = set()
        repeats = 0
        for candidate in self._candidates(num):
            repeats += 1
            if candidate not in self._known and candidate not in proposed:
                proposed.add(candidate)
                repeats = 0
                yield candidate
            elif repeats == MOST_REPEATS * FEW:
                return

    @property
    def _evaluated(self) -> dict[Configuration, float]:
        return {name: accuracy for name, accuracy in self._known.items() if accuracy is not None}


class Exhaustive(Strategy):
    """Proposes all configurations that fit, in the order of the space."""

    ranks = False

    def __init__(self, space: BudgetedSpace, seed: int = 0) -> None:
        super().__init__(space, seed)
        self._rest = iter(space)

    def _candidates(self, num: int) -> Iterator[Configuration]:
        return self._rest


class Random(Strategy):
    """Draws uniformly from all that fit, without replacement: the baseline of the other strategies."""

    ranks = False

    def __init__(self, space: BudgetedSpace, seed: int) -> None:
        super().__init__(space, seed)
        self._drawn = _drawn(space, self._generator)

    def _candidates(self, num: int) -> Iterator[Configuration]:
        return self._drawn


class BreadthFirst(Strategy):
    """Starts from the uniform configurations and changes one layer's group-size at a time, around the best ones first.

    The search of the paper's later version. The frontier is the `width` most accurate evaluated configurations with
    unknown neighbours. If no evaluated configuration has any, it draws configurations.
    """

    def __init__(self, space: BudgetedSpace, seed: int, *, width: int = 4) -> None:
        super().__init__(space, seed)
        if width < 1:
            raise InvalidValueError(f"width = {width}: must be 1 or more configurations")
        self._width = width
        self._starts = _starts(space)
        self._closed: set[Configuration] = set()
        self._drawn = _drawn(space, self._generator)

    def _candidates(self, num: int) -> Iterator[Configuration]:
        yield from self._starts
        evaluated = self._evaluated
        ranked = iter(sorted(evaluated.keys() - self._closed, key=lambda name: (-evaluated[name], name)))
        while frontier := list(itertools.islice(ranked, self._width)):
            of_each = [self._new_neighbours(configuration) for configuration in frontier]
            yield from (each for group in itertools.zip_longest(*of_each) for each in group if each is not None)
        yield from self._drawn

    def _new_neighbours(self, configuration: Configuration) -> list[Configuration]:
        new = [neighbour for neighbour in self.space.neighbours(configuration) if neighbour not in self._known]
        if not new:
            self._closed.add(configuration)
        return new


class Surrogated(Strategy):
    """Proposes the configurations of the highest upper confidence bound of a Gaussian process; the one to try first.

    It starts with the uniform configurations and drawn ones. In a large space, the process predicts drawn
    configurations and neighbours of the best so far, then neighbours of the configurations with the highest bound.
    """

    smooths = True

    def __init__(self, space: BudgetedSpace, seed: int) -> None:
        super().__init__(space, seed)
        self._starts = _starts(space)
        self._drawn = _drawn(space, self._generator)
        self._few = list(space) if space.size_bound <= FEW_ASKED else None

    def _candidates(self, num: int) -> Iterator[Configuration]:
        yield from self._starts
        evaluated = self._evaluated
        enough = max(LEAST_DRAWN, sum(len(sizes) - 1 for sizes in self.space.space.group_sizes.values()))
        if len(self._known) >= enough and len(evaluated) > 1:
            yield from self._most_promising(num, evaluated)
        yield from self._drawn

    def _most_promising(self, num: int, evaluated: dict[Configuration, float]) -> list[Configuration]:
        """Return the `num` unknown configurations with the highest mean plus standard deviation."""
        ranked = sorted(evaluated, key=lambda name: (-evaluated[name], name))
        fitted = ranked[: MOST_FITTED // 2]
        others = ranked[MOST_FITTED // 2 :]
        fitted += [others[index] for index in self._generator.permutation(len(others))[: MOST_FITTED // 2]]
        surrogate = Surrogate.of(self.space.indices(fitted), np.array([evaluated[name] for name in fitted]))
        if self._few is not None:
            self._few = [name for name in self._few if name not in self._known]
            return self._best_of(self._few, surrogate, num)
        pool = {*itertools.islice(self._drawn, FEW_ASKED // 4), *self._around(ranked[:num])}
        for _ in range(len(self.space.space.layers)):
            best = self._best_of(sorted(pool - self._known.keys()), surrogate, num)
            pool |= (around := self._around(best) - pool)
            if not around:
                break
        return self._best_of(sorted(pool - self._known.keys()), surrogate, num)

    def _around(self, configurations: list[Configuration]) -> set[Configuration]:
        return set(itertools.chain.from_iterable(map(self.space.neighbours, configurations)))

    def _best_of(self, pool: list[Configuration], surrogate: Surrogate, num: int) -> list[Configuration]:
        if not pool:
            return []
        mean, deviation = surrogate.predict(self.space.indices(pool))
        return [pool[index] for index in np.argsort(-(mean + deviation), kind="stable")[:num]]


class Evolution(Strategy):
    """NSGA-II, by Optuna's sampler: maximises accuracy and minimises every budgeted cost (MACs without budgets)."""

    def __init__(self, space: BudgetedSpace, seed: int, *, population: int = 32) -> None:
        """Set up the study; `population` is the size of a generation. Raises GrossRayError without Optuna."""
        super().__init__(space, seed)
        try:
            import optuna
        except ImportError:
            raise GrossRayError(
                "strategy evolution needs optuna: pip install 'gross-ray[optuna]', or use breadth-first"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        names = [budget.cost for budget in space.budgets] or [cost.name for cost in space.costs[:1]]
        self._costs = [cost for cost in space.costs if cost.name in names]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        self._study = optuna.create_study(directions=[up, *(down for _ in self._costs)], sampler=sampler)
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            layer: optuna.distributions.IntDistribution(0, len(sizes) - 1)
            for layer, sizes in space.space.group_sizes.items()
        }
        self._pending: dict[Configuration, list[optuna.Trial]] = {}
        self._drawn = _drawn(space, self._generator)

    def learn(self, accuracies: Mapping[Configuration, float]) -> None:
        """Record scores; configurations that were not proposed join the population's history too.

        A trial keeps the score with which it was learned first.
        """
        import optuna

        new = {name: accuracy for name, accuracy in accuracies.items() if self._known.get(name) is None}
        super().learn(accuracies)
        for configuration, accuracy in new.items():
            indices = self.space.indices([configuration])
            values = self._values(accuracy, indices)
            if trials := self._pending.pop(configuration, []):
                self._study.tell(trials[0], values)
                continue
            params = dict(zip(self._distributions, indices[0].tolist(), strict=True))
            trial = optuna.create_trial(params=params, distributions=self._distributions, values=values)
            self._study.add_trial(trial)

    def _values(self, accuracy: float, indices: np.ndarray) -> list[float]:
        return [accuracy, *(float(cost.of_indices(indices)[0]) for cost in self._costs)]

    def _candidates(self, num: int) -> Iterator[Configuration]:
        import optuna

        repeats = 0
        while repeats < MOST_ASKED:
            repeats += 1
            trial = self._study.ask(self._distributions)
            indices = np.array([[trial.params[layer] for layer in self._distributions]])
            configuration = self.space.configurations(indices)[0]
            if not self.space.fits(indices)[0]:
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)  # never evaluated
                continue
            accuracy = self._known.get(configuration)
            if accuracy is not None:
                self._study.tell(trial, self._values(accuracy, indices))
                continue
            if configuration not in self._known and configuration not in self._pending:
                repeats = 0
            self._pending.setdefault(configuration, []).append(trial)
            yield configuration
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
    """Return the strategy called `name`; raises InvalidValueError for an unknown name."""
    if name not in STRATEGIES:
        raise InvalidValueError(f"strategy {name!r}: must be one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](space, seed)


def _drawn(space: BudgetedSpace, generator: np.random.Generator) -> Iterator[Configuration]:
    """Iterate over all that fit in random order, or in a large space draw uniformly without end.

    This is no generator function: a generator would be closed when a `yield from` over it is.
    """
    if space.size_bound <= FEW:
        everything = list(space)
        return iter([everything[index] for index in generator.permutation(len(everything))])
    draws = (space.configurations(space.draw(256, generator)) for _ in itertools.count())
    return itertools.chain.from_iterable(draws)


def _starts(space: BudgetedSpace) -> list[Configuration]:
    """Return the uniform configurations that fit, the largest group-size first; if none does, the cheapest one."""
    sizes = ordered(set.intersection(*(set(each) for each in space.space.group_sizes.values())))[::-1]
    uniform = [Configuration([size] * len(space.space.layers)) for size in sizes]
    for candidates in (uniform, [space.costs[0].cheapest]):
        fits = space.fits(space.indices(candidates))
        if fits.any():
            return list(itertools.compress(candidates, fits))
    return []
