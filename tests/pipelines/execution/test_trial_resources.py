"""Trials that share a GPU, placed by the real Ray on a declared one: the machine that tests it needs none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray
from recorded import Recorded

from gross_ray.data.image_set import Splits
from gross_ray.run.opened import Run
from pipelines.capacity import Capacity
from pipelines.execution.tune import Trials
from pipelines.nodes import NodeKind
from pipelines.packing import pack_splits
from pipelines.units import Context, Job, Unit


class DeclaredGPU(str):
    """A device that is placed like cuda, and computes on the CPU."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other == "cuda"

    __hash__ = str.__hash__


@dataclass(frozen=True, kw_only=True)
class Trial(Unit):
    seed: int
    shares: bool

    @property
    def name(self) -> str:
        return f"seed={self.seed}"


def work(context: Context, unit: Trial) -> str:
    """Return the GPUs that the trial sees, and how many trials were under way beside it.

    One that shares the GPU is under way until the other one is, too: there, or at the deadline, the two have met.
    """
    under_way = context.store.path / "under-way"
    under_way.mkdir(exist_ok=True)
    mark = under_way / unit.name
    mark.touch()
    deadline = time.monotonic() + (600 if unit.shares else 1)
    while len(list(under_way.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    beside = len(list(under_way.iterdir())) - 1
    if not unit.shares:
        mark.unlink()
    return f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}, {beside} beside it"


@pytest.fixture(scope="module")
def one_gpu(request: pytest.FixtureRequest, no_ray: None) -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(request.module)
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, num_gpus=1, **quiet)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(request.module)


@pytest.mark.parametrize(("gpus_per_unit", "beside"), [(0.5, 1), (1.0, 0)])
def test_trials_get_their_share_of_a_gpu(
    one_gpu: None, splits: Splits, run: Run, gpus_per_unit: float, beside: int
) -> None:
    units, progress = [Trial(seed=seed, shares=beside == 1) for seed in range(2)], Recorded()
    capacity = Capacity(nodes=(NodeKind(2, 1.0),), device=DeclaredGPU("cpu"), gpus_per_unit=gpus_per_unit)
    job = Job(stage="validate", units=units, work=work, done=set, kind="test", num_equal=2, trials=True)
    assert Trials(capacity, ray.put(pack_splits(splits)), run).do(job, units, threads=1, progress=progress) == {}
    assert progress.texts == {unit.name: f"GPU 0, {beside} beside it" for unit in units}
