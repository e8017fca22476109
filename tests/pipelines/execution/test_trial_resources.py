"""Trials that share a GPU, placed by the real Ray on a declared one: the machine that tests it needs none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines.trials import run_trials

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from pipelines.execution.cluster import Cluster, ray
from pipelines.units import Context, Unit, pack_splits
from pipelines.watching import StageProgress

PATIENCE = 60.0


class DeclaredGPU(str):
    """A device that is placed like cuda, and computes on the CPU."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other == "cuda"

    __hash__ = str.__hash__


def work(context: Context, unit: Unit) -> str:
    """Tell when it runs, wait for another one that does, and return the GPUs it sees."""
    mark = context.store.path / "running" / unit.name
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    deadline = time.monotonic() + unit.arguments["patience"]
    while len(list(mark.parent.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    beside = len(list(mark.parent.iterdir())) - 1
    time.sleep(0.5)
    mark.unlink()
    return f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}, {beside} beside it"


@pytest.fixture(scope="module")
def one_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(request.module)
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, num_gpus=1, **quiet)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(request.module)


@pytest.mark.parametrize(("gpus_per_unit", "patience", "beside"), [(0.5, PATIENCE, 1), (1.0, 1.0, 0)])
def test_trials_get_their_share_of_a_gpu(
    one_gpu: None, tmp_path: Path, gpus_per_unit: float, patience: float, beside: int
) -> None:
    texts: dict[str, str] = {}

    class Kept(StageProgress):
        def unit_done(self, unit: str, text: str) -> None:
            texts[unit] = text

    part = ImageSet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2))
    failed = run_trials(
        "validate",
        work,
        RunStore.create(tmp_path / "run", preset("quickstart")),
        [Unit(f"seed={seed}", {"patience": patience}) for seed in range(2)],
        cluster=Cluster(2, 1.0, DeclaredGPU("cpu"), gpus_per_unit, 2),
        packed_splits=ray.put(pack_splits(Splits("tiny", part, part, part, ("one", "other")))),
        threads=1,
        progress=Kept("test", 2, 0),
    )
    assert failed == {}
    assert texts == {f"seed={seed}": f"GPU 0, {beside} beside it" for seed in range(2)}
