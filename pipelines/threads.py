"""The CPU threads of a stage's units: decided once for a run folder, for sums round differently with other numbers."""

from __future__ import annotations

from gross_ray.run.store import RunStore
from pipelines.cluster import Cluster

_STAGE = "threads"
_SAME_WORK = {"validate fixed": "validate", "sweep-alpha search": "search"}
"""Stages whose units are another one's too: they have to round alike."""


def threads_of_stage(store: RunStore, stage: str, cluster: Cluster, num_units: int) -> int:
    """Return the threads that the stage began with, on whatever cluster, as far as a node has cores for them.

    A stage that begins gets those with which its `num_units` units end soonest, and they are stored.
    """
    name = _SAME_WORK.get(stage, stage).replace(" ", "-")
    if not store.has_checkpoint(_STAGE, name):
        store.save_checkpoint(_STAGE, name, {}, {"threads": cluster.threads(num_units)})
    _, about = store.load_checkpoint(_STAGE, name)
    return min(about["threads"], cluster.cores_per_node)
