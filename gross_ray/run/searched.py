"""Read the evaluated configurations one part of the space at a time, so that millions of rows need little memory.

A unit of the table `configurations` has one supernet's rows for one part of the space. All supernets are evaluated on
the same parts, which do not overlap: units that begin with the same configuration belong to the same part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from gross_ray.errors import RunFolderError
from gross_ray.run.latencies import unit_in_force
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import COSTS
from gross_ray.search.scores import LAYER_COLUMN, Score, Smoothing, by_supernet, group_sizes, scored
from gross_ray.space import Configuration

_TABLE = "configurations"
_HEAD = ("alpha", "scaling", "seed", "configuration")


def evaluated_units(store: RunStore, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Return one row for each unit of `configurations`: `unit`, alpha, scaling and seed of its supernet, and `first`.

    `first` is the unit's first configuration. `names` are stored units, by default all. Raises RunFolderError naming a
    damaged or missing file.
    """
    units = store.units(_TABLE) if names is None else list(names)
    heads = store.first_rows(_TABLE, units, _HEAD)
    return heads.rename(columns={"configuration": "first"}).assign(unit=units)


def evaluated_parts(
    store: RunStore, columns: Sequence[str], units: pd.DataFrame | None = None
) -> Iterator[pd.DataFrame]:
    """Yield the rows of `configurations` part by part, each with the rows of all supernets of one alpha and scaling.

    `latency_ms` is NaN unless a stored measurement predicts it (`unit_in_force`): otherwise its runtime is unknown.

    `units` are rows of `evaluated_units`, by default all; `columns` must include "configuration". Raises RunFolderError
    naming a damaged file, or a file with the rows of several supernets.
    """
    found = evaluated_units(store) if units is None else units
    unmeasured = "latency_ms" in columns and unit_in_force(store) is None
    for _, part in found.groupby(["alpha", "scaling", "first"], sort=False):
        rows = store.read_units(_TABLE, part["unit"].tolist(), columns)
        if (rows["configuration"] == rows["configuration"].iloc[0]).sum() > len(part):
            raise RunFolderError(
                f"{store.storage}: a file of the table {_TABLE} (unit {part['unit'].iloc[0]}) has the rows of "
                "several supernets: keep the results again with `python scripts/results.py keep`, or split it"
            )
        yield rows.assign(latency_ms=np.nan) if unmeasured else rows


def evaluated_accuracies(store: RunStore, units: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield `scores.scored` of each of `evaluated_parts`, by the experiment's score.

    `units` are rows of `evaluated_units`, all of supernets of one alpha and scaling. Scores are read if all of them are
    stored (`score_units`), and computed otherwise. Raises RunFolderError if they are stored for other configurations.
    """
    if units.empty:
        return
    units = _in_order(units)
    score = Score(store.experiment.search.score)
    columns = ["seed", "configuration", *COSTS, *dict.fromkeys(["val_accuracy", score.column])]
    names = score_units(store, units)
    if set(names) <= store.finished_units("scores"):
        for name, part in zip(names, evaluated_parts(store, columns, units), strict=True):
            frame, found = scored(part, Score(score.statistic)), store.read_units("scores", [name])
            if frame["configuration"].tolist() != found["configuration"].tolist():
                raise RunFolderError(
                    f"{store.storage}: the table scores (unit {name}) is of other evaluations: delete its folder, and "
                    "`gross search` writes it again"
                )
            yield frame.assign(score=found["score"], standard_error=found["standard_error"])
        return
    smoothing = None
    if score.smoothed:
        first = store.read_units(_TABLE, units["unit"].tolist()[:1])
        columns += [name for name in first.columns if name.startswith(LAYER_COLUMN)]
        smoothing = _smoothing(store, units, score, [name for name in columns if name not in COSTS])
    for part in evaluated_parts(store, columns, units):
        yield scored(part, score, smoothing)


def score_units(store: RunStore, units: pd.DataFrame) -> list[str]:
    """Return the names of the units of the table `scores`, one for each part, in the order of the parts' beginnings.

    For a space that was evaluated whole this is the order of the space, however many parts it has.
    """
    num = units["first"].nunique()
    return [f"score={store.experiment.search.score},part={part},of={num}" for part in range(num)]


def _in_order(units: pd.DataFrame) -> pd.DataFrame:
    """Return `units` in the order of their first configurations in the space."""
    firsts = [Configuration.parse(text) for text in units["first"]]
    return units.iloc[sorted(range(len(units)), key=firsts.__getitem__)]


def _smoothing(store: RunStore, units: pd.DataFrame, score: Score, columns: Sequence[str]) -> Smoothing | None:
    """Fit the smoothing to all evaluated configurations; None if fewer than two were evaluated.

    During a search, one supernet may be finished before another one has begun. The fit is to those supernets in which
    the most configurations were evaluated.
    """
    chosen, values = [], []
    seeds = np.unique(units["seed"])
    for part in evaluated_parts(store, columns, units):
        chosen.append(group_sizes(part.drop_duplicates("configuration")).astype(np.int32))
        values.append(by_supernet(part, score, seeds))
    measured = np.concatenate(values)
    counts = (~np.isnan(measured)).sum(axis=0)
    measured = measured[:, counts == counts.max()]
    if (~np.isnan(measured).any(axis=1)).sum() < 2:
        return None
    return Smoothing.of(np.concatenate(chosen), measured, score)
