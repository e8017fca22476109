"""What the search has evaluated, one row a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import pandas as pd

from gross_ray.run.searched import evaluated_parts, evaluated_units
from gross_ray.run.store import SEARCH_ENDED, RunStore
from gross_ray.search.budgets import COSTS
from gross_ray.search.selection import supernet_accuracies
from gross_ray.training.sampling import settled_scaling

_LAYER = "layer "


@dataclass(frozen=True)
class Searched:
    """The configurations of the supernets that are searched (not those of the sweep)."""

    accuracies: pd.DataFrame
    """What `supernet_accuracies` returns; no rows before the search."""
    layers: tuple[str, ...]
    """Names of the decomposed layers, in the order of a configuration's group-sizes."""
    num_supernets: int
    """Supernets that evaluated at least one configuration."""
    num_evaluations: int
    """Rows behind `accuracies`: fewer than configurations x supernets while a search is unfinished."""

    @classmethod
    def of(cls, store: RunStore) -> Searched:
        """Read the configurations of the experiment's own supernets."""
        options = store.experiment.supernet
        scaling = settled_scaling(options.alpha, options.scaling)
        units = evaluated_units(store)
        of_search = (units["alpha"] == options.alpha) & (units["scaling"] == scaling) & (units["seed"] < options.seeds)
        ours = units[of_search]
        if ours.empty:
            return cls(pd.DataFrame(columns=["configuration", *COSTS, "supernet_accuracy"]), (), 0, 0)
        parts, num_rows = [], 0
        for part in evaluated_parts(store, ("configuration", *COSTS, "val_accuracy"), ours):
            parts.append(supernet_accuracies(part))
            num_rows += len(part)
        layers = _layers(store, ours["unit"].iloc[0])
        return cls(pd.concat(parts, ignore_index=True), layers, ours["seed"].nunique(), num_rows)

    def space_size(self, store: RunStore) -> int:
        """Return how many configurations there are, as far as the layers are decomposed."""
        sizes = store.read_table("decompositions", ["layer", "group_size"]).groupby("layer")["group_size"].nunique()
        return max(prod(sizes.tolist()), len(self.accuracies))

    def missing(self, store: RunStore) -> list[str]:
        """Return how many evaluations are not stored yet.

        A search by a strategy may end before it has made all that it was given: its selections say so, or else a
        checkpoint, which kept results lack.
        """
        options = store.experiment
        configurations, at_most = self.space_size(store), ""
        if options.search.strategy != "exhaustive":
            ended = bool(store.units("selections")) or store.has_checkpoint(*SEARCH_ENDED)
            configurations = len(self.accuracies) if ended else min(options.search.evaluations, configurations)
            at_most = "at most "
        planned = max(configurations, len(self.accuracies)) * options.supernet.seeds
        if self.num_evaluations >= planned:
            return []
        return [f"{at_most}{planned - self.num_evaluations:,} of {planned:,} evaluations (run `gross search`)"]

    @cached_property
    def costs(self) -> tuple[str, ...]:
        """The costs that every configuration has, MACs first."""
        return tuple(cost for cost in COSTS if len(self.accuracies) and self.accuracies[cost].notna().all())


def _layers(store: RunStore, unit: str) -> tuple[str, ...]:
    first = store.read_units("configurations", [unit])
    return tuple(name.removeprefix(_LAYER) for name in first.columns if name.startswith(_LAYER))
