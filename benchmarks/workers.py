"""Decomposition on Ray: the 19 (layer, group-size) pairs of four-conv on two workers against one, one thread each.

    python benchmarks/workers.py [--repeats 3] [--tolerance 1e-6]

Baseline: one worker in the same run. The start of the workers is reported separately and not counted. Every result is
stored, as in `gross decompose`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gross_ray.data.images import load_dataset
from gross_ray.experiment import DecompositionOptions, SupernetOptions, SweepOptions, TrainingOptions
from gross_ray.presets import quickstart
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from pipelines.execution.actors import Actors
from pipelines.execution.base import Executor
from pipelines.execution.cluster import connected, put
from pipelines.execution.in_process import InProcess
from pipelines.nodes import NodeKind
from pipelines.packing import pack_splits
from pipelines.resources import Resources
from pipelines.stages import decompose, train
from pipelines.units import Job, Unit, Work
from pipelines.watching import StageProgress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    options = parser.parse_args()
    experiment = replace(
        quickstart(),
        training=TrainingOptions(epochs=2, lr=0.05, milestones=(), batch_size=128, augment="none", seeds=1),
        decomposition=DecompositionOptions(tolerance=options.tolerance),
        supernet=SupernetOptions(seeds=1),
        sweep=SweepOptions(alphas=()),
    )
    # Three cores, for the pool of one worker and the pool of two; never more than two workers are busy at once.
    with tempfile.TemporaryDirectory() as folder, connected(Resources(num_cpus=3, device="cpu")) as capacity:
        splits = load_dataset(experiment.data)
        base = Run(RunStore.create(Path(folder) / "base", experiment))
        _do(InProcess(base, splits, "cpu"), train.plan(base), train.work, threads=2)
        units = decompose.plan(base)
        packed, seconds = put(pack_splits(splits)), {1: [], 2: []}
        folders = {workers: Path(folder) / f"{workers} workers" for workers in seconds}
        pools = {}
        for workers, path in folders.items():
            run = Run(RunStore.open(shutil.copytree(base.store.path, path)))
            pools[workers] = Actors(replace(capacity, nodes=(NodeKind(workers, 0.0),)), packed, run)
            warm = _do(pools[workers], units[:workers], decompose.work)
            print(f"{workers} workers started and warm after {warm:.1f} s", flush=True)
        for _ in range(options.repeats):  # alternating: machines are shared, and their speed drifts
            for workers, pool in pools.items():
                shutil.rmtree(folders[workers])
                shutil.copytree(base.store.path, folders[workers])
                seconds[workers].append(_do(pool, units, decompose.work))
        for pool in pools.values():
            pool.close()
    one, two = (statistics.median(measured) for measured in seconds.values())
    print(f"{len(units)} units, one thread a worker, median of {options.repeats}")
    print(f"one worker {one:.1f} s, two workers {two:.1f} s, ratio {one / two:.2f}")


def _do(executor: Executor, units: Sequence[Unit], work: Work, *, threads: int = 1) -> float:
    """Do all units and return the seconds."""
    job = Job(stage="benchmark", units=units, work=work, done=set, kind="benchmark", num_equal=len(units))
    started = time.perf_counter()
    failed = executor.do(job, units, threads=threads, progress=StageProgress("benchmark", len(units), 0))
    assert not failed, failed
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
