"""The configurations that the search has evaluated, one row for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import pandas as pd

from gross_ray.run.searched import evaluated_accuracies, evaluated_units
from gross_ray.run.store import SEARCH_ENDED, RunStore
from gross_ray.search.budgets import COSTS
from gross_ray.search.scores import LAYER_COLUMN, SCORED_COLUMNS, Score
from gross_ray.training.sampling import settled_scaling


@dataclass(frozen=True)
class Searched:
    """The evaluated configurations of the searched supernets (not of the sweep's supernets)."""

    accuracies: pd.DataFrame
    """The result of `scores.scored`; without rows before the search."""
    score: Score
    """By what the configurations are ranked."""
    layers: tuple[str, ...]
    """Names of the decomposed layers, in the order of a configuration's group-sizes."""
    num_supernets: int
    """Supernets with at least one evaluated configuration."""
    num_evaluations: int
    """Evaluations behind `accuracies`: fewer than configurations x supernets while a search is unfinished."""

    @classmethod
    def of(cls, store: RunStore) -> Searched:
        """Read the evaluated configurations of a run folder."""
        options = store.experiment.supernet
        scaling = settled_scaling(options.alpha, options.scaling)
        units = evaluated_units(store)
        of_search = (units["alpha"] == options.alpha) & (units["scaling"] == scaling) & (units["seed"] < options.seeds)
        ours = units[of_search]
        score = Score(store.experiment.search.score)
        if ours.empty:
            return cls(pd.DataFrame(columns=SCORED_COLUMNS), score, (), 0, 0)
        accuracies = pd.concat(evaluated_accuracies(store, ours), ignore_index=True)
        columns = store.read_units("configurations", [ours["unit"].iloc[0]]).columns
        layers = tuple(name.removeprefix(LAYER_COLUMN) for name in columns if name.startswith(LAYER_COLUMN))
        return cls(accuracies, score, layers, ours["seed"].nunique(), int(accuracies["num_supernets"].sum()))

    def space_size(self, store: RunStore) -> int:
        """Return the number of configurations of the space, as far as its layers are decomposed."""
        sizes = store.read_table("decompositions", ["layer", "group_size"]).groupby("layer")["group_size"].nunique()
        choices = sizes + 1 if store.experiment.decomposition.keep_dense else sizes
        return max(prod(choices.tolist()), len(self.accuracies))

    def missing(self, store: RunStore) -> list[str]:
        """Return a line with the number of missing evaluations; no line if the search is finished.

        A search by a strategy may finish before it has used all its evaluations. Its selections say so, or else a
        checkpoint, which published results do not include.
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
        """The costs that are known for every configuration, MACs first."""
        return tuple(cost for cost in COSTS if len(self.accuracies) and self.accuracies[cost].notna().all())
