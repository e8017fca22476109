"""Whether the supernet ranks configurations as training them on their own does: rank correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats

from gross_ray.errors import InvalidValueError

_DIGITS = 12
"""Accuracies are quotients of whole numbers; what differs only beyond this digit is equal."""


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Rank correlation of two accuracies over configurations, with bootstrap intervals."""

    num_configurations: int
    """Configurations that have both accuracies."""
    spearman: float
    """Spearman's rho, ties at their mean rank."""
    spearman_low: float
    """Lower end of its interval."""
    spearman_high: float
    """Upper end of its interval."""
    kendall: float
    """Kendall's tau-b, which accounts for ties."""
    kendall_low: float
    """Lower end of its interval."""
    kendall_high: float
    """Upper end of its interval."""
    num_resamples: int
    """Resamples that the intervals rest on: without those in which one of the accuracies is constant."""


def rank_correlation(
    supernet: pd.Series,
    retrained: pd.Series,
    *,
    generator: torch.Generator,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> RankCorrelation:
    """Return the rank correlation of the accuracies that both series hold, by the configuration in their index.

    The intervals are percentile bootstraps: configurations are drawn with replacement `num_resamples` times. Where a
    resample holds one value only on either side, a rank correlation is undefined: it is left out, which with few
    configurations leaves an interval that is too narrow. The order of rows does not matter. Raises InvalidValueError
    for fewer than three common configurations, or if one side is the same for all of them.
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
    """Return for each row (..., n) whether it holds one value only."""
    return (values == values[..., :1]).all(axis=-1)


def _spearman(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the correlation of the ranks, row by row (..., n): what stats.spearmanr gives, for all rows at once."""
    ranks = [stats.rankdata(values, axis=-1) for values in (ours, theirs)]
    x, y = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    rho = (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.clip(rho, -1, 1)  # rounding may pass the ends by a bit


def _kendall(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return tau-b, row by row (rows, n); its p-value, slow to compute exactly, is of no use here."""
    pairs = zip(ours, theirs, strict=True)
    return np.array([stats.kendalltau(x, y, method="asymptotic").statistic for x, y in pairs])
