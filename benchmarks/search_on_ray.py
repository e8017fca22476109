"""Search on Ray: two workers against one, Ray's share of the time, the driver's memory for a million configurations.

    python benchmarks/search_on_ray.py [--repeats 5] [--images 2000]
    python benchmarks/search_on_ray.py --million

Two workers with one thread each are compared with one such worker, and one worker with a plain loop over the same
shards in one process: the additional time is Ray's share. Then two workers search the whole 252 x 10,000 images, and
the script prints the share of time in which they were idle. The start of the workers is reported separately.
`--million` searches, stores and reads back 4^10 configurations of a cheap artificial network and prints the driver's
resident memory after each step. The networks are untrained and their decompositions rough: only time and memory are
measured.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from gross_ray import BTDOptions, decompose_model, read_table
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions, Experiment, SearchOptions, SupernetOptions, SweepOptions, TrainingOptions
from gross_ray.models import build_model
from gross_ray.presets import quickstart
from gross_ray.run.opened import Run, save_supernet
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import Budget
from gross_ray.search.cost import count_macs, count_parameters
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.layers import decomposable_layers
from gross_ray.training.loop import EpochRecord
from pipelines.capacity import Capacity
from pipelines.commands.terminal import Reporter
from pipelines.driver import DataSource, Session
from pipelines.execution.actors import Actors
from pipelines.execution.base import Executor
from pipelines.execution.cluster import connected, put
from pipelines.execution.in_process import InProcess
from pipelines.nodes import NodeKind
from pipelines.packing import pack_splits
from pipelines.resources import Resources
from pipelines.stages import finetune, search, supernets
from pipelines.stages.base import history_rows
from pipelines.units import Context, Job, Unit, Work
from pipelines.watching import StageProgress

CHEAP_LAYERS = 10
_PANDAS = """
import pandas, sys
table = pandas.read_parquet(sys.argv[1] + "/tables/configurations")
lines = open("/proc/self/status").read().splitlines()  # ru_maxrss would be the parent's, which was larger
most = int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
print(f"all {len(table)} rows and {len(table.columns)} columns in a process with pandas alone: {most:.0f} MiB at most")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000, help="validation images of the comparison")
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--million", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (_million if options.million else _workers)(Path(folder), options)


def _experiment(data: DataOptions, model: str = "four-conv") -> Experiment:
    return replace(
        quickstart(),
        model=model,
        data=data,
        training=TrainingOptions(seeds=1),
        supernet=SupernetOptions(seeds=1),
        sweep=SweepOptions(alphas=()),
        search=SearchOptions(budgets=(8, 4)),
        validation=replace(quickstart().validation, fixed=(8, 4)),
    )


def _workers(folder: Path, options: argparse.Namespace) -> None:
    experiment = _experiment(DataOptions(name=options.dataset))
    network = build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))
    base = Run(RunStore.create(folder / "base", experiment))
    _store_supernet(base, network, decompose_model(network, options=BTDOptions(max_steps=3)))
    splits = load_dataset(experiment.data)
    few = replace(splits, train=splits.train.first(1), test=splits.test.first(1))
    some = replace(few, validation=splits.validation.first(options.images))
    planning = search.Planning(supernet=supernets.searched(base)[0], workers=2, threads=1, units_on_a_device=2)
    _do(InProcess(base, few, "cpu"), base, [planning], search.plan_work)
    runs = {name: _copy(base, folder / name) for name in ("loop", "one", "two")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    # Three cores, for the pool of one worker and the pool of two; never more than two workers are busy at once.
    with connected(Resources(num_cpus=3, device="cpu")) as capacity:
        started, packed = time.perf_counter(), put(pack_splits(some))
        executors: dict[str, Executor] = {
            "loop": InProcess(runs["loop"], some, "cpu"),
            "one": Actors(_of_workers(capacity, 1), packed, runs["one"]),
            "two": Actors(_of_workers(capacity, 2), packed, runs["two"]),
        }
        for repeat in range(options.repeats + 1):  # alternating: machines are shared, and their speed drifts
            for name, executor in executors.items():
                _restore(base, runs[name])
                spent, _ = _search(executor, runs[name])
                if repeat:
                    seconds[name].append(spent)
            if not repeat:
                print(f"workers started, everything warm after {time.perf_counter() - started:.1f} s")
        for executor in executors.values():
            executor.close()
        loop, one, two = (statistics.median(each) for each in seconds.values())
        print(f"252 configurations, {len(some.validation)} images, one thread a worker, median of {options.repeats}:")
        print(f"loop {loop:.1f} s, one worker {one:.1f} s, two workers {two:.1f} s")
        print(f"two workers against one: {one / two:.2f}; Ray's share of one worker's time: {1 - loop / one:.1%}")
        print({name: [round(each, 2) for each in measured] for name, measured in seconds.items()})
        whole = _copy(base, folder / "whole")
        executor = Actors(_of_workers(capacity, 2), put(pack_splits(few)), whole)
        spent, _ = _search(executor, whole)
        print(f"252 x {len(few.validation)} images on two workers, their start included: {spent:.1f} s")
        _restore(base, whole)
        spent, worked = _search(executor, whole)
        executor.close()
    print(f"once they are up: {spent:.1f} s, of which a worker did nothing {1 - worked / 2 / spent:.1%}")


def _of_workers(capacity: Capacity, number: int) -> Capacity:
    return replace(capacity, nodes=(NodeKind(number, 0.0),))


def _million(folder: Path, _: argparse.Namespace) -> None:
    data = DataOptions(name="sample", limit_train=20, limit_validation=20, limit_test=20)
    store = RunStore.create(folder / "run", _experiment(data, "search_on_ray:cheap"))
    network = cheap()
    empty = empty_supernet(network, {name: (1, 2, 4, 8) for name in decomposable_layers(network)})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in series_layers(empty).values():
            for parameter in layer.series_parameters():
                parameter.normal_(std=0.5, generator=generator)
    _store_supernet(Run(store), network, empty)
    _tell("before")
    with Session.opened(store, Resources(device="cpu"), DataSource(), Reporter()) as session:
        started = time.perf_counter()
        search.do(session)
        _tell(f"searched, stored and selected in {time.perf_counter() - started:.0f} s")
    print(search.best(Run(store), [Budget("parameters", 4000)], 3).to_string(index=False))
    _tell("best under a budget")
    rows = sum(len(store.read_units("configurations", [unit])) for unit in store.finished_units("configurations"))
    _tell(f"{rows} rows read back, a shard at a time")
    chosen = read_table(store.path, "configurations", ["configuration", "macs", "val_accuracy"])
    _tell(f"{len(chosen)} rows of three columns as one frame")
    print(
        subprocess.run(
            [sys.executable, "-c", _PANDAS, str(store.path)], check=True, capture_output=True, text=True
        ).stdout
    )


def cheap(num_classes: int = 10) -> nn.Module:
    """Return ten 3x3 convolutions of 8 channels on 2 x 2 pixels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.AdaptiveAvgPool2d(2), conv0=nn.Conv2d(3, 8, 3, padding=1))
    for number in range(1, CHEAP_LAYERS + 1):
        layers[f"conv{number}"] = nn.Conv2d(8, 8, 3, padding=1)
        layers[f"relu{number}"] = nn.ReLU()
    layers["flatten"], layers["head"] = nn.Flatten(), nn.Linear(32, num_classes)
    return nn.Sequential(layers)


def _timed_work(context: Context, unit: Unit) -> str:
    started = time.perf_counter()
    search.work(context, unit)
    return str(time.perf_counter() - started)


def _store_supernet(run: Run, network: nn.Module, decomposed: nn.Module) -> None:
    """Store the results of earlier stages that the search needs."""
    store, shape = run.store, (3, 32, 32)
    about = {"num_classes": 10, "image_size": 32, "input_shape": shape, "classes": list(map(str, range(10)))}
    store.save_checkpoint("train", "seed=0", network.state_dict(), about)
    row = {"seed": 0, "val_correct": 0, "val_total": 1, "val_accuracy": 0.0, "test_accuracy": 0.0}
    costs = {"macs": count_macs(network, shape), "parameters": count_parameters(network)}
    store.write_table("networks", "seed=0", [row | costs])
    for unit in supernets.searched(run):
        save_supernet(store, finetune.NAME, unit.name, decomposed, unit.values())
        record = EpochRecord(
            epoch=1, lr=0.0, train_loss=0.0, gradient_norm=0.0, val_accuracy=None, seconds=0.0, images_per_second=0.0
        )
        rows = history_rows(finetune.NAME, unit.name, 0, [record])
        store.write_table("history", f"{finetune.NAME},{unit.name}", rows)


def _copy(base: Run, path: Path) -> Run:
    return Run(RunStore.open(shutil.copytree(base.store.path, path)))


def _restore(base: Run, run: Run) -> None:
    """Reset a copied run folder to the content of the base."""
    shutil.rmtree(run.store.path)
    shutil.copytree(base.store.path, run.store.path)
    run.changed()


def _search(executor: Executor, run: Run) -> tuple[float, float]:
    """Return the elapsed seconds, and the seconds in which workers were busy."""
    started = time.perf_counter()
    worked = _do(executor, run, search.plan(run), _timed_work)
    return time.perf_counter() - started, worked


def _do(executor: Executor, run: Run, units: list[Unit], work: Work) -> float:
    """Do the units, each with one thread; return the seconds in which workers were busy, if `work` reports them."""
    job = Job(
        stage="benchmark",
        units=units,
        work=work,
        done=set,
        kind="benchmark",
        num_equal=len(units),
        shared=lambda name: search.load_shared(run.store, name),
    )
    progress = _Times("benchmark", len(units), 0)
    failed = executor.do(job, units, threads=1, progress=progress)
    assert not failed, failed
    run.changed()
    return progress.worked


class _Times(StageProgress):
    worked = 0.0

    def unit_done(self, unit: str, text: str) -> None:
        super().unit_done(unit, text)
        if unit != "plan":
            self.worked += float(text)


def _tell(what: str) -> None:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with open("/proc/self/status", encoding="utf-8") as status:
        now = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))
    print(f"{what}: driver {now:.0f} MiB resident, {most:.0f} MiB at most", flush=True)


if __name__ == "__main__":
    main()
