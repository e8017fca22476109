"""Ray's share of a stage's time: the same units in a plain loop without Ray, and through Ray.

    python benchmarks/orchestration.py [--repeats 3] [--images 6000] [--stages decompose search sweep-alpha]
    python benchmarks/orchestration.py --trials 1000

One Ray worker with one thread alternates with a loop in this process with one thread (the executor of `--in-process`):
the difference is Ray's share. The stages are decompose and search (long-lived actors) and sweep-alpha (trials of Ray
Tune). The start of the worker, and of a Tune experiment, is measured separately, with an empty unit. `--trials N` runs
N empty trials, and prints the time of each and the driver's resident memory.
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

import torch

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
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from pipelines.capacity import Capacity
from pipelines.execution.actors import Actors
from pipelines.execution.base import Executor
from pipelines.execution.cluster import connected, put
from pipelines.execution.in_process import InProcess
from pipelines.execution.tune import Trials
from pipelines.nodes import NodeKind
from pipelines.packing import pack_splits
from pipelines.resources import Resources
from pipelines.stages import decompose, search, supernets, sweep, train
from pipelines.units import Context, Job, Unit, Work
from pipelines.watching import StageProgress


@dataclass(frozen=True, kw_only=True)
class Nothing(Unit):
    """A unit that does nothing."""

    number: int = 0

    @property
    def name(self) -> str:
        """The name of the unit, for example number=0."""
        return f"number={self.number}"


@dataclass(frozen=True)
class Measured:
    """A measured stage: the function that lists its units in a run, and the work that does one unit."""

    units: Callable[[Run], Sequence[Unit]]
    work: Work
    trials: bool = False


STAGES = {
    "decompose": Measured(decompose.plan, decompose.work),
    "search": Measured(search.plan, search.work),
    "sweep-alpha": Measured(sweep.plan, sweep.work, trials=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=6000, help="images of each split")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of fine-tuning in the sweep")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="tolerance of the decompositions")
    parser.add_argument("--dataset", default="fashion-mnist", help="if it is missing, choose sample, which is embedded")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--trials", type=int, help="run this many empty trials instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    limits = {f"limit_{split}": options.images for split in ("train", "validation", "test")}
    experiment = replace(
        quickstart(),
        data=DataOptions(name=options.dataset, **limits),
        training=TrainingOptions(epochs=1, lr=0.05, milestones=(), batch_size=128, augment="none", seeds=1),
        decomposition=DecompositionOptions(tolerance=options.tolerance),
        supernet=SupernetOptions(seeds=2),  # two, so that decompositions and searches also take a minute
        finetuning=FinetuningOptions(epochs=options.epochs, lr=0.001, milestones=()),
        sweep=SweepOptions(alphas=(0.0, 4.0), scalings=("index",), seeds=1),
    )
    with tempfile.TemporaryDirectory() as folder, connected(Resources(num_cpus=2, device="cpu")) as found:
        capacity = replace(found, nodes=(NodeKind(1, 0.0),))  # one worker at a time
        run = Run(RunStore.create(Path(folder) / "base", experiment))
        (_trials if options.trials else _stages)(run, capacity, options)


def _stages(run: Run, capacity: Capacity, options: argparse.Namespace) -> None:
    splits = load_dataset(run.experiment.data)
    loop, packed = InProcess(run, splits, "cpu"), put(pack_splits(splits))
    _do(loop, run, train.plan(run), train.work)
    if "decompose" in options.stages:
        _compare("decompose", run, splits, packed, capacity, options.repeats)
    _do(loop, run, decompose.plan(run), decompose.work)
    if "sweep-alpha" in options.stages:  # before the search's supernets are trained: the sweep trains one of them
        _compare("sweep-alpha", run, splits, packed, capacity, options.repeats)
    if "search" in options.stages:
        searched = supernets.searched(run)
        _do(loop, run, searched, sweep.work)
        planning = search.Planning(supernet=searched[0], workers=1, threads=1, units_on_a_device=1)
        _do(loop, run, [planning], search.plan_work)
        _compare("search", run, splits, packed, capacity, options.repeats)


def _compare(stage: str, base: Run, splits: Splits, packed: object, capacity: Capacity, repeats: int) -> None:
    """Print the seconds of a stage in a loop and through Ray, each in its own copy of the base run folder."""
    measured, seconds = STAGES[stage], {"loop": [], "Ray": []}
    runs = {name: _copy(base, f"{stage} {name}") for name in seconds}
    through = (Trials if measured.trials else Actors)(capacity, packed, runs["Ray"])
    executors: dict[str, Executor] = {"loop": InProcess(runs["loop"], splits, "cpu"), "Ray": through}
    started = time.perf_counter()
    _do(through, runs["Ray"], [Nothing()], _nothing, trials=measured.trials)
    start = time.perf_counter() - started
    print(
        f"start of {'a Tune experiment and its worker' if measured.trials else 'the worker'}: {start:.1f} s", flush=True
    )
    for _ in range(repeats):  # alternating: machines are shared, and their speed drifts
        for name, executor in executors.items():
            run = runs[name]
            shutil.rmtree(run.store.path)
            shutil.copytree(base.store.path, run.store.path)
            run.changed()
            started = time.perf_counter()
            _do(executor, run, measured.units(run), measured.work, trials=measured.trials)
            seconds[name].append(time.perf_counter() - started)
    through.close()
    loop, ray = (statistics.median(each) for each in seconds.values())
    pairs = [1 - one / other for one, other in zip(*seconds.values(), strict=True)]
    print(
        f"{stage}: loop {loop:.1f} s, through Ray {ray:.1f} s; Ray's share {1 - loop / ray:.1%} of the "
        f"medians of {repeats}, {statistics.median(pairs):.1%} the median of the pairs' shares"
        f"{f', {1 - loop / (ray - start):.1%} without the start of Tune' if measured.trials else ''}; "
        f"{ {name: [round(one, 1) for one in each] for name, each in seconds.items()} }",
        flush=True,
    )


def _trials(run: Run, capacity: Capacity, options: argparse.Namespace) -> None:
    executor = Trials(capacity, put(pack_splits(load_dataset(run.experiment.data))), run)
    _do(executor, run, [Nothing()], _nothing, trials=True)
    before, started = _resident(), time.perf_counter()
    _do(executor, run, [Nothing(number=number) for number in range(options.trials)], _nothing, trials=True)
    seconds = time.perf_counter() - started
    print(
        f"{options.trials} trials that do nothing: {seconds:.1f} s, {1000 * seconds / options.trials:.0f} ms each; "
        f"driver {before:.0f} MiB before, {_resident():.0f} MiB after"
    )


def _do(executor: Executor, run: Run, units: Sequence[Unit], work: Work, *, trials: bool = False) -> None:
    job = Job(
        stage="benchmark",
        units=units,
        work=work,
        done=set,
        kind="benchmark",
        num_equal=len(units),
        trials=trials,
        shared=lambda name: search.load_shared(run.store, name),
    )
    failed = executor.do(job, units, threads=1, progress=StageProgress("benchmark", len(units), 0))
    assert not failed, failed
    run.changed()


def _nothing(context: Context, unit: Nothing) -> str:
    return ""


def _copy(base: Run, name: str) -> Run:
    return Run(RunStore.open(shutil.copytree(base.store.path, base.store.path.with_name(name))))


def _resident() -> float:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
