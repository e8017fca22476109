"""Decomposition on Ray: the four-conv network's 19 pairs on two workers against one, each with one thread.

    python benchmarks/workers.py [--repeats 3] [--tolerance 1e-6]

Baseline: one worker in the same run. Start-up of the workers is reported beside and not counted. Every result is
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

import ray
from pipelines.workers import WorkerPool

from gross_ray.data.images import load_dataset
from gross_ray.experiment import DecompositionOptions, SupernetOptions, SweepOptions, TrainingOptions
from gross_ray.presets import quickstart
from gross_ray.run.store import RunStore
from pipelines import decompose, train
from pipelines.execution.cluster import Resources, connected
from pipelines.units import Unit, Work, pack_splits
from pipelines.watching import StageProgress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    options = parser.parse_args()
    experiment = replace(
        quickstart(),
        training=TrainingOptions(epochs=2, lr=0.05, milestones=(), batch_size=128, augment=False, seeds=1),
        decomposition=DecompositionOptions(tolerance=options.tolerance),
        supernet=SupernetOptions(seeds=1),
        sweep=SweepOptions(alphas=()),
    )
    # Three slots for the one and the two workers; never more than two of them work at a time.
    with tempfile.TemporaryDirectory() as folder, connected(Resources(num_cpus=3, device="cpu")) as cluster:
        packed = ray.put(pack_splits(load_dataset(experiment.data)))
        base = RunStore.create(Path(folder) / "base", experiment)
        trainer = WorkerPool(cluster, packed)
        _run(trainer, base, train.plan(base), train.work, threads=2)
        trainer.close()
        seconds: dict[int, list[float]] = {1: [], 2: []}
        pools = {workers: WorkerPool(replace(cluster, num_cpus=workers), packed) for workers in seconds}
        units = decompose.plan(base)
        for repeat in range(options.repeats + 1):  # in turn: machines are shared, and their speed drifts
            for workers, pool in pools.items():
                store = RunStore.open(shutil.copytree(base.path, Path(folder) / f"{workers} workers, {repeat}"))
                if repeat == 0:
                    warm = _run(pool, store, units[:workers], decompose.work)
                    print(f"{workers} workers started and warm after {warm:.1f} s")
                else:
                    seconds[workers].append(_run(pool, store, units, decompose.work))
        for pool in pools.values():
            pool.close()
    one, two = (statistics.median(measured) for measured in seconds.values())
    print(f"{len(units)} units, one thread a worker, median of {options.repeats}")
    print(f"one worker {one:.1f} s, two workers {two:.1f} s, ratio {one / two:.2f}")


def _run(pool: WorkerPool, store: RunStore, units: Sequence[Unit], work: Work, *, threads: int = 1) -> float:
    """Do all units and return the seconds."""
    started = time.perf_counter()
    failed = pool.run(work, store, units, threads=threads, progress=StageProgress("benchmark", len(units), 0))
    assert not failed, failed
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
