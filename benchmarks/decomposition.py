"""Block term decomposition: ours against the off-the-shelf scheme, on the four-conv network's layers.

    python benchmarks/decomposition.py [--cap 20] [--threads 2] [--layers conv2]

Baseline, in the same run on the same cores: the cyclic scheme with TensorLy, for each term in turn `partial_tucker` of
what the others leave, until a sweep lowers the relative error by less than 1e-6, given `--cap` seconds a case. The
weights are those of a network trained for two epochs on the sample; ours has its default options.
"""

from __future__ import annotations

import argparse
import time

import tensorly as tl
import torch
from tensorly.decomposition import partial_tucker

from gross_ray import block_term_decomposition
from gross_ray.data.images import load_dataset
from gross_ray.decomposition.surgery import default_group_sizes
from gross_ray.experiment import DataOptions, Schedule
from gross_ray.models import build_model
from gross_ray.training.stages import train_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap", type=float, default=20, help="seconds for each case of the baseline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", nargs="+", default=["conv2", "conv3", "conv4"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tl.set_backend("pytorch")
    network = build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(epochs=2, lr=0.05, batch_size=128, augment=False)
    train_network(network, load_dataset(DataOptions(limit_validation=100)), schedule, seed=0)
    print(f"{options.threads} threads, torch {torch.__version__}, tensorly {tl.__version__}")
    print("layer  g  | ours: error  cancellation  steps  s | cyclic: error  s | ratio of times")
    ours_total = theirs_total = 0.0
    for layer in options.layers:
        weight = network.get_submodule(layer).weight.detach()
        for size in default_group_sizes(weight.shape[1]):
            started = time.perf_counter()
            ours = block_term_decomposition(weight, size)
            ours_seconds = time.perf_counter() - started
            error, seconds, stopped = _cyclic(weight.double(), size, options.cap)
            ours_total, theirs_total = ours_total + ours_seconds, theirs_total + seconds
            print(
                f"{layer} {size:3d} | {ours.relative_error:.4f} {ours.cancellation:.2f} {ours.steps:5d} "
                f"{ours_seconds:6.2f} | {error:.4f} {seconds:6.1f}{'+' if stopped else ' '} | "
                f"{seconds / ours_seconds:.1f}{'+' if stopped else ''}",
                flush=True,
            )
    print(f"total: ours {ours_total:.1f} s, cyclic {theirs_total:.1f} s (+: stopped at the cap), ", end="")
    print(f"ratio {theirs_total / ours_total:.1f} or more")


def _cyclic(weight: torch.Tensor, group_size: int, cap: float) -> tuple[float, float, bool]:
    groups = weight.shape[1] // group_size
    ranks = [min(group_size, weight.shape[0]), group_size]
    terms = [torch.zeros_like(weight) for _ in range(groups)]
    rest, norm, before = weight.clone(), weight.norm(), float("inf")
    started = time.perf_counter()
    while True:
        for place in range(groups):
            rest = rest + terms[place]
            (core, factors), _ = partial_tucker(rest, rank=ranks, modes=[0, 1], tol=1e-6)
            terms[place] = tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
            rest = rest - terms[place]
            if time.perf_counter() - started > cap:
                return float(rest.norm() / norm), time.perf_counter() - started, True
        error = float(rest.norm() / norm)
        if before - error < 1e-6:
            return error, time.perf_counter() - started, False
        before = error


if __name__ == "__main__":
    main()
