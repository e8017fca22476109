"""Ray's share of a stage's time: the same units in a plain loop without Ray, and through it.

    python benchmarks/orchestration.py [--repeats 3] [--images 6000] [--stages decompose search sweep-alpha]
    python benchmarks/orchestration.py --trials 1000

One worker with one thread stands against a loop with one thread in one process, in turn: what is more is Ray's. The
stages are decompose and search (long-lived actors) and sweep-alpha (trials of Ray Tune). The start of the workers, and
of a Tune experiment, is measured apart, with a unit that does nothing. `--trials N` runs N trials that do nothing, and
prints the seconds of each and the driver's resident memory.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch
from pipelines.trials import run_trials
from pipelines.workers import WorkerPool

from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.experiment import (
    DataOptions,
    DecompositionOptions,
    FinetuningOptions,
    SupernetOptions,
    SweepOptions,
    TrainingOptions,
)
from gross_ray.presets import quickstart
from gross_ray.run.store import RunStore
from pipelines import decompose, search, supernet, sweep, train
from pipelines.execution.cluster import Cluster, Resources, connected
from pipelines.units import Context, Unit, Work, pack_splits
from pipelines.watching import StageProgress

STAGES = ("decompose", "search", "sweep-alpha")


@dataclass(frozen=True)
class Measured:
    """A stage as it is measured: its units in a run folder, and what does one."""

    units: Callable[[RunStore], Sequence[Unit]]
    work: Work
    tune: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=6000, help="images of each split")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of fine-tuning in the sweep")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--trials", type=int, help="run so many trials that do nothing instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    limits = {f"limit_{split}": options.images for split in ("train", "validation", "test")}
    experiment = replace(
        quickstart(),
        data=DataOptions(name="fashion-mnist", **limits),
        training=TrainingOptions(epochs=1, lr=0.05, milestones=(), batch_size=128, augment=False, seeds=1),
        decomposition=DecompositionOptions(),
        supernet=SupernetOptions(seeds=2),  # so that decompositions and searches take a minute, too
        finetuning=FinetuningOptions(epochs=options.epochs, lr=0.001, milestones=()),
        sweep=SweepOptions(alphas=(0.0, 4.0), scalings=("index",), seeds=1),
    )
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore.create(Path(folder) / "base", experiment)
        # Two slots, of which one works at a time: the pool's worker stays while Tune has its own.
        with connected(Resources(num_cpus=2, device="cpu")) as cluster:
            (_trials if options.trials else _stages)(store, replace(cluster, num_cpus=1), options)


def _stages(base: RunStore, cluster: Cluster, options: argparse.Namespace) -> None:
    splits = load_dataset(base.experiment.data)
    packed = ray.put(pack_splits(splits))
    for unit in train.plan(base):
        train.work(_context(base, splits), unit)
    pool = WorkerPool(cluster, packed)
    _start(lambda: pool.run(_nothing, base, [Unit("none")], threads=1, progress=_silent()), "workers")
    of_tune = _start(lambda: _tune(base, [Unit("none")], _nothing, cluster, packed), "a Tune experiment, its worker")
    supernets = supernet.plan(base)
    of_stage = {
        "decompose": Measured(decompose.plan, decompose.work),
        "search": Measured(lambda store: search.shards(store, supernets), search.work),
        "sweep-alpha": Measured(sweep.plan, sweep.work, tune=True),
    }
    for stage in STAGES:
        measured = of_stage[stage]
        if stage in options.stages:
            if stage == "search":
                for unit in supernets:
                    sweep.work(_context(base, splits), unit)
                context = _context(base, splits, search.load_shared(base, supernets[0].name))
                search.plan_work(context, Unit("plan", {"workers": 1, "threads": 1, "on_device": 1}))
            if stage == "sweep-alpha":
                for unit in supernets:
                    for part in (supernet.RECONSTRUCT, supernet.FINETUNE):
                        base.delete_checkpoint(part, unit.name)
                        base.delete_unit("history", f"{part},{unit.name}")
            seconds: dict[str, list[float]] = {"loop": [], "Ray": []}
            for repeat in range(options.repeats):  # in turn: machines are shared, and their speed drifts
                for name in seconds:
                    copy = shutil.copytree(base.path, base.path.parent / f"{stage} {name} {repeat}")
                    seconds[name].append(_time(measured, name, RunStore.open(copy), splits, pool, cluster, packed))
            loop, through = (statistics.median(each) for each in seconds.values())
            pairs = [1 - one / other for one, other in zip(*seconds.values(), strict=True)]
            print(
                f"{stage}: loop {loop:.1f} s, through Ray {through:.1f} s; Ray's share {1 - loop / through:.1%} of the "
                f"medians of {options.repeats}, {statistics.median(pairs):.1%} the median of the pairs' shares"
                f"{f', {1 - loop / (through - of_tune):.1%} without the start of Tune' if measured.tune else ''}; "
                f"{ {name: [round(one, 1) for one in each] for name, each in seconds.items()} }",
                flush=True,
            )
        if stage == "decompose":  # what the next stages need
            for unit in measured.units(base):
                measured.work(_context(base, splits), unit)
    pool.close()


def _time(
    measured: Measured,
    name: str,
    store: RunStore,
    splits: Splits,
    pool: WorkerPool,
    cluster: Cluster,
    packed: ray.ObjectRef,
) -> float:
    started = time.perf_counter()
    units = measured.units(store)
    if name == "loop":
        for unit in units:
            shared = search.load_shared(store, unit.shared) if unit.shared else None
            measured.work(_context(store, splits, shared), unit)
        failed = {}
    elif measured.tune:
        failed = _tune(store, units, measured.work, cluster, packed)
    else:
        failed = pool.run(
            measured.work,
            store,
            units,
            threads=1,
            progress=_silent(),
            shared=lambda shared: search.load_shared(store, shared),
        )
    assert not failed, failed
    return time.perf_counter() - started


def _trials(store: RunStore, cluster: Cluster, options: argparse.Namespace) -> None:
    packed = ray.put(pack_splits(load_dataset(store.experiment.data)))
    _tune(store, [Unit("none")], _nothing, cluster, packed)
    before, started = _resident(), time.perf_counter()
    units = [Unit(f"trial={number}") for number in range(options.trials)]
    failed = _tune(store, units, _nothing, cluster, packed)
    seconds = time.perf_counter() - started
    assert not failed, failed
    print(
        f"{options.trials} trials that do nothing: {seconds:.1f} s, {1000 * seconds / options.trials:.0f} ms each; "
        f"driver {before:.0f} MiB before, {_resident():.0f} MiB after"
    )


def _tune(
    store: RunStore, units: Sequence[Unit], work: Work, cluster: Cluster, packed: ray.ObjectRef
) -> dict[str, str]:
    return run_trials(
        "benchmark", work, store, units, cluster=cluster, packed_splits=packed, threads=1, progress=_silent()
    )


def _start(action: Callable[[], object], what: str) -> float:
    started = time.perf_counter()
    action()
    seconds = time.perf_counter() - started
    print(f"start of {what}: {seconds:.1f} s", flush=True)
    return seconds


def _nothing(context: Context, unit: Unit) -> str:
    return ""


def _context(store: RunStore, splits: Splits, shared: object = None) -> Context:
    return Context(store, splits, "cpu", lambda *_, **__: None, shared)


def _silent() -> StageProgress:
    return StageProgress("benchmark", 0, 0)


def _resident() -> float:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
