"""The paper's Tables 2 and 3, the sweep over alpha and what a search under budgets finds, as text."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gross_ray.errors import InvalidValueError
from gross_ray.results.store import RunStore
from gross_ray.search.correlation import rank_correlation
from gross_ray.search.selection import COSTS, Budget, supernet_accuracies
from gross_ray.seeds import derived_generator
from gross_ray.training.sampling import settled_scaling

Row = Sequence[str]
_SEARCHED = ("alpha", "scaling", "seed", "configuration", *COSTS, "val_accuracy")


def results(store: RunStore, *, markdown: bool = False) -> str:
    """Return all results that are stored, and what is missing."""
    parts = [
        network_table(store, markdown=markdown),
        selection_table(store, markdown=markdown),
        sweep_table(store, markdown=markdown),
    ]
    if (store.read_table("alpha_trials")["search"] == "optuna").any():
        parts.append(trials_table(store, markdown=markdown))
    return "\n\n".join(parts)


def stage_results(store: RunStore, stage: str) -> str:
    """Return what one stage has to show."""
    if stage == "validate":
        return f"{network_table(store)}\n\n{selection_table(store)}"
    if stage == "search":
        return _frame(_selections(store))
    if stage == "sweep-alpha":
        return sweep_table(store)
    if stage in ("train", "decompose"):
        return _frame(store.read_table({"train": "networks", "decompose": "decompositions"}[stage]))
    history = store.read_table("history")
    return _frame(history[history["stage"] == stage].groupby("unit", sort=False).tail(1))


def network_table(store: RunStore, *, markdown: bool = False) -> str:
    """Return Table 2: the full network and the fixed configurations, accuracy on the test split and MACs."""
    networks, validations = store.read_table("networks"), store.read_table("validations")
    title = "Full network and fixed configurations (test split, Table 2)"
    if networks.empty:
        return f"{title}\nmissing: run `gross train`"
    rows = [["full", *_accuracy(networks["test_accuracy"]), _millions(networks["macs"].iloc[0])]]
    fixed = validations[validations["kind"] == "fixed"]
    for configuration, group in fixed.sort_values("macs", ascending=False).groupby("configuration", sort=False):
        rows.append([f"fixed {configuration}", *_accuracy(group["test_accuracy"]), _millions(group["macs"].iloc[0])])
    heads = ["network", "median", "mean (std, n)", "M MACs"]
    notes = [] if len(fixed) else ["missing: the fixed configurations (run `gross validate`)"]
    return _page(title, heads, rows, markdown, notes)


def selection_table(store: RunStore, *, markdown: bool = False) -> str:
    """Return Table 3: under each budget the fixed and the selected configurations, in the supernet and on their own.

    Beneath it stands how far the supernet ranks all validated configurations as their own training does.
    """
    selections, validations = _selections(store), store.read_table("validations")
    title = "Selected under the budget of a fixed configuration (Table 3)"
    if selections.empty:
        return f"{title}\nmissing: run `gross search`"
    options = store.experiment.supernet
    configurations = store.read_table("configurations", _SEARCHED)
    scaling = settled_scaling(options.alpha, options.scaling)
    searched = configurations[(configurations["alpha"] == options.alpha) & (configurations["scaling"] == scaling)]
    supernet = supernet_accuracies(searched[searched["seed"] < options.seeds]).set_index("configuration")
    shown = {*selections["budget"], *selections["configuration"]}
    if not shown <= set(supernet.index):
        return f"{title}\nmissing: evaluated configurations (run `gross search`)"
    rows = []
    for budget, group in selections.groupby("budget", sort=False):
        fixed = validations[validations["configuration"] == budget]["test_accuracy"]
        for configuration in [budget, *group["configuration"]]:
            own = validations[validations["configuration"] == configuration]["test_accuracy"]
            chosen = configuration != budget
            difference = f"{100 * (own.mean() - fixed.mean()):+.2f}" if chosen and len(own) and len(fixed) else "-"
            rows.append(
                [
                    str(configuration) if chosen else f"{configuration} (fixed)",
                    _millions(supernet.loc[configuration, "macs"]),
                    f"{100 * supernet.loc[configuration, 'supernet_accuracy']:.2f}",
                    _accuracy(own)[1],
                    difference,
                ]
            )
    heads = ["configuration", "M MACs", "in supernet (val)", "on its own (test): mean (std, n)", "to fixed"]
    notes = _rank_correlation(store, supernet["supernet_accuracy"], validations)
    if not shown <= set(validations["configuration"]):
        notes.append("missing: accuracies on their own (run `gross validate`)")
    return _page(title, heads, rows, markdown, notes)


def sweep_table(store: RunStore, *, markdown: bool = False) -> str:
    """Return Figure 1's numbers: accuracy in the supernet less that on its own, for each alpha (validation split)."""
    sweep, trials = store.read_table("alpha_sweep"), store.read_table("alpha_trials")
    title = "Sampling temperature: supernet less fixed, percentage points (validation split, Figure 1)"
    if sweep.empty:
        return f"{title}\nmissing: run `gross sweep-alpha`"
    configurations = list(dict.fromkeys(sweep["configuration"]))
    rows = []
    for (alpha, scaling), group in sweep.groupby(["alpha", "scaling"]):
        means = group.groupby("configuration")["difference"].mean()
        seeds = group["seed"].nunique()
        name = f"{alpha:g}" if alpha == 0 else f"{alpha:g} {scaling}"
        rows.append([name, *(f"{100 * means[one]:+.2f}" for one in configurations), str(seeds)])
    stopped = trials[(trials["search"] == "grid") & (trials["status"] == "stopped")]
    notes = [
        f"not compared, stopped early: {trial.unit}, after epoch {trial.epochs} "
        f"(fixed configurations {100 * trial.supernet_accuracy:.2f})"
        for trial in stopped.itertuples()
    ]
    return _page(title, ["alpha", *configurations, "n"], rows, markdown, notes)


def trials_table(store: RunStore, *, markdown: bool = False) -> str:
    """Return the trials of the search for alpha, the best first."""
    trials = store.read_table("alpha_trials")
    searched = trials[trials["search"] == "optuna"].sort_values(
        ["supernet_accuracy", "trial"], ascending=[False, True], na_position="last"
    )
    rows = [
        [
            str(trial.trial),
            f"{trial.alpha:g}" if trial.alpha == 0 else f"{trial.alpha:g} {trial.scaling}",
            str(trial.seed),
            str(trial.epochs),
            "-" if pd.isna(trial.supernet_accuracy) else f"{100 * trial.supernet_accuracy:.2f}",
            trial.status,
        ]
        for trial in searched.itertuples()
    ]
    title = "Sampling temperatures proposed by Optuna: fixed configurations in the supernet (validation split)"
    return _page(title, ["trial", "alpha", "seed", "epochs", "in supernet (val)", "status"], rows, markdown)


def budget_table(best: pd.DataFrame, budgets: Sequence[Budget]) -> str:
    """Return what `best_under` gives as text, the best first."""
    columns = {"rank": [str(rank) for rank in range(1, len(best) + 1)], **_costs(best, {one.cost for one in budgets})}
    rows = list(zip(*columns.values(), strict=True))
    return _page(f"Most accurate within {' and '.join(map(str, budgets))}", list(columns), rows)


def front_table(front: pd.DataFrame, cost: str) -> str:
    """Return what `pareto_front` gives for `cost` as text, the cheapest first."""
    columns = _costs(front, {cost})
    rows = list(zip(*columns.values(), strict=True))
    return _page(f"Pareto front of {cost} and accuracy in the supernet", list(columns), rows)


def latency_table(store: RunStore) -> str:
    """Return how well the stored latency models predict the time of whole configurations."""
    rows = [
        [
            str(model.device),
            str(model.host),
            str(model.batch_size),
            str(model.threads),
            f"{100 * model.median_error:.1f} % ({model.num_sampled})",
        ]
        for model in store.read_table("latency_models").itertuples()
    ]
    heads = ["device", "host", "batch", "threads", "median error (configurations timed)"]
    return _page("Predicted latency of a configuration, against its own timing", heads, rows)


def _costs(frame: pd.DataFrame, budgeted: set[str]) -> dict[str, list[str]]:
    """Return the cells of configurations with their costs and accuracy, by column."""
    columns = {"configuration": frame["configuration"].tolist(), "M MACs": [_millions(macs) for macs in frame["macs"]]}
    if "macs_paper" in budgeted:
        columns["M MACs (the paper's)"] = [_millions(macs) for macs in frame["macs_paper"]]
    columns["parameters"] = [str(count) for count in frame["parameters"]]
    if frame["latency_ms"].notna().all():
        columns["ms"] = [f"{latency:.3f}" for latency in frame["latency_ms"]]
    columns["in supernet (val)"] = [f"{100 * accuracy:.2f}" for accuracy in frame["supernet_accuracy"]]
    return columns


def _rank_correlation(store: RunStore, supernet: pd.Series, validations: pd.DataFrame) -> list[str]:
    """Return a line on the rank correlation with the accuracies on their own (both of the validation split), if any."""
    own = validations.groupby("configuration")["val_accuracy"].mean()
    if own.empty:
        return []
    generator = derived_generator(store.experiment.seed, "report", "rank correlation")
    try:
        found = rank_correlation(supernet, own, generator=generator)
    except InvalidValueError as error:
        return [str(error)]
    return [
        f"rank correlation of {found.num_configurations} configurations in the supernet and on their own (val), "
        "95 % bootstrap intervals: "
        f"Spearman {found.spearman:.2f} [{found.spearman_low:.2f}, {found.spearman_high:.2f}], "
        f"Kendall {found.kendall:.2f} [{found.kendall_low:.2f}, {found.kendall_high:.2f}]"
    ]


def _selections(store: RunStore) -> pd.DataFrame:
    """Return the selections, the largest budget first."""
    selections = store.read_table("selections")
    return selections.sort_values(["budget_macs", "budget", "rank"], ascending=[False, True, True], ignore_index=True)


def _accuracy(values: pd.Series) -> tuple[str, str]:
    """Return the median, and mean (sample standard deviation, n), in percent."""
    if values.empty:
        return "-", "-"
    percent = 100 * values
    spread = f"{percent.std(ddof=1):.2f}" if len(percent) > 1 else "-"
    return f"{percent.median():.2f}", f"{percent.mean():.2f} ({spread}, {len(percent)})"


def _millions(macs: float) -> str:
    return f"{macs / 1e6:.2f}"


def _frame(frame: pd.DataFrame) -> str:
    return frame.to_string(index=False) if len(frame) else "nothing stored"


def _page(title: str, heads: Row, rows: Sequence[Row], markdown: bool = False, notes: Sequence[str] = ()) -> str:
    """Return a table between its title and its notes; right beneath one in Markdown, a note would be a row of it."""
    return "\n".join([title, _table(heads, rows, markdown), *(f"\n{note}" if markdown else note for note in notes)])


def _table(heads: Row, rows: Sequence[Row], markdown: bool) -> str:
    if markdown:
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[place]) for line in [heads, *rows]) for place in range(len(heads))]
    return "\n".join(
        "  "
        + "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [heads, *rows]
    )
