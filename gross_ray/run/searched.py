"""Read what searches and sweeps have evaluated, one part at a time, so that millions of rows never fill the memory.

A unit of the table `configurations` holds one supernet's rows of some configurations. Supernets are evaluated on the
same parts of the space, and no configuration lies in two parts: units that begin with the same configuration belong to
the same part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from gross_ray.errors import RunFolderError
from gross_ray.run.store import RunStore
from gross_ray.search.selection import COSTS, supernet_accuracies

_TABLE = "configurations"
_HEAD = ("alpha", "scaling", "seed", "configuration")


def evaluated_units(store: RunStore, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Return one row for each unit of `configurations`: `unit`, its supernet's alpha, scaling and seed, and `first`.

    `first` is the unit's first configuration. `names` are stored units, by default all of them. Raises RunFolderError
    naming a damaged or missing file.
    """
    units = store.units(_TABLE) if names is None else list(names)
    heads = store.first_rows(_TABLE, units, _HEAD)
    return heads.rename(columns={"configuration": "first"}).assign(unit=units)


def evaluated_parts(
    store: RunStore, columns: Sequence[str], units: pd.DataFrame | None = None
) -> Iterator[pd.DataFrame]:
    """Yield rows of `configurations` in parts, each with all supernets' rows of its configurations at one alpha.

    `units` are rows of `evaluated_units`, by default all of them; `columns` has "configuration". Raises RunFolderError
    naming a damaged file, or one that holds the rows of several supernets.
    """
    found = evaluated_units(store) if units is None else units
    for _, part in found.groupby(["alpha", "scaling", "first"], sort=False):
        rows = store.read_units(_TABLE, part["unit"].tolist(), columns)
        if (rows["configuration"] == rows["configuration"].iloc[0]).sum() > len(part):
            raise RunFolderError(
                f"{store.storage}: a file of the table {_TABLE} (unit {part['unit'].iloc[0]}) holds the rows of "
                "several supernets: keep the results again by `python scripts/results.py keep`, or split it by supernet"
            )
        yield rows


def evaluated_accuracies(store: RunStore, units: pd.DataFrame | None = None) -> Iterator[pd.DataFrame]:
    """Yield what `supernet_accuracies` returns for each of `evaluated_parts`."""
    for part in evaluated_parts(store, ("configuration", *COSTS, "val_accuracy"), units):
        yield supernet_accuracies(part)
