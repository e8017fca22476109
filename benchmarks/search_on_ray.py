"""The search on Ray: two workers against one, Ray's share of the time, and the driver's memory for a million.

    python benchmarks/search_on_ray.py [--repeats 5] [--images 2000]
    python benchmarks/search_on_ray.py --million

Two workers with one thread each stand against one such worker, and one worker against the same shards done by a plain
loop in one process: what is more is Ray's. Then the whole 252 x 10,000 images on two workers, with the share of the
workers' time in which they did not work. The start of the workers is reported beside. `--million` searches, stores and
reads back 4^10 configurations of a made-up cheap network and prints the driver's resident memory at each point. The
networks are untrained, their decompositions rough: only time and memory are measured.
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
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ray
import torch
from pipelines.networks import history_rows, save_supernet
from pipelines.session import DataSource, Session
from pipelines.workers import WorkerPool
from torch import nn

from gross_ray import BTDOptions, decompose_model, model_names, models, read_table
from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions, Experiment, SearchOptions, SupernetOptions, SweepOptions, TrainingOptions
from gross_ray.models import build_model
from gross_ray.presets import quickstart
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import Budget
from gross_ray.search.cost import count_macs, count_parameters
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.layers import decomposable_layers
from gross_ray.training.loop import EpochRecord
from pipelines import search, supernet
from pipelines.commands.terminal import Reporter
from pipelines.execution.cluster import Resources, connected
from pipelines.units import Context, Unit, Work, pack_splits
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
    )


def _workers(folder: Path, options: argparse.Namespace) -> None:
    experiment = _experiment(DataOptions(name=options.dataset))
    network = build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))
    base = RunStore.create(folder / "base", experiment)
    _store_supernet(base, network, decompose_model(network, options=BTDOptions(max_steps=3)))
    splits = load_dataset(experiment.data)
    few = replace(splits, train=splits.train.first(1), test=splits.test.first(1))
    some = replace(few, validation=splits.validation.first(options.images))
    seconds: dict[str, list[float]] = {"loop": [], "one": [], "two": []}
    # Three slots for the one and the two workers; never more than two of them work at a time.
    with connected(Resources(num_cpus=3, device="cpu")) as cluster:
        _plan(base, few)
        started = time.perf_counter()
        pools = {
            name: WorkerPool(replace(cluster, num_cpus=workers), ray.put(pack_splits(some)))
            for name, workers in (("one", 1), ("two", 2))
        }
        for repeat in range(options.repeats + 1):  # in turn: machines are shared, and their speed drifts
            for name in seconds:
                store = RunStore.open(shutil.copytree(base.path, folder / f"{name}{repeat}"))
                spent = _loop(store, some) if name == "loop" else _pooled(pools[name], store)[0]
                if repeat:
                    seconds[name].append(spent)
            if not repeat:
                print(f"workers started, everything warm after {time.perf_counter() - started:.1f} s")
        for pool in pools.values():
            pool.close()
        loop, one, two = (statistics.median(each) for each in seconds.values())
        print(f"252 configurations, {len(some.validation)} images, one thread a worker, median of {options.repeats}:")
        print(f"loop {loop:.1f} s, one worker {one:.1f} s, two workers {two:.1f} s")
        print(f"two workers against one: {one / two:.2f}; Ray's share of one worker's time: {1 - loop / one:.1%}")
        print({name: [round(each, 2) for each in measured] for name, measured in seconds.items()})
        pool = WorkerPool(replace(cluster, num_cpus=2), ray.put(pack_splits(few)))
        started = time.perf_counter()
        _pooled(pool, RunStore.open(shutil.copytree(base.path, folder / "warm")))
        print(f"252 x {len(few.validation)} images on two workers, their start included: ", end="")
        print(f"{time.perf_counter() - started:.1f} s")
        spent, worked = _pooled(pool, RunStore.open(shutil.copytree(base.path, folder / "whole")))
        pool.close()
    print(f"once they are up: {spent:.1f} s, of which a worker did nothing {1 - worked / 2 / spent:.1%}")


def _million(folder: Path, options: argparse.Namespace) -> None:
    _register()
    data = DataOptions(name="sample", limit_train=20, limit_validation=20, limit_test=20)
    store = RunStore.create(folder / "run", _experiment(data, "cheap"))
    network = _cheap(10, 32)
    empty = empty_supernet(network, {name: (1, 2, 4, 8) for name in decomposable_layers(network)})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in series_layers(empty).values():
            for parameter in layer.series_parameters():
                parameter.normal_(std=0.5, generator=generator)
    _store_supernet(store, network, empty)
    search.work, search.plan_work = _CheapWork("work"), _CheapWork("plan_work")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    _tell("before")
    with Session.opened(store, Resources(device="cpu"), DataSource(), Reporter()) as session:
        started = time.perf_counter()
        search.run(session)
        _tell(f"searched, stored and selected in {time.perf_counter() - started:.0f} s")
    print(search.best(store, [Budget("parameters", 4000)], 3).to_string(index=False))
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


def _cheap(num_classes: int, image_size: int) -> nn.Module:
    """Return ten 3x3 convolutions of 8 channels on 2 x 2 pixels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.AdaptiveAvgPool2d(2), conv0=nn.Conv2d(3, 8, 3, padding=1))
    for number in range(1, CHEAP_LAYERS + 1):
        layers[f"conv{number}"] = nn.Conv2d(8, 8, 3, padding=1)
        layers[f"relu{number}"] = nn.ReLU()
    layers["flatten"], layers["head"] = nn.Flatten(), nn.Linear(32, num_classes)
    return nn.Sequential(layers)


class _CheapWork:
    """A function of `search` for workers, which learn of the cheap network as they unpickle it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Callable[[str], Work], tuple[str]]:
        return _in_worker, (self.name,)

    def __call__(self, context: Context, unit: Unit) -> str:
        raise NotImplementedError("the driver does no units")


def _in_worker(name: str) -> Work:
    _register()
    work: Work = getattr(search, name)
    return work


def _register() -> None:
    """Add the network "cheap" to this process's."""
    models.MODELS["cheap"] = _cheap  # through its module: a pickled function takes copies of its globals along
    model_names.NAMES.append("cheap")


def _timed_work(context: Context, unit: Unit) -> str:
    started = time.perf_counter()
    search.work(context, unit)
    return str(time.perf_counter() - started)


def _store_supernet(store: RunStore, network: nn.Module, decomposed: nn.Module) -> None:
    """Store what the search needs from the stages before it."""
    about = {"num_classes": 10, "image_size": 32, "classes": list(map(str, range(10)))}
    store.save_checkpoint("train", "seed=0", network.state_dict(), about)
    row = {"seed": 0, "val_correct": 0, "val_total": 1, "val_accuracy": 0.0, "test_accuracy": 0.0}
    costs = {"macs": count_macs(network, (3, 32, 32)), "parameters": count_parameters(network)}
    store.write_table("networks", "seed=0", [row | costs])
    for unit in supernet.plan(store):
        save_supernet(store, supernet.FINETUNE, unit.name, decomposed, dict(unit.arguments))
        record = EpochRecord(
            epoch=1, lr=0.0, train_loss=0.0, gradient_norm=0.0, val_accuracy=None, seconds=0.0, images_per_second=0.0
        )
        rows = history_rows(supernet.FINETUNE, unit.name, 0, [record])
        store.write_table("history", f"{supernet.FINETUNE},{unit.name}", rows)


def _context(store: RunStore, splits: Splits) -> Context:
    shared = search.load_shared(store, supernet.plan(store)[0].name)
    return Context(store, splits, "cpu", lambda *_, **__: None, shared)


def _plan(store: RunStore, splits: Splits) -> None:
    search.plan_work(_context(store, splits), Unit("plan", {"workers": 2, "threads": 1, "on_device": 2}))


def _loop(store: RunStore, splits: Splits) -> float:
    started = time.perf_counter()
    context = _context(store, splits)
    for unit in search.plan(store):
        search.work(context, unit)
    return time.perf_counter() - started


def _pooled(pool: WorkerPool, store: RunStore) -> tuple[float, float]:
    """Return the seconds that passed, and those in which workers worked."""
    units: Sequence[Unit] = search.plan(store)
    progress = _Times("benchmark", len(units), 0)
    started = time.perf_counter()
    failed = pool.run(
        _timed_work, store, units, threads=1, progress=progress, shared=lambda name: search.load_shared(store, name)
    )
    assert not failed, failed
    return time.perf_counter() - started, progress.worked


class _Times(StageProgress):
    worked = 0.0

    def unit_done(self, unit: str, text: str) -> None:
        super().unit_done(unit, text)
        self.worked += float(text)


def _tell(what: str) -> None:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with open("/proc/self/status", encoding="utf-8") as status:
        now = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))
    print(f"{what}: driver {now:.0f} MiB resident, {most:.0f} MiB at most", flush=True)


if __name__ == "__main__":
    main()
