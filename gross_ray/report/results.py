"""The paper's Tables 2 and 3 and the numbers of its Figure 1, from stored tables, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from scipy import stats

from gross_ray.errors import InvalidValueError, MissingStageError
from gross_ray.report.scores import near_sentence, near_sentences, near_within, score_head, score_sentences, score_text
from gross_ray.report.searched import Searched
from gross_ray.run.latencies import unit_in_force
from gross_ray.run.limits import budget_amounts
from gross_ray.run.progress import stored_plans
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import Budget, RelativeBudget, parse_budgets
from gross_ray.search.correlation import RankCorrelation, rank_correlation
from gross_ray.search.options import RUNTIMES
from gross_ray.search.scores import Score
from gross_ray.search.selection import NearBest, best_under
from gross_ray.seeds import derived_generator
from gross_ray.space import Configuration
from gross_ray.training.sampling import settled_scaling

SHOWN = ("val", "test")
"""The splits whose accuracies are shown."""
LEAST_RANKED = 5
"""Minimum number of configurations for an interval of their rank correlation: fewer allow too few resamples."""

FIXED, SELECTED, NAMED = "fixed", "selected", "also trained"
"""Why a run trains a configuration: to compare with it, because the search found it, or as it was named or drawn."""


@dataclass(frozen=True)
class ResultTable:
    """A table for people: all cells are texts, and the first cell of a row is its head."""

    title: str
    heads: Sequence[str] = ()
    """Empty if nothing is stored for the table yet."""
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    """Lines beneath the table."""
    missing: Sequence[str] = ()
    """The results that are not stored yet, each with the command that makes it."""


def network_table(store: RunStore) -> ResultTable:
    """Return Table 2: the full network and the fixed configurations, accuracy on the test split and MACs."""
    networks, validations = store.read_table("networks"), store.read_table("validations")
    title = "Full network and fixed configurations (test split, Table 2)"
    if networks.empty:
        return ResultTable(title, missing=["run `gross train`"])
    rows = [["full", *_accuracy(networks["test_accuracy"]), millions(networks["macs"].iloc[0])]]
    fixed = validations[validations["kind"] == "fixed"]
    for configuration, group in fixed.sort_values("macs", ascending=False).groupby("configuration", sort=False):
        rows.append([f"fixed {configuration}", *_accuracy(group["test_accuracy"]), millions(group["macs"].iloc[0])])
    heads = ["network", "median", "mean (std, n)", "M MACs"]
    options = store.experiment
    missing = [
        *_lacking(options.training.seeds - len(networks), options.training.seeds, "base networks (run `gross train`)"),
        *_lacking_trainings(
            fixed, len({*options.validation.fixed, *options.search.budgets}), store, "fixed configurations"
        ),
    ]
    return ResultTable(title, heads, rows, missing=missing)


def main_tables(store: RunStore, searched: Searched) -> list[ResultTable]:
    """Return Tables 2 and 3, the best within each limit, and the named configurations, as far as there are any."""
    by_fixed = [selection_table(store, searched)] if store.experiment.search.budgets else []
    named = named_table(store, searched)
    others = [named] if named.rows or named.missing else []
    return [network_table(store), *by_fixed, *limit_tables(store, searched), *others]


def selection_table(store: RunStore, searched: Searched | None = None) -> ResultTable:
    """Return Table 3: the fixed and the selected configurations of each budget, in the supernet and on their own.

    Its note is the rank correlation of both accuracies over all validated configurations. Latencies have a column if
    they are stored. `searched` is read from the run folder if it is not passed.
    """
    selections, validations = selected(store), store.read_table("validations")
    title = "Selected under the budget of a fixed configuration (Table 3)"
    if selections.empty:
        return ResultTable(title, missing=["run `gross search`"])
    searched = searched or Searched.of(store)
    supernet = searched.accuracies.set_index("configuration")
    shown = {*selections["budget"], *selections["configuration"]}
    if not shown <= set(supernet.index):
        return ResultTable(title, missing=["evaluated configurations (run `gross search`)"])
    timed = supernet.loc[sorted(shown), "latency_ms"].notna().all()
    rows = []
    for budget, group in selections.groupby("budget", sort=False):
        fixed = validations[validations["configuration"] == budget]["test_accuracy"]
        for configuration in [budget, *group["configuration"]]:
            own = validations[validations["configuration"] == configuration]["test_accuracy"]
            chosen = configuration != budget
            difference = difference_text(own, fixed) if chosen and len(own) and len(fixed) else "-"
            rows.append(
                [
                    str(configuration) if chosen else f"{configuration} (fixed)",
                    millions(supernet.loc[configuration, "macs"]),
                    *([f"{supernet.loc[configuration, 'latency_ms']:.3f}"] if timed else []),
                    score_text(searched.score, supernet.loc[configuration]),
                    _accuracy(own)[1],
                    difference,
                ]
            )
    costs = ["M MACs", "ms"] if timed else ["M MACs"]
    heads = ["configuration", *costs, score_head(supernet), "on its own (test): mean (std, n)", "to fixed (p)"]
    own = validations[validations["configuration"].isin(shown)]
    notes = near_sentences(selections, searched) + score_sentences(searched)
    notes += [] if validations.empty else [correlation_sentence(store, supernet["score"], validations)]
    return ResultTable(
        title,
        heads,
        rows,
        notes=[*notes, *(latency_sentences(store) if timed else [])],
        missing=_lacking_trainings(own, len(shown), store, "these configurations"),
    )


def difference_text(accuracies: pd.Series, others: pd.Series) -> str:
    """Return how many points the mean of `accuracies` is above that of `others`, with the p-value if there is one.

    The p-value is that of Welch's two-sided t-test, which needs two repeats of each, and a spread.
    """
    difference = f"{100 * (accuracies.mean() - others.mean()):+.2f}"
    if min(len(accuracies), len(others)) < 2 or not (accuracies.std() or others.std()):
        return difference
    numbers = [number for each in (accuracies, others) for number in (each.mean(), each.std(), len(each))]
    p = float(stats.ttest_ind_from_stats(*numbers, equal_var=False).pvalue)
    return f"{difference} ({'<0.001' if p < 0.001 else f'{p:.3f}'})"


def named_table(store: RunStore, searched: Searched) -> ResultTable:
    """Return the configurations trained on their own that are neither fixed nor found under a budget or limit."""
    validations, kinds = store.read_table("validations"), kinds_of(store, searched)
    others = validations[validations["configuration"].map(kinds) == NAMED]
    rows = [
        [str(name), millions(group["macs"].iloc[0]), *(_accuracy(group[f"{split}_accuracy"])[1] for split in SHOWN)]
        for name, group in others.sort_values("macs", ascending=False).groupby("configuration", sort=False)
    ]
    heads = ["configuration", "M MACs", *(f"on its own ({split}): mean (std, n)" for split in SHOWN)]
    missing = _lacking_drawn(store, kinds) if store.experiment.validation.drawn else []
    return ResultTable("Also trained on their own", heads if rows else (), rows, missing=missing)


def _lacking_drawn(store: RunStore, kinds: dict[str, str]) -> list[str]:
    """Return how many planned trainings of drawn configurations are missing."""
    planned = [unit for units in (stored_plans(store) or {}).get("validate") or () for unit in units]
    fixed = {str(size) for size in (*store.experiment.validation.fixed, *store.experiment.search.budgets)}
    drawn = []
    for unit in planned:
        sizes = {*unit.partition(",")[0].split("-")}
        is_fixed = len(sizes) == 1 and sizes <= fixed
        if not is_fixed and kinds.get(unit.partition(",")[0], NAMED) == NAMED:
            drawn.append(unit)
    stored = store.finished_units("validations")
    return _lacking(len({*drawn} - stored), len(drawn), "trainings of drawn configurations (run `gross validate`)")


def kinds_of(store: RunStore, searched: Searched) -> dict[str, str]:
    """Return the kind of each configuration: fixed, selected (under a budget or limit), or only validated."""
    validations, selections = store.read_table("validations", ["configuration", "kind"]), selected(store)
    kinds = dict.fromkeys(validations["configuration"], NAMED)
    for _, best in _within_limits(store, searched):
        kinds |= {} if isinstance(best, str) else dict.fromkeys(best["configuration"], SELECTED)
    kinds |= dict.fromkeys(selections["configuration"], SELECTED)
    fixed = validations.loc[validations["kind"] == FIXED, "configuration"]
    return kinds | dict.fromkeys([*selections["budget"], *fixed], FIXED)


def budget_table(
    best: pd.DataFrame, budgets: Sequence[Budget | RelativeBudget], score: Score, near: NearBest | None
) -> ResultTable:
    """Return the result of `best_under` as a table, the best configuration first; a note has those as good as it."""
    columns = {
        "rank": [str(rank) for rank in range(1, len(best) + 1)],
        **cost_columns(best, {budget.cost for budget in budgets}, score),
    }
    notes = [] if near is None else [near_sentence(best.iloc[0], near, budgets[0].cost, score)]
    return ResultTable(_within(budgets), list(columns), list(zip(*columns.values(), strict=True)), notes)


def near_candidates(store: RunStore, searched: Searched) -> list[str]:
    """Return, for each of the experiment's limits, how many configurations are as good as the best within it."""
    found = []
    for budgets, best in _within_limits(store, searched):
        if not isinstance(best, str) and (near := near_within(searched, budgets, best)) is not None:
            sentence = near_sentence(best.iloc[0], near, budgets[0].cost, searched.score)
            found.append(f"in the supernet, {sentence}")
    return found


def limit_tables(store: RunStore, searched: Searched | None = None) -> list[ResultTable]:
    """Return a table of the best evaluated configurations within each of the experiment's limits.

    The notes of the last table are the rank correlation, unless `selection_table` has it, and the source of latencies.
    """
    if not store.experiment.search.limits:
        return []
    tables, validations = [], store.read_table("validations")
    searched = searched or Searched.of(store)
    for budgets, best in _within_limits(store, searched):
        if isinstance(best, str):
            tables.append(ResultTable(_within(budgets), missing=[best]))
            continue
        table = budget_table(best, budgets, searched.score, near_within(searched, budgets, best))
        own = [
            _accuracy(validations.loc[validations["configuration"] == name, "test_accuracy"])[1]
            for name in best["configuration"]
        ]
        rows = [[*row, accuracy] for row, accuracy in zip(table.rows, own, strict=True)]
        theirs = validations[validations["configuration"].isin(best["configuration"])]
        missing = _lacking_trainings(theirs, len(best), store, "these configurations")
        heads = [*table.heads, "on its own (test): mean (std, n)"]
        tables.append(replace(table, heads=heads, rows=rows, missing=[*searched.missing(store), *missing]))
    if tables and tables[-1].rows:
        supernet = searched.accuracies.set_index("configuration")["score"]
        ranked = len(validations) and not store.experiment.search.budgets
        notes = [correlation_sentence(store, supernet, validations)] if ranked else []
        timed = searched.accuracies["latency_ms"].notna().all()
        notes = [*tables[-1].notes, *score_sentences(searched), *notes, *(latency_sentences(store) if timed else [])]
        tables[-1] = replace(tables[-1], notes=notes)
    return tables


def _within_limits(
    store: RunStore, searched: Searched
) -> list[tuple[Sequence[Budget | RelativeBudget], pd.DataFrame | str]]:
    """Return each of the experiment's limits with the best configurations within it, or the reason why none is."""
    options = store.experiment.search
    found: list[tuple[Sequence[Budget | RelativeBudget], pd.DataFrame | str]] = []
    for limit in map(parse_budgets, options.limits):
        budgets: Sequence[Budget | RelativeBudget] = limit
        best: pd.DataFrame | str
        try:
            budgets = amount = budget_amounts(store, limit)
            best = best_under(searched.accuracies, amount, options.top)
        except (InvalidValueError, MissingStageError) as error:
            best = str(error)
        found.append((budgets, best))
    return found


def candidates(store: RunStore, searched: Searched) -> list[str]:
    """Return the best evaluated configurations within each of the experiment's limits."""
    found = [best for _, best in _within_limits(store, searched) if not isinstance(best, str)]
    return list(dict.fromkeys(name for best in found for name in best["configuration"]))


def _within(budgets: Sequence[Budget | RelativeBudget]) -> str:
    return f"Most accurate within {' and '.join(map(str, budgets))}"


def cost_columns(frame: pd.DataFrame, budgeted: set[str], score: Score) -> dict[str, list[str]]:
    """Return the columns of a table of configurations with their costs and score, as texts."""
    columns = {"configuration": frame["configuration"].tolist(), "M MACs": [millions(macs) for macs in frame["macs"]]}
    if "macs_paper" in budgeted:
        columns["M MACs (the paper's)"] = [millions(macs) for macs in frame["macs_paper"]]
    columns["parameters"] = [str(count) for count in frame["parameters"]]
    if frame["latency_ms"].notna().all():
        columns["ms"] = [f"{latency:.3f}" for latency in frame["latency_ms"]]
    columns[score_head(frame)] = [score_text(score, row) for _, row in frame.iterrows()]
    return columns


def sweep_table(store: RunStore) -> ResultTable:
    """Return the numbers of Figure 1: for each alpha, accuracy in the supernet minus on its own (validation split)."""
    sweep = store.read_table("alpha_sweep")
    title = "Sampling temperature: supernet less fixed, percentage points: mean (std) (validation split, Figure 1)"
    if sweep.empty:
        return ResultTable(title, missing=["run `gross sweep-alpha`"])
    configurations = sorted(set(sweep["configuration"]), key=Configuration.parse)
    rows = []
    for (alpha, scaling), group in sweep.groupby(["alpha", "scaling"]):
        points = 100 * group.groupby("configuration")["difference"].agg(["mean", "std"]).reindex(configurations)
        differences = [_mean_and_spread(*point) for point in points.itertuples(index=False)]
        rows.append([temperature(alpha, scaling), *differences, str(group["seed"].nunique())])
    options = store.experiment.sweep
    planned = {
        (alpha, settled_scaling(alpha, scaling), seed)
        for alpha in options.alphas
        for scaling in options.scalings
        for seed in range(options.seeds)
    }
    compared = set(sweep[["alpha", "scaling", "seed"]].itertuples(index=False, name=None))
    missing = _lacking(len(planned - compared), len(planned), "supernets of the sweep (run `gross sweep-alpha`)")
    return ResultTable(title, ["alpha", *configurations, "n"], rows, missing=missing)


def is_swept(store: RunStore) -> bool:
    """Return whether the experiment has a sweep over alpha, or its folder has results of one."""
    sweep = store.experiment.sweep
    return bool(sweep.alphas and sweep.scalings) or bool(store.units("alpha_sweep"))


def selected(store: RunStore) -> pd.DataFrame:
    """Return the rows of `selections`, the largest budget first."""
    selections = store.read_table("selections")
    return selections.sort_values(["budget_macs", "budget", "rank"], ascending=[False, True, True], ignore_index=True)


def correlation(store: RunStore, supernet: pd.Series, validations: pd.DataFrame) -> RankCorrelation:
    """Return the rank correlation of accuracy in the supernet and on its own, both on the validation split.

    The intervals are reproducible: their generator is derived from the experiment's seed. Raises InvalidValueError if
    ranks do not exist.
    """
    own = validations.groupby("configuration")["val_accuracy"].mean()
    generator = derived_generator(store.experiment.seed, "report", "rank correlation")
    return rank_correlation(supernet, own, generator=generator)


def correlation_sentence(store: RunStore, supernet: pd.Series, validations: pd.DataFrame) -> str:
    """Return a sentence with the result of `correlation`, or with the reason why none exists."""
    try:
        found = correlation(store, supernet, validations)
    except InvalidValueError as error:
        return str(error)
    ranked, trained = found.num_configurations, validations["configuration"].nunique()
    of = f"{ranked}" if ranked == trained else f"{ranked} of the {trained} validated"
    what = f"rank correlation of {of} configurations in the supernet and on their own (val)"
    if ranked < LEAST_RANKED:
        return f"{what}, too few for intervals: Spearman {found.spearman:.2f}, Kendall {found.kendall:.2f}"
    return (
        f"{what}, 95 % bootstrap intervals: "
        f"Spearman {found.spearman:.2f} [{found.spearman_low:.2f}, {found.spearman_high:.2f}], "
        f"Kendall {found.kendall:.2f} [{found.kendall_low:.2f}, {found.kendall_high:.2f}]"
    )


def latency_sentences(store: RunStore) -> list[str]:
    """Return a sentence on the measurement that predicts latency_ms: runtime, conditions and error; none without it."""
    model = _measurement(store)
    if model is None:
        return []
    return [
        f"ms: one batch of {model.batch_size} in {where(model)}, each layer in its faster form; the full network takes "
        f"{model.full_ms:.3g} ms; the median error of the predictions is {100 * model.median_error:.1f} %, over "
        f"{model.num_sampled} networks timed whole"
    ]


def runtime_in_use(store: RunStore) -> str:
    """Return the batch and the runtime that predict latency_ms; empty if none is in use."""
    model = _measurement(store)
    return "" if model is None else f"batch of {model.batch_size} in {RUNTIMES[model.runtime]}"


def _measurement(store: RunStore) -> Any:
    """Return the row of `runtime_latencies` that predicts latency_ms; None without it."""
    unit = unit_in_force(store)
    return None if unit is None else next(store.read_units("runtime_latencies", [unit]).itertuples())


def where(model: Any) -> str:
    """Return the runtime and its conditions, from a LatencyModel, a Timing or a row of `runtime_latencies`."""
    threads = f"{model.threads} thread{'s' * (model.threads > 1)}"
    return f"{RUNTIMES[model.runtime]} {model.version} on {model.device}, {threads}"


def temperature(alpha: float, scaling: str) -> str:
    """Return the label of a sampling temperature; for alpha 0 both scalings are the same."""
    return f"{alpha:g}" if alpha == 0 else f"{alpha:g} {scaling}"


def millions(macs: float) -> str:
    """Return a number of MACs in millions."""
    return f"{macs / 1e6:.2f}"


def mean_text(mean: float, std: float, count: int, digits: int = 2) -> str:
    """Return "mean (std, n)", with a dash for the standard deviation of a single value."""
    spread = "-" if pd.isna(std) else f"{std:.{digits}f}"
    return f"{mean:.{digits}f} ({spread}, {count:.0f})"


def _mean_and_spread(mean: float, deviation: float) -> str:
    if pd.isna(mean):
        return "-"
    return f"{mean:+.2f}" + (f" ({deviation:.2f})" if pd.notna(deviation) else "")


def _lacking(num: int, planned: int, what: str) -> list[str]:
    return [f"{num} of {planned} {what}"] if num > 0 else []


def _lacking_trainings(validations: pd.DataFrame, num: int, store: RunStore, what: str) -> list[str]:
    """Return how many trainings of `num` configurations are missing; `validations` are the stored ones."""
    seeds = store.experiment.validation.seeds
    planned = num * seeds
    stored = len(validations[validations["seed"] < seeds].drop_duplicates(["configuration", "seed"]))
    return _lacking(planned - stored, planned, f"trainings of {what} on their own (run `gross validate`)")


def _accuracy(values: pd.Series) -> tuple[str, str]:
    """Return two texts in percent: the median, and the mean (sample standard deviation, n)."""
    if values.empty:
        return "-", "-"
    percent = 100 * values
    return f"{percent.median():.2f}", mean_text(percent.mean(), percent.std(), len(percent))
