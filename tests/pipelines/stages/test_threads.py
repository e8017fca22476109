"""A stage keeps the threads that it began with, on whatever cluster it goes on."""

from __future__ import annotations

from pathlib import Path

from pipelines.threads import threads_of_stage

from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from pipelines.execution.cluster import Cluster


def _cluster(num_cpus: int, cores_per_node: int) -> Cluster:
    return Cluster(num_cpus, 0, "cpu", 0.25, cores_per_node)


def test_a_stage_keeps_its_threads(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", preset("quickstart"))
    large, small = _cluster(8, 8), _cluster(2, 2)
    assert small.threads(2) == 1
    assert threads_of_stage(store, "train", large, 2) == large.threads(2) == 4
    again = RunStore.open(tmp_path / "run")
    assert threads_of_stage(again, "train", _cluster(64, 64), 2) == 4
    assert threads_of_stage(again, "train", small, 2) == 2  # all that a node has
    assert threads_of_stage(again, "train", large, 2) == 4  # and that is not what is stored
    assert threads_of_stage(again, "search plan", large, 1) == 8  # each stage has its own
