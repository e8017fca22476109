"""Scores: the values by which configurations are ranked, from their accuracies in several supernets.

The paper takes the median accuracy over the supernets (Table 3). The most accurate of hundreds of configurations owes a
part of its rank to noise, so a score may also be smoothed over the space: a Gaussian process is fitted to all evaluated
configurations, and its mean at a configuration is the score (docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gross_ray.search.budgets import COSTS
from gross_ray.search.options import SCORES
from gross_ray.search.surrogate import Surrogate
from gross_ray.space import Configuration

if TYPE_CHECKING:
    from gross_ray.search.strategies import Strategy

MOST_FITTED = 1000
"""Maximum number of configurations to which the Gaussian process is fitted; of more, this many are drawn."""
BLOCK = 10_000
"""Number of configurations that are predicted at once."""
NOISES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""The grid of noise variances of a smoothed score, relative to the kernel's variance."""
DIGITS = 7
"""Decimals of a smoothed score and its error: rounding, which depends on what is computed together, must not decide."""
LAYER_COLUMN = "layer "
"""Start of the name of a layer's column in the table `configurations`."""
SCORED_COLUMNS = ("configuration", *COSTS, "supernet_accuracy", "num_supernets", "score", "standard_error")
"""The columns of `scored`."""

# Shapes: N configurations, L layers, K supernets.


@dataclass(frozen=True)
class Score:
    """A value of `search.score`: a statistic over the supernets, smoothed over the space or not."""

    name: str

    def __post_init__(self) -> None:
        assert self.name in SCORES

    @property
    def smoothed(self) -> bool:
        """Whether the statistic is smoothed over the space."""
        return self.name.startswith("smoothed-")

    @property
    def statistic(self) -> str:
        """Return mean, median or loss (the mean loss, negative: a higher score is better)."""
        return self.name.removeprefix("smoothed-")

    @property
    def column(self) -> str:
        """The column of the table `configurations` from which the score follows."""
        return "val_accuracy" if self.of_accuracy else "val_loss"

    @property
    def of_accuracy(self) -> bool:
        """Whether the score is an accuracy; if not, it is minus a loss."""
        return self.statistic != "loss"

    @property
    def scale(self) -> float:
        """Factor of a score in figures and texts: accuracies are in percent there."""
        return 100.0 if self.of_accuracy else 1.0

    @property
    def unit(self) -> str:
        """Unit printed after a score."""
        return " %" if self.of_accuracy else ""

    @property
    def digits(self) -> int:
        """Decimals of a score in figures and texts."""
        return 2 if self.of_accuracy else 4

    @property
    def title(self) -> str:
        """Title of an axis in the unit of `scale`."""
        return "accuracy in the supernet, % (val)" if self.of_accuracy else "minus the loss in the supernet (val)"

    def over(self, num_supernets: int) -> str:
        """Return what the score is, like "mean accuracy over 3 supernets, smoothed over the space"."""
        what = f"{self.statistic} accuracy" if self.of_accuracy else "minus the mean loss"
        plural = "s" if num_supernets > 1 else ""
        return f"{what} over {num_supernets} supernet{plural}{', smoothed over the space' if self.smoothed else ''}"

    def text(self, value: float) -> str:
        """Return a score as text, in the unit of `scale`."""
        return f"{self.scale * value:.{self.digits}f}"

    def of_supernets(self, values: np.ndarray) -> np.ndarray:
        """Return the statistic of N configurations, (N,), from the values of `column` in each supernet, (N, K).

        NaN marks a supernet in which a configuration was not evaluated.
        """
        statistic = np.nanmedian if self.statistic == "median" else np.nanmean
        return np.asarray(statistic(self.signed(values), axis=1))

    def signed(self, values: np.ndarray) -> np.ndarray:
        """Return values of `column` so that a higher one is better."""
        return values if self.of_accuracy else -values


def scored(rows: pd.DataFrame, score: Score, smoothing: Smoothing | None = None) -> pd.DataFrame:
    """Return one row per configuration: its costs, `supernet_accuracy`, `num_supernets`, `score`, `standard_error`.

    `rows` are of the table `configurations`, with the rows of all supernets for each configuration; accuracies are on
    the validation split. `supernet_accuracy` is the median over the supernets. A smoothed score needs `smoothing`; the
    standard error of another score is NaN, and so is that of every score if `smoothing` is None.
    """
    codes, _ = pd.factorize(rows["configuration"])
    _, first = np.unique(codes, return_index=True)
    costs = rows[["configuration", *COSTS]].iloc[first].reset_index(drop=True)
    # A latency counts only if the rows of all supernets have it.
    costs.loc[np.unique(codes[rows["latency_ms"].isna()]), "latency_ms"] = math.nan
    frame = costs.assign(
        supernet_accuracy=rows["val_accuracy"].groupby(codes).median(),
        num_supernets=np.bincount(codes, minlength=len(costs)),
    )
    values = score.of_supernets(by_supernet(rows, score, np.unique(rows["seed"])))
    if smoothing is None:
        return frame.assign(score=values, standard_error=math.nan)
    values, errors = smoothing.predict(group_sizes(rows)[first], values)
    return frame.assign(score=values, standard_error=errors)


def by_supernet(rows: pd.DataFrame, score: Score, seeds: np.ndarray) -> np.ndarray:
    """Return the values of the score's column, (N, K), in the order of the configurations' first rows.

    `seeds` are those of the K supernets, ascending. NaN marks a supernet in which a configuration was not
    evaluated.
    """
    codes, names = pd.factorize(rows["configuration"])
    values = np.full((len(names), len(seeds)), math.nan)
    values[codes, np.searchsorted(seeds, rows["seed"])] = rows[score.column]
    return values


def group_sizes(rows: pd.DataFrame) -> np.ndarray:
    """Return the columns of the layers as an array, (N, L) int64: group-sizes, 0 for the dense convolution."""
    layers = [name for name in rows.columns if name.startswith(LAYER_COLUMN)]
    return rows[layers].to_numpy(np.int64)


class Scoreboard:
    """The configurations that a search has evaluated so far: their statistics, and their scores among the others."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._values: dict[Configuration, np.ndarray] = {}

    def add(self, configurations: Sequence[Configuration], values: np.ndarray) -> dict[Configuration, float]:
        """Add evaluations: `values` of the score's column, (N, K). Return the statistics, not smoothed."""
        self._values |= zip(configurations, values, strict=True)
        return dict(zip(configurations, self._score.of_supernets(values).tolist(), strict=True))

    def scores(self) -> dict[Configuration, float]:
        """Return the scores of all that were added; smoothed scores change with each evaluation."""
        configurations, values = list(self._values), np.stack([*self._values.values()])
        if not self._score.smoothed or len(configurations) < 2:
            return dict(zip(configurations, self._score.of_supernets(values).tolist(), strict=True))
        chosen = np.array(configurations)
        scores, _ = Smoothing.of(chosen, values, self._score).predict(chosen, self._score.of_supernets(values))
        return dict(zip(configurations, scores.tolist(), strict=True))

    def teach(self, strategies: Sequence[Strategy], statistics: dict[Configuration, float]) -> None:
        """Let strategies learn the last evaluations, whose `statistics` `add` returned, by the scores of all.

        A strategy that smooths on its own learns the statistics, so that they are not smoothed twice.
        """
        smoothing = self._score.smoothed and any(each.ranks and not each.smooths for each in strategies)
        scores = self.scores() if smoothing else statistics
        for each in strategies:
            each.learn(statistics if each.smooths else scores)


@dataclass(frozen=True)
class Smoothing:
    """A Gaussian process fitted to the statistics of evaluated configurations in K supernets."""

    sizes: tuple[np.ndarray, ...]
    """The choices of each layer that were evaluated, ascending; the dense convolution (0) is the last one."""
    surrogate: Surrogate
    fitted: frozenset[bytes]
    """The configurations to which the process is fitted."""
    between: float
    """Variance of a smoothed score that comes from the choice of supernets; NaN for a single one."""
    flat: bool
    """Whether all fitted configurations have the same statistic: then so have all others, without an error."""

    @classmethod
    def of(cls, chosen: np.ndarray, values: np.ndarray, score: Score) -> Smoothing:
        """Fit to N configurations: `chosen` group-sizes (N, L), `values` of the score's column in K supernets (N, K).

        Configurations that were not evaluated in all supernets (NaN) are left out; two or more must remain. What one
        supernet adds to all configurations changes no rank, so it counts neither for the scores' differences nor for
        their standard errors. A single supernet does not tell how much another one would differ, so then standard
        errors are NaN.
        """
        order = np.lexsort(chosen.T[::-1])
        order = order[~np.isnan(values[order]).any(axis=1)]
        if len(order) > MOST_FITTED:
            order = order[np.sort(np.random.default_rng(0).permutation(len(order))[:MOST_FITTED])]
        sizes = tuple(_ascending(np.unique(column)) for column in chosen.T)
        indices = _indices(chosen[order], sizes)
        fitted, statistics = score.signed(values[order]), score.of_supernets(values[order])
        surrogate = Surrogate.of(indices, statistics, noises=NOISES)
        between, num_supernets = math.nan, values.shape[1]
        if num_supernets > 1:
            deviations = fitted - fitted.mean(axis=1, keepdims=True)
            smooth = surrogate.smooth(deviations - deviations.mean(axis=0))
            between = float(smooth.var(axis=1, ddof=1).mean()) / num_supernets
        return cls(sizes, surrogate, frozenset(_keys(indices)), between, bool(np.ptp(statistics) == 0))

    def predict(self, chosen: np.ndarray, statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores of N configurations (N, L) and their standard errors, (N,) each.

        `statistics` are those over the supernets, (N,). The process knows those of the fitted configurations; for
        another one it is combined with the process's prediction, each weighted by the other's variance. A standard
        error combines what the process does not know with the differences between supernets. It compares
        configurations on these validation images; other images would add an error of their own.
        """
        parts = [slice(start, start + BLOCK) for start in range(0, len(chosen), BLOCK)]
        found = [self._predict(chosen[part], statistics[part]) for part in parts]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([errors for _, errors in found])

    def _predict(self, chosen: np.ndarray, statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = _indices(chosen, self.sizes)
        mean, deviation = self.surrogate.predict(indices, noise=False)
        variance = np.zeros_like(mean) if self.flat else deviation**2
        new = np.array([key not in self.fitted for key in _keys(indices)])
        share = np.where(new, variance / (variance + self.surrogate.noise_variance), 0.0)
        scores = mean + share * (statistics - mean)
        return scores.round(DIGITS), np.sqrt(variance * (1 - share) + self.between).round(DIGITS)


def _keys(indices: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in indices.astype(np.uint8)]


def _ascending(sizes: np.ndarray) -> np.ndarray:
    return np.roll(sizes, -1) if sizes[0] == 0 else sizes


def _indices(chosen: np.ndarray, sizes: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the index of each choice among those of its layer, (N, L)."""
    columns = [(column[:, None] == each).argmax(axis=1) for column, each in zip(chosen.T, sizes, strict=True)]
    return np.stack(columns, axis=1)
