"""Speed of this checkout against another one: both do the same work, alternating, in new processes.

    python benchmarks/against.py OTHER {search,decomposition,training,orchestration} [--pairs 5] [--size 10]

OTHER is the folder of another checkout (`git worktree add FOLDER COMMIT`), which is the baseline. A search, a
decomposition and a training (base network, reconstruction, fine-tuning of the supernet) are timed inside a process,
without its imports, on one thread; "orchestration" times a whole `gross run` of many small units. One run of each
checkout warms up; then each pair runs both checkouts, in alternating order. The script prints the medians, and their
ratio with a 95 % bootstrap interval over the pairs. The exit status is 1 if the whole interval lies above 1.05: this
checkout is then slower.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from scipy import stats

HERE = Path(__file__).resolve().parents[1]
SLOWER = 1.05
RUN_SETTINGS = (
    *("data.limit_train=100", "data.limit_validation=50", "data.limit_test=50", "training.epochs=1"),
    *("reconstruction.epochs=1", "finetuning.epochs=1", "decomposition.max_steps=1", "decomposition.restarts=1"),
    *("validation.reconstruction.epochs=1", "validation.finetuning.epochs=1", "sweep.alphas=[]"),
)
SEEDS = ("training.seeds", "supernet.seeds", "validation.seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("part", choices=[*PARTS, "orchestration"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", type=int, default=10, help="amount of work; the time is about proportional to it")
    parser.add_argument("--do", action="store_true", help=argparse.SUPPRESS)  # set in processes started below
    options = parser.parse_args()
    if options.do:
        print(_seconds_here(options.part, options.other.resolve(), options.size))
        return
    if not (options.other / "gross_ray").is_dir() or options.pairs < 2:
        parser.error(f"{options.other} is not a checkout of gross_ray, or --pairs is below 2")
    trees = {"other": options.other.resolve(), "this": HERE}
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    for pair in range(options.pairs + 1):
        for name in sorted(trees, reverse=bool(pair % 2)):
            spent = _seconds(trees[name], options.part, options.size)
            if pair:
                seconds[name].append(spent)
    this, other = (np.array(seconds[name]) for name in ("this", "other"))
    found = stats.bootstrap((this, other), _ratio, paired=True, vectorized=True, method="percentile", rng=0)
    low, high = found.confidence_interval
    print(f"{options.part}, size {options.size}: this {median(this):.2f} s, other {median(other):.2f} s")
    print(f"  this: {np.round(this, 2).tolist()}; other: {np.round(other, 2).tolist()}")
    print(f"ratio of medians {median(this) / median(other):.3f} ({low:.3f} to {high:.3f}, {options.pairs} pairs)")
    if low > SLOWER:
        sys.exit(f"slower than {trees['other']} by more than {SLOWER - 1:.0%}")


def _ratio(this: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
    return np.median(this, axis=axis) / np.median(other, axis=axis)


def _seconds(tree: Path, part: str, size: int) -> float:
    """Return the seconds that a part takes in a new process of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", __file__, str(tree), part, "--size", str(size), "--do"]
        if part == "orchestration":
            settings = [*RUN_SETTINGS, *(f"{name}={size}" for name in SEEDS)]
            command = [sys.executable, "-P", "-c", "from cli import main; main()", "run", "--preset", "quickstart"]
            command += ["--out", f"{folder}/run", "--num-cpus", "2", "--device", "cpu"]
            command += [word for setting in settings for word in ("--set", setting)]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        spent = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{part} fails in {tree}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return spent if part == "orchestration" else float(done.stdout.splitlines()[-1])


def _seconds_here(part: str, tree: Path, size: int) -> float:
    import torch

    import gross_ray

    assert Path(gross_ray.__file__).is_relative_to(tree), f"{gross_ray.__file__} is not in {tree}"
    torch.set_num_threads(1)
    return PARTS[part](size)


def _search(size: int) -> float:
    from gross_ray import BTDOptions, decompose_model, evaluate_configurations

    network, splits = _network_and_images(20 * size)
    supernet = decompose_model(network, options=BTDOptions(max_steps=3))
    started = time.perf_counter()
    evaluate_configurations(supernet, splits.train.images, splits.train.labels)
    return time.perf_counter() - started


def _decomposition(size: int) -> float:
    from gross_ray import BTDOptions, block_term_decomposition

    network, _ = _network_and_images(1)
    started = time.perf_counter()
    for seed in range(size):
        for layer, group_size in (("conv2", 4), ("conv3", 16), ("conv4", 8)):
            weight = network.get_submodule(layer).weight
            block_term_decomposition(weight, group_size, options=BTDOptions(max_steps=40), seed=seed)
    return time.perf_counter() - started


def _training(size: int) -> float:
    from gross_ray import BTDOptions, SearchSpace, decompose_model
    from gross_ray.experiment import Schedule
    from gross_ray.training.sampling import ConfigurationSampler
    from gross_ray.training.stages import finetune, reconstruct, train_network

    network, splits = _network_and_images(256)
    supernet = decompose_model(network, options=BTDOptions(max_steps=3))
    sampler, schedule = (
        ConfigurationSampler(SearchSpace.of(supernet), 0.0),
        Schedule(epochs=size, lr=1e-6, batch_size=64),
    )
    started = time.perf_counter()
    train_network(network, splits, schedule, seed=0)
    reconstruct(supernet, network, splits, schedule, seed=0, sampler=sampler)
    finetune(supernet, splits, schedule, seed=0, sampler=sampler)
    return time.perf_counter() - started


def _network_and_images(number: int):  # noqa: ANN202  (the types come from the imported checkout)
    import torch

    from gross_ray.data.images import load_dataset
    from gross_ray.experiment import DataOptions
    from gross_ray.models import build_model

    network = build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))
    return network, load_dataset(DataOptions(name="sample", limit_train=number, limit_validation=1, limit_test=1))


PARTS = {"search": _search, "decomposition": _decomposition, "training": _training}

if __name__ == "__main__":
    main()
