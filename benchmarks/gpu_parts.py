"""What `benchmarks/on_gpu.py` measures: the cases of each part. Each returns one figure; none needs Ray or TensorLy."""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import decomposition
import search
import supernet as supernets
import torch
import training
from torch import nn

from gross_ray import BTDOptions, SearchSpace, block_term_decomposition, decompose_model, extract
from gross_ray.data.image_set import Splits
from gross_ray.experiment import DataOptions, EngineOptions, Schedule
from gross_ray.models import build_model
from gross_ray.nn.precision import products_at
from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from gross_ray.search.evaluator import Evaluator
from gross_ray.search.options import EvaluationOptions
from gross_ray.search.timing import cpu_clock, cuda_clock, typical_ms
from gross_ray.space import Configuration
from gross_ray.supernet.layers import decomposable_layers, default_group_sizes
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import finetune, train_network
from gross_ray.training.together import Member, finetune_together
from pipelines.commands.terminal import Reporter
from pipelines.driver import DataSource, Session
from pipelines.resources import Resources
from pipelines.stages.pipeline import STAGES
from pipelines.stages.reuse import check_reusable, take_over

ROOT = Path(__file__).resolve().parents[1]
STEPS_WANTED = 3140
"""Steps per second that would bring the preset `fashion` to 10 minutes."""


@dataclass(frozen=True)
class Scale:
    """How much is measured; the defaults are those of a GPU."""

    device: str = "cuda"
    images: int = 10_240
    batch: int = 256
    epochs: int = 4
    """Epochs of a timed training; the first, with captures and compilations, does not count."""
    workers: int = 8
    """Processes of the DataLoader."""
    search_images: int = 10_000
    search_sample: int = 18
    """Configurations that are also run one by one."""
    deep_images: int = 256
    deep: int = 4096
    """Configurations of VGG-16."""
    btd_steps: int | None = None
    """Most steps of a decomposition; None: the library's default."""
    channels: int = 512
    """Channels of the large weights."""
    stacks: tuple[int, ...] = (1, 5, 20)
    networks: tuple[str, ...] = ("four-conv", "vgg16")
    """Networks whose latencies are timed."""
    repeats: int = 20
    """Rounds in which latencies are timed."""
    large_batch: int = 256
    tests: str = ""
    """Part of the names of the tests that are run; empty: all."""
    tests_limit: float = 50
    """Seconds after which the tests are stopped, with the results until then."""
    patience: int = 1
    """How many times the limit of its part a part may take."""
    data: str = ""
    """Folder of CIFAR-10 as Parquet; the miniature takes the sample."""
    reuse: str = ""
    """Run folder whose units the run on CIFAR-10 takes over, like base networks."""
    run: str = ""
    """Run folder of the run on CIFAR-10."""


MINIATURE = Scale(
    device="cpu",
    images=32,
    batch=16,
    epochs=2,
    workers=1,
    search_images=8,
    search_sample=2,
    deep_images=2,
    deep=16,
    btd_steps=2,
    channels=16,
    stacks=(1, 2, 3),
    networks=("four-conv",),
    repeats=1,
    large_batch=2,
    tests="resized_crops",
    tests_limit=300,
    patience=10,
)
"""Everything once, as little as possible of it, on a CPU."""


@dataclass(frozen=True)
class Figure:
    """One measured value."""

    value: float | None
    """None: measuring it failed, as `note` says."""
    unit: str
    ratio: float | None = None
    """How many times as fast as the baseline."""
    baseline: str = ""
    note: str = ""


@dataclass(frozen=True)
class Case:
    """Something to measure."""

    measure: Callable[[], Figure]
    wanted: str = ""
    """The target, if there is one."""


Cases = dict[str, Case]


# (a) Tests


def tests(scale: Scale) -> Cases:
    """Return the case of the library's tests that need a GPU."""
    return {"tests that need a GPU": Case(lambda: _tests(scale), "all pass")}


def _tests(scale: Scale) -> Figure:
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-o", "filterwarnings="]  # the project's name a class of Ray's
    command += [*files, *(["-k", scale.tests] if scale.tests else [])]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=scale.tests_limit
        )
        told, status = done.stdout, f"status {done.returncode}"
    except subprocess.TimeoutExpired as stopped:
        told, status = stopped.stdout or b"", f"stopped after {scale.tests_limit} s"
    text = told.decode(errors="replace")
    print(text, file=sys.stderr)
    ends = dict(re.findall(r"^(\S+::.+) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE))
    ends |= dict.fromkeys(re.findall(r"^ERROR (tests\S+)", text, re.MULTILINE), "ERROR")
    counts = {kind: list(ends.values()).count(kind) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    bad = [name for name, end in ends.items() if end in ("FAILED", "ERROR")]
    note = ", ".join([*(f"{number} {kind.lower()}" for kind, number in counts.items()), status, *bad])
    return Figure(counts["PASSED"], "passed", note=note)


# (b) Training


@cache
def _splits(scale: Scale) -> Splits:
    return supernets.noise(scale.images, torch.device(scale.device))


def _schedule(scale: Scale) -> Schedule:
    return Schedule(epochs=scale.epochs, lr=1e-6, batch_size=scale.batch)


def _four_conv() -> nn.Module:
    return build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))


@cache
def _known(measure: Callable[..., float], *arguments: Any) -> float | None:
    """Return a measurement that others are compared with; None if it fails, which is logged once."""
    try:
        return measure(*arguments)
    except Exception:  # without a baseline, the figures themselves still count
        traceback.print_exc()
        return None


def _against(value: float, unit: str, baseline: str, measure: Callable[..., float], *arguments: Any) -> Figure:
    """Return a figure with its ratio to another measurement, whose name is `baseline`."""
    known = _known(measure, *arguments)
    if known is None:
        return Figure(value, unit, note=f"{baseline} failed, see log.txt")
    return Figure(value, unit, value / known, baseline)


@cache
def _usual(scale: Scale) -> float:
    """Return the images per second of a DataLoader."""
    pictures = training.Pictures(_splits(scale).train.to("cpu"))
    how = argparse.Namespace(device=scale.device, workers=scale.workers)
    return training.usual_rate(pictures, _four_conv().to(scale.device), _schedule(scale), how)


@cache
def _steps_per_second(scale: Scale, kind: str, engine: EngineOptions, members: int = 1) -> float:
    """Return the steps per second of a training; a step of several supernets counts once for each."""
    splits, schedule, device = _splits(scale), _schedule(scale), torch.device(scale.device)
    if kind == "base network":
        history = train_network(_four_conv().to(device), splits, schedule, seed=0, engine=engine)
    elif kind == "configuration":
        history = finetune(supernets.single(4, device), splits, schedule, seed=0, engine=engine)
    else:
        supernet = supernets.random_supernet(device)
        sampler = ConfigurationSampler(SearchSpace.of(supernet), 0.0)
        some = [Member(copy.deepcopy(supernet), seed, sampler) for seed in range(members)]
        outcome = finetune_together(some, splits, schedule, engine=engine)[0]
        if isinstance(outcome, Exception):
            raise outcome
        history = outcome
    return -(-scale.images // scale.batch) / statistics.median(epoch.seconds for epoch in history[1:])


def _fast(scale: Scale, *kernels: str, **more: Any) -> EngineOptions:
    """Return the fastest settings known so far, with kernels to try."""
    precision = "float32" if scale.device == "cpu" else "tf32"
    return EngineOptions(capture=True, precision=precision, kernels=kernels, **more)


def train(scale: Scale) -> Cases:
    """Return the cases of the resident loop against a DataLoader, and of single steps with each kernel."""
    loader = f"DataLoader, {scale.workers} workers"
    cases = {loader: Case(lambda: Figure(_usual(scale), "images/s"))}
    loops = {
        "plain": EngineOptions(),
        "captured": EngineOptions(capture=True),
        "captured, tf32": _fast(scale),
        "bfloat16": EngineOptions(precision="bfloat16"),
    }
    for name, engine in loops.items():
        cases[f"resident loop, {name}"] = Case(lambda engine=engine: _resident(scale, engine, loader), "10 times")
    every: dict[str, list[tuple[str, ...]]] = {
        "base network": [
            *(("fused-sgd",), ("epoch-crops",), ("contiguous",), ("cudnn-benchmark",)),
            ("fused-sgd", "epoch-crops", "cudnn-benchmark"),
        ],
        "configuration": [
            *(("composed",), ("fused-sgd",), ("epoch-crops",), ("contiguous",), ("cudnn-benchmark",)),
            ("composed", "fused-sgd", "epoch-crops", "cudnn-benchmark"),
        ],
        "supernet": [
            *(("composed",), ("products",), ("epoch-crops",), ("contiguous",), ("cudnn-benchmark",)),
            ("composed", "epoch-crops", "cudnn-benchmark"),
        ],
    }
    for kind in every:
        cases[f"steps, {kind}"] = Case(lambda kind=kind: _steps(scale, kind, _fast(scale)), f"{STEPS_WANTED} a second")
    for kind, tried in every.items():
        for kernels in tried:
            case = Case(lambda kind=kind, kernels=kernels: _steps(scale, kind, _fast(scale, *kernels)))
            cases[f"steps, {kind}, {' + '.join(kernels)}"] = case
    compiled = _fast(scale, compile=True)
    for kind in every:
        cases[f"steps, {kind}, torch.compile"] = Case(lambda kind=kind: _steps(scale, kind, compiled))
    return cases


def _resident(scale: Scale, engine: EngineOptions, loader: str) -> Figure:
    images_per_second = _steps_per_second(scale, "base network", engine) * scale.batch
    return _against(images_per_second, "images/s", loader, _usual, scale)


def _steps(scale: Scale, kind: str, engine: EngineOptions) -> Figure:
    rate = _steps_per_second(scale, kind, engine)
    return _against(rate, "steps/s", "captured, tf32", _steps_per_second, scale, kind, _fast(scale))


# (c) Several supernets in one pass


def stacks(scale: Scale) -> Cases:
    """Return the cases of `engine.parallel_seeds`."""
    cases: Cases = {}
    for kernels in ((), ("composed",), ("products",), ("composed", "products")):
        for members in scale.stacks:
            name = ", ".join([f"{members} in one pass", *kernels])
            cases[name] = Case(lambda members=members, kernels=kernels: _stack(scale, members, *kernels))
    return cases


def _stack(scale: Scale, members: int, *kernels: str) -> Figure:
    engine = _fast(scale, *kernels, parallel_seeds=members)
    rate = _steps_per_second(scale, "supernet", engine, members)  # an epoch's seconds are those of one supernet
    baseline = "one by one, captured, tf32"
    return _against(rate, "steps/s", baseline, _steps_per_second, scale, "supernet", _fast(scale))


# (d) Search


def searches(scale: Scale) -> Cases:
    """Return the cases of the search against each configuration on its own."""
    return {
        "252 configurations of four-conv": Case(lambda: _search(scale, "four-conv"), "20 times"),
        f"{scale.deep} configurations of VGG-16": Case(lambda: _search(scale, "vgg16"), "20 times"),
    }


def _search(scale: Scale, network: str) -> Figure:
    if network == "four-conv":
        found = decompose_model(_four_conv(), options=BTDOptions(max_steps=3, tolerance=1e-2))
        chosen, images = list(SearchSpace.of(found)), supernets.noise(scale.search_images, torch.device("cpu")).train
    else:
        how = argparse.Namespace(network=network, images=scale.deep_images)
        found, chosen, images = search.made_up(how)
        chosen = chosen[: scale.deep]
    if scale.device == "cpu":
        chosen = chosen[:4]
    found, images = found.to(scale.device), images.to(scale.device)
    sample = chosen[:: max(1, len(chosen) // scale.search_sample)]
    alone = search.one_by_one(found, images, sample, argparse.Namespace(batches=[250, 2500]))
    form, (seconds, _) = min(alone.items(), key=lambda one: one[1][0])
    best = seconds * len(chosen) / len(sample)
    evaluator = Evaluator(found, EvaluationOptions())
    evaluator.evaluate(images.images[:200], images.labels[:200], chosen[:1])
    started = time.perf_counter()
    evaluator.evaluate(images.images, images.labels, chosen)
    shared = time.perf_counter() - started
    note = f"{len(images)} images; the baseline is scaled up from {len(sample)} configurations"
    return Figure(shared, "s", best / shared, f"one by one, {form}", note)


# (e) Decomposition


def decompositions(scale: Scale) -> Cases:
    """Return the cases of two pairs of a large layer, and of the 19 pairs of four-conv."""
    cases: Cases = {}
    for size in (4, 16):
        shape = (scale.channels, scale.channels)
        name = f"{scale.channels} x {scale.channels} x 3 x 3 at {size}"
        cases[name] = Case(lambda shape=shape, size=size: _decompose(scale, shape, (size,)), "30 s")
    for name, conv in decomposable_layers(_four_conv()).items():
        shape = (conv.out_channels, conv.in_channels)
        sizes = default_group_sizes(conv.in_channels)
        cases[f"{name}, {len(sizes)} pairs"] = Case(lambda shape=shape, sizes=sizes: _decompose(scale, shape, sizes))
    return cases


def _decompose(scale: Scale, shape: tuple[int, int], sizes: tuple[int, ...]) -> Figure:
    weight = decomposition.drawn(*shape).to(scale.device)
    options = BTDOptions() if scale.btd_steps is None else BTDOptions(max_steps=scale.btd_steps)
    warm_up = decomposition.drawn(8, 8).to(scale.device)
    block_term_decomposition(warm_up, 2, options=BTDOptions(max_steps=20))
    started = time.perf_counter()
    found = [block_term_decomposition(weight, size, options=options) for size in sizes]
    seconds = time.perf_counter() - started
    errors = ", ".join(f"{one.relative_error:.4f}" for one in found)
    return Figure(seconds, "s", note=f"errors {errors}; {sum(one.steps for one in found)} steps")


# (f) Latency


def latencies(scale: Scale) -> Cases:
    """Return the cases of whole networks in torch, all layers dense or at one group-size, in both memory formats."""
    cases: Cases = {}
    for network in scale.networks:
        for batch in (1, scale.large_batch):
            for choice in ("dense", "1", "4", "16", "32"):
                for layout in ("channels-last", "contiguous"):
                    name = f"{network}, batch {batch}, {choice}, {layout}"
                    case = Case(
                        lambda key=(choice, layout), network=network, batch=batch: _latency(scale, network, batch, key)
                    )
                    cases[name] = case
    return cases


def _latency(scale: Scale, network: str, batch: int, key: tuple[str, str]) -> Figure:
    times = _all_latencies(scale, network, batch)
    return Figure(times[key], "ms", times["dense", "channels-last"] / times[key], "dense, channels-last")


@cache
def _all_latencies(scale: Scale, network: str, batch: int) -> dict[tuple[str, str], float]:
    device = torch.device(scale.device)
    full = build_model(network, num_classes=10, generator=torch.Generator().manual_seed(0)).eval()
    found = supernets.random_supernet(torch.device("cpu"), full, (1, 4, 16, 32))
    layers = len(SearchSpace.of(found).layers)
    plain = {size: extract(found, Configuration([int(size)] * layers)) for size in ("1", "4", "16", "32")}
    works: dict[Any, Callable[[], object]] = {}
    for choice, one in {"dense": full, **plain}.items():
        formats = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
        for layout, memory_format in formats.items():
            ready = copy.deepcopy(one).eval().to(device=device, memory_format=memory_format)
            images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=memory_format)
            works[choice, layout] = lambda ready=ready, images=images: ready(images)
    clock = cuda_clock(device) if device.type == "cuda" else cpu_clock(1)
    with torch.inference_mode(), products_at("float32", device):
        return typical_ms(works, scale.repeats, clock)


# (g) CIFAR-10


def cifar(scale: Scale) -> Cases:
    """Return a case for each stage of a run, in this process."""
    return {name: Case(lambda name=name: _stage(scale, name)) for name in STAGES}


def _stage(scale: Scale, name: str) -> Figure:
    store, taken = _run_folder(scale)
    resources = Resources(device=scale.device, in_process=True)
    started = time.perf_counter()
    with Session.opened(store, resources, DataSource(), Reporter(), in_process=True) as session:
        STAGES[name].do(session)
        units = len(STAGES[name].plan(session.run))
    note = f"{units} units" + (f", {taken[name]} of them taken over" if taken.get(name) else "")
    return Figure(time.perf_counter() - started, "s", note=note)


@cache
def _run_folder(scale: Scale) -> tuple[RunStore, Mapping[str, int]]:
    """Return the run folder, and the number of units that are taken over, by stage."""
    if scale.device == "cpu":
        small = ["data.limit_train=100", "data.limit_validation=50", "data.limit_test=50", "training.epochs=1"]
        small += ["training.milestones=[]", "training.seeds=1", "decomposition.max_steps=1", "finetuning.epochs=1"]
        small += ["decomposition.restarts=1", "validation.seeds=1", "sweep.alphas=[]", "search.budgets=[4]"]
        experiment = preset("quickstart").override([*small, "validation.fixed=[4]", "search.form=dense"])
    else:
        experiment = replace(preset("cifar-short"), data=DataOptions(name=f"parquet:{scale.data}"), engine=_fast(scale))
    other = RunStore.open(scale.reuse) if scale.reuse else None
    if other is not None:  # networks of another precision would not be taken over
        precision = other.experiment.engine.precision
        experiment = replace(experiment, engine=replace(experiment.engine, precision=precision))
        check_reusable(experiment, other)
    store = RunStore.create(scale.run, experiment)
    return store, {} if other is None else take_over(store, other)


PARTS: dict[str, tuple[Callable[[Scale], Cases], int]] = {
    "tests": (tests, 60),
    "training": (train, 150),
    "stacks": (stacks, 60),
    "search": (searches, 60),
    "decomposition": (decompositions, 90),
    "latency": (latencies, 30),
    "cifar": (cifar, 10_000),
}
"""The parts in their order, each with the most seconds that it may take."""


def of_machine(scale: Scale) -> dict[str, Any]:
    """Return what the figures were measured on."""
    name = torch.cuda.get_device_name() if scale.device == "cuda" else "CPU"
    return {"device": name, "python": sys.version.split()[0], "torch": torch.__version__}
