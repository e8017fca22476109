"""The paper's Tables 2 and 3 and the sweep over alpha as text."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gross_ray.results.store import RunStore
from gross_ray.search.selection import supernet_accuracies

Row = Sequence[str]


def results(store: RunStore, *, markdown: bool = False) -> str:
    """Return all results that are stored, and what is missing."""
    parts = [
        network_table(store, markdown=markdown),
        selection_table(store, markdown=markdown),
        sweep_table(store, markdown=markdown),
    ]
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
    note = "" if len(fixed) else "\nmissing: the fixed configurations (run `gross validate`)"
    return f"{title}\n{_table(heads, rows, markdown)}{note}"


def selection_table(store: RunStore, *, markdown: bool = False) -> str:
    """Return Table 3: under each budget the fixed and the selected configurations, in the supernet and on their own."""
    selections, validations = _selections(store), store.read_table("validations")
    title = "Selected under the budget of a fixed configuration (Table 3)"
    if selections.empty:
        return f"{title}\nmissing: run `gross search`"
    options = store.experiment.supernet
    configurations = store.read_table("configurations")
    scaling = options.scaling if options.alpha > 0 else "index"
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
    complete = shown <= set(validations["configuration"])
    note = "" if complete else "\nmissing: accuracies on their own (run `gross validate`)"
    return f"{title}\n{_table(heads, rows, markdown)}{note}"


def sweep_table(store: RunStore, *, markdown: bool = False) -> str:
    """Return Figure 1's numbers: accuracy in the supernet less that on its own, for each alpha (validation split)."""
    sweep = store.read_table("alpha_sweep")
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
    return f"{title}\n{_table(['alpha', *configurations, 'n'], rows, markdown)}"


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
