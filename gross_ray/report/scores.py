"""Scores as text, and the configurations that are as good as the best, as far as their standard errors tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from gross_ray.report.searched import Searched
from gross_ray.search.budgets import Budget, RelativeBudget, readable_amount
from gross_ray.search.scores import Score
from gross_ray.search.selection import NearBest, best_under, near_best


def score_text(score: Score, row: pd.Series) -> str:
    """Return a configuration's score, and its standard error if it has one."""
    error = "" if pd.isna(row["standard_error"]) else f" ({score.text(row['standard_error'])})"
    return f"{score.text(row['score'])}{error}"


def score_head(accuracies: pd.DataFrame) -> str:
    """Return the head of a column of `score_text`."""
    return "in supernet (val)" if accuracies["standard_error"].isna().all() else "in supernet (val): score (s.e.)"


def score_sentences(searched: Searched) -> list[str]:
    """Return what a smoothed score is; nothing for other scores, or before the search."""
    if not searched.score.smoothed or searched.accuracies.empty:
        return []
    what = f"in supernet: {searched.score.over(searched.num_supernets)}"
    sure = not searched.accuracies["standard_error"].isna().all()
    return [f"{what}, with its standard error" if sure else f"{what}; a standard error needs several supernets"]


def near_sentence(best: pd.Series, near: NearBest, cost: str, score: Score) -> str:
    """Return how many configurations are within one standard error of the best, and the cheapest of them."""
    error, cheapest = score.text(best["standard_error"]), near.cheapest.iloc[0]
    return (
        f"within one standard error ({error}) of the best: {near.count} configuration{'s' * (near.count > 1)}; "
        f"the cheapest of them: {cheapest['configuration']} ({cost}={readable_amount(cost, cheapest[cost])})"
    )


def near_sentences(selections: pd.DataFrame, searched: Searched) -> list[str]:
    """Return, for each budget of `selections`, how many configurations are as good as the best, and the cheapest."""
    found: list[str] = []
    if searched.accuracies.empty:
        return found
    for name, amount in selections[["budget", "budget_macs"]].drop_duplicates().itertuples(index=False):
        others = searched.accuracies[searched.accuracies["configuration"] != name]
        budgets = [Budget("macs", amount)]
        best = best_under(others, budgets, 1)
        if (near := near_best_of(best, [others], budgets)) is not None:
            found.append(f"under {name}, {near_sentence(best.iloc[0], near, 'macs', searched.score)}")
    return found


def near_within(searched: Searched, budgets: Sequence[Budget | RelativeBudget], best: pd.DataFrame) -> NearBest | None:
    """Return `near_best_of` all evaluated configurations; the budgets of an answer are amounts."""
    return near_best_of(best, [searched.accuracies], [budget for budget in budgets if isinstance(budget, Budget)])


def near_best_of(best: pd.DataFrame, chunks: Iterable[pd.DataFrame], budgets: Sequence[Budget]) -> NearBest | None:
    """Return the configurations within one standard error of the first of `best`; None if it has no standard error."""
    return near_best(chunks, budgets, best.iloc[0]) if best["standard_error"].notna().any() else None
