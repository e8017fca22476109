"""Rank correlation between the accuracy in the supernet and the accuracy after training alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats

from gross_ray.errors import InvalidValueError

_DIGITS = 12
"""Accuracies are quotients of whole numbers: those that agree in this many decimals are equal."""


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Rank correlation of two accuracies over configurations, with bootstrap intervals."""

    num_configurations: int
    """Configurations that have both accuracies."""
    spearman: float
    """Spearman's rho, ties at their mean rank."""
    spearman_low: float
    """Lower end of rho's interval."""
    spearman_high: float
    """Upper end of rho's interval."""
    kendall: float
    """Kendall's tau-b, which accounts for ties."""
    kendall_low: float
    """Lower end of tau's interval."""
    kendall_high: float
    """Upper end of tau's interval."""
    num_resamples: int
    """Resamples used for the intervals: those in which neither accuracy is constant."""


def rank_correlation(
    supernet: pd.Series,
    retrained: pd.Series,
    *,
    generator: torch.Generator,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> RankCorrelation:
    """Return the rank correlation of two accuracies over the configurations, the index, that both series have.

    The intervals are percentile bootstraps: configurations are drawn with replacement `num_resamples` times. Resamples
    in which one accuracy is constant have no rank correlation and are left out; with few configurations this makes the
    interval too narrow. The order of rows does not matter. Raises InvalidValueError for fewer than three common
    configurations, or if one of the accuracies is the same for all of them.
    """
    both = pd.concat({"supernet": supernet, "retrained": retrained}, axis=1, join="inner").dropna().sort_index()
    if len(both) < 3:
        raise InvalidValueError(
            f"rank correlation of {len(both)} configurations: it needs 3 or more that have both accuracies; "
            "validate more (search.top, validation.fixed)"
        )
    ours, theirs = both.to_numpy(dtype=float).round(_DIGITS).T
    if _constant(ours) or _constant(theirs):
        raise InvalidValueError(
            f"rank correlation of {len(both)} configurations: all are equally accurate "
            f"{'in the supernet' if _constant(ours) else 'on their own'}, so they have no ranks; "
            "train longer or measure on more images"
        )
    drawn = torch.randint(len(both), (num_resamples, len(both)), generator=generator).numpy()
    drawn = drawn[~_constant(ours[drawn]) & ~_constant(theirs[drawn])]
    if not len(drawn):
        raise InvalidValueError(f"num_resamples={num_resamples}: every resample is constant on one side; draw more")
    rho, tau = _spearman(ours[drawn], theirs[drawn]), _kendall(ours[drawn], theirs[drawn])
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    (rho_low, rho_high), (tau_low, tau_high) = np.quantile(rho, ends), np.quantile(tau, ends)
    return RankCorrelation(
        num_configurations=len(both),
        spearman=float(_spearman(ours, theirs)),
        spearman_low=float(rho_low),
        spearman_high=float(rho_high),
        kendall=float(_kendall(ours[None], theirs[None])[0]),
        kendall_low=float(tau_low),
        kendall_high=float(tau_high),
        num_resamples=len(drawn),
    )


def _constant(values: np.ndarray) -> np.ndarray:
    """Return for each row (..., n) whether all its values are equal."""
    return (values == values[..., :1]).all(axis=-1)


def _spearman(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return Spearman's rho of each row (..., n), as stats.spearmanr computes it, for all rows at once."""
    ranks = [stats.rankdata(values, axis=-1) for values in (ours, theirs)]
    x, y = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    rho = (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.clip(rho, -1, 1)  # rounding may exceed the range slightly


def _kendall(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return tau-b of each row (rows, n); "asymptotic" avoids the slow exact p-value, which is not needed."""
    pairs = zip(ours, theirs, strict=True)
    return np.array([stats.kendalltau(x, y, method="asymptotic").statistic for x, y in pairs])
