"""The sections of the page: charts and tables, or what is missing and the command that makes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import pandas as pd

from gross_ray.data.identity import SHORT, SPLITS
from gross_ray.report.charts import Chart
from gross_ray.report.results import ResultTable, is_swept, main_tables, sweep_table
from gross_ray.report.run_charts import curves_chart, decomposition_chart, rates_chart, retrained_chart
from gross_ray.report.searched import Searched
from gross_ray.report.space_chart import space_chart
from gross_ray.report.sweep_charts import sweep_charts
from gross_ray.run.pins import fingerprint, stored_data
from gross_ray.run.store import RunStore

_STAGES = ("train", "decompose", "reconstruct", "finetune", "validate-reconstruct", "validate-finetune")
_VERSIONS = ("gross_ray", "python", "torch", "torchvision", "ray")


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    name: str
    """Its id in the page."""
    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[ResultTable] = ()
    missing: Sequence[str] = ()
    """The results that are not stored yet, each with the command that makes it."""
    folded: bool = False
    """Whether its tables are collapsed at first."""

    @property
    def all_tables(self) -> list[ResultTable]:
        """Its tables and those of its charts' numbers."""
        return [*self.tables, *(chart.details for chart in self.charts if chart.details is not None)]

    @property
    def all_missing(self) -> list[str]:
        """The results that this section and its tables lack."""
        empty = [f"{table.title}: {what}" for table in self.tables for what in table.missing if not table.heads]
        return [*self.missing, *empty, *(what for table in self.tables for what in table.missing if table.heads)]


def sections(store: RunStore, searched: Searched | None = None) -> list[Section]:
    """Return all sections that the experiment asks for, in the order of the page."""
    searched = searched or Searched.of(store)
    parts = [
        _space(store, searched),
        Section("tables", "Tables 2 and 3", tables=main_tables(store, searched)),
        _retrained(store, searched),
        _sweep(store),
        _decompositions(store),
        _rates(store),
        _curves(store),
        _times(store),
        _experiment(store),
    ]
    return [part for part in parts if part.charts or part.tables or part.missing]


def _space(store: RunStore, searched: Searched) -> Section:
    title = "The configurations"
    if searched.accuracies.empty:
        return Section("configurations", title, missing=["the evaluated configurations (run `gross search`)"])
    return Section("configurations", title, [space_chart(store, searched)], missing=searched.missing(store))


def _retrained(store: RunStore, searched: Searched) -> Section:
    title = "Supernet against training on its own"
    validations = store.read_table("validations", ["configuration", "kind", "val_accuracy"])
    chart = retrained_chart(store, searched, validations) if len(validations) else None
    if chart is not None:
        return Section("retrained", title, [chart])
    command = "gross search" if searched.accuracies.empty else "gross validate"
    return Section("retrained", title, missing=[f"configurations that have both accuracies (run `{command}`)"])


def _sweep(store: RunStore) -> Section:
    title = "The sampling temperature (Figure 1)"
    sweep = store.read_table("alpha_sweep")
    if sweep.empty:
        missing = ["the sweep over alpha (run `gross sweep-alpha`)"] if is_swept(store) else []
        return Section("sweep", title, missing=missing)
    return Section("sweep", title, sweep_charts(store, sweep), [sweep_table(store)])


def _decompositions(store: RunStore) -> Section:
    decompositions = store.read_table("decompositions")
    if decompositions.empty:
        return Section("decompositions", "The decompositions", missing=["the decompositions (run `gross decompose`)"])
    return Section("decompositions", "The decompositions", [decomposition_chart(decompositions)])


def _rates(store: RunStore) -> Section:
    tests = store.read_table("range_tests")
    return Section("rates", "The learning rates", [rates_chart(tests)] if len(tests) else [])


def _curves(store: RunStore) -> Section:
    history = store.read_table("history", ["stage", "unit", "epoch", "train_loss", "val_accuracy"])
    if history.empty:
        return Section("curves", "The trainings", missing=["training curves (run `gross train`)"])
    return Section("curves", "The trainings", [curves_chart(_in_order(history))])


def _times(store: RunStore) -> Section:
    title = "Versions and time"
    runs = store.read_table("runs", ["started", *_VERSIONS, "host", "device", "num_cpus"])
    if runs.empty:
        return Section("time", title, missing=["the start of any stage (run `gross run` or `gross train`)"])
    images = _images(store)
    starts = ResultTable(
        "Starts of a command on this run folder",
        ["started (UTC)", *_VERSIONS, "host", "device", "cores"],
        [[row[0].partition(".")[0].replace("T", " "), *map(str, row[1:])] for row in runs.itertuples(index=False)],
    )
    trained = store.read_table("history", ["stage", "unit", "seconds"])
    decomposed = store.read_table("decompositions", ["layer", "group_size", "seed", "nested", "seconds"])
    keys = (decomposed[key].astype(str) for key in ("layer", "group_size", "seed", "nested"))
    unit = reduce(lambda first, second: first + " " + second, keys)
    work = [part for part in (trained, decomposed.assign(stage="decompose", unit=unit)) if len(part)]
    if not work:
        return Section("time", title, tables=[starts, *images], missing=["times of work (run `gross train`)"])
    rows, total = [], 0.0
    for stage, group in _in_order(pd.concat(work)).groupby("stage", sort=False):
        total += group["seconds"].sum()
        rows.append([str(stage), str(group["unit"].nunique()), _duration(group["seconds"].sum())])
    rows.append(["these together", "", _duration(total)])
    note = (
        "Summed over units of work: with several workers, units run at the same time, and the wall-clock time is less. "
        "Evaluations are not counted; units that `--reuse` took over from another run are."
    )
    times = ResultTable("Time of training and decomposing", ["stage", "units", "h:mm:ss"], rows, [note])
    return Section("time", title, tables=[starts, *images, times])


def _images(store: RunStore) -> list[ResultTable]:
    """Return the table of the images' hashes; no table if the run folder has none."""
    stored = stored_data(store)
    if stored is None:
        return []
    splits = [(split, getattr(stored, split)) for split in SPLITS]
    rows = [[name, str(split.count), split.hash[:SHORT]] for name, split in splits]
    title = f"The images of {store.experiment.data.name}, with the first {SHORT} digits of their hashes"
    return [ResultTable(title, ["split", "images", "SHA-256"], rows)]


def _experiment(store: RunStore) -> Section:
    fields = store.experiment.fields()
    rows = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in fields.items()]
    title = f"The experiment: {len(rows)} fields, fingerprint {fingerprint(store)}"
    return Section("experiment", "The experiment", tables=[ResultTable(title, ["field", "value"], rows)], folded=True)


def _in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows in the order of their stages."""
    position = rows["stage"].map({stage: number for number, stage in enumerate(_STAGES)}).fillna(len(_STAGES))
    return rows.iloc[position.argsort(kind="stable")]


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
