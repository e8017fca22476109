"""Block term decomposition: ours against the off-the-shelf scheme.

    python benchmarks/decomposition.py                        the 19 pairs of the four-conv network
    python benchmarks/decomposition.py --seeds 20             how many of 20 seeds are no worse than that scheme
    python benchmarks/decomposition.py --large 256 --sizes 16 random weights of 256 x 256 x 3 x 3 instead, at g = 16
    python benchmarks/decomposition.py --large 512 --alone    ours, without the baseline

Baseline, in the same run on the same cores: the cyclic scheme with TensorLy. It fits one term after another by
`partial_tucker` to the residual of the other terms, until a sweep lowers the relative error by less than 1e-6, for at
most `--cap` seconds per case. Ours runs twice: without the ridge (the same problem), with the seconds until its error
is no higher than the baseline's final one; and with the default options (with the ridge). Every case runs in its own
process, so that its peak memory is known. The network's weights are read from `--weights` or trained for two epochs on
the sample. The large weights are random, with spectra that decay like those of trained layers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gross_ray import BlockTerms, BTDOptions, block_term_decomposition
from gross_ray.btd.solver import block_term_decompositions, default_restarts
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions, Schedule
from gross_ray.models import build_model
from gross_ray.supernet.layers import decomposable_layers, default_group_sizes
from gross_ray.training.stages import train_network

FREE = BTDOptions(ridge=0.0)
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """The result of one scheme for one weight."""

    error: float
    seconds: float
    steps: int
    cancellation: float
    peak_mib: float
    """Peak resident memory minus that before the scheme started."""
    stopped: bool = False
    """The baseline was stopped at its cap."""
    reached: float | None = None
    """Seconds until the error was no higher than the baseline's."""

    def __str__(self) -> str:
        """Return the cells of the table."""
        return f"{self.error:.5f} {self.cancellation:5.2f} {self.steps:5d} {self.seconds:7.2f} {self.peak_mib:5.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap", type=float, default=20, help="seconds for each case of the baseline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", nargs="+", default=["conv2", "conv3", "conv4"])
    parser.add_argument("--weights", type=Path, help="state dict of a trained four-conv network")
    parser.add_argument("--seeds", type=int, default=0, help="number of seeds to compare with the baseline")
    parser.add_argument("--large", type=int, nargs="+", default=[], help="channels of random layers to use instead")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 32], help="group-sizes of the large layers")
    parser.add_argument("--alone", action="store_true", help="large layers without the baseline")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}, baseline stopped at {options.cap:g} s per case (+)")
    if options.large:
        _large(options)
    else:
        _network(options)


def _network(options: argparse.Namespace) -> None:
    network = build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))
    if options.weights:
        network.load_state_dict(torch.load(options.weights, weights_only=True))
    else:
        schedule = Schedule(epochs=2, lr=0.05, batch_size=128, augment="none")
        train_network(network, load_dataset(DataOptions(limit_validation=100)), schedule, seed=0)
    layers = {name: conv.weight.detach() for name, conv in decomposable_layers(network).items()}
    print("layer g | ours, no ridge: error cancellation steps s MiB | default: the same, error above no ridge ", end="")
    print("| cyclic: error s MiB | s to its error | ratio of s, to its error")
    totals = dict.fromkeys(("cyclic", "ours", "reached"), 0.0)
    for layer in options.layers:
        for size in default_group_sizes(layers[layer].shape[1]):
            cyclic, free, default = _compare(layers[layer], size, options)
            totals["cyclic"] += cyclic.seconds
            totals["ours"] += free.seconds
            totals["reached"] += _reached(free)
            _print_row(layer, size, cyclic, free, default)
            if size == 1:
                error, seconds = _in_process(_parafac, layers[layer].double(), options)
                print(f"    parafac, best of three: {error:.5f} in {seconds:.1f} s", flush=True)
            if options.seeds:
                _print_seeds(layers[layer], size, cyclic.error, options)
    print(
        f"total s: cyclic {totals['cyclic']:.1f}, ours {totals['ours']:.1f}, to its error {totals['reached']:.1f}; ",
        end="",
    )
    print(f"ratios {totals['cyclic'] / totals['ours']:.1f}, {totals['cyclic'] / totals['reached']:.1f} or more")


def _large(options: argparse.Namespace) -> None:
    for channels in options.large:
        name, weight = f"{channels} x {channels} x 3 x 3", drawn(channels, channels)
        for size in options.sizes:
            if options.alone:
                result = _in_process(_ours, weight, size, BTDOptions(), options)
                print(f"{name} {size:3d} | default: {result}", flush=True)
                continue
            cyclic, free, default = _compare(weight, size, options)
            _print_row(name, size, cyclic, free, default)
            if options.seeds:
                _print_seeds(weight, size, cyclic.error, options)


def _compare(weight: Tensor, size: int, options: argparse.Namespace) -> tuple[Result, Result, Result]:
    cyclic = _in_process(_cyclic, weight.double(), size, options.cap, options)
    free = _in_process(_ours, weight, size, FREE, options, cyclic.error)
    return cyclic, free, _in_process(_ours, weight, size, BTDOptions(), options)


def _print_row(name: str, size: int, cyclic: Result, free: Result, default: Result) -> None:
    more = "+" if cyclic.stopped else " "
    above = f"{100 * (default.error / free.error - 1):+.2f} %" if free.error > 1e-9 else "exact"
    never = " never" if free.steps and free.reached is None else ""
    cells = (
        f"{name} {size:3d}",
        str(free),
        f"{default} {above}",
        f"{cyclic.error:.5f} {cyclic.seconds:6.1f}{more} {cyclic.peak_mib:4.0f}",
        f"{_reached(free):.2f}{never}",
        f"{cyclic.seconds / free.seconds:.1f}{more} {cyclic.seconds / _reached(free):.1f}{more}",
    )
    print(" | ".join(cells), flush=True)


def _reached(free: Result) -> float:
    return free.seconds if free.reached is None else free.reached


def _print_seeds(weight: Tensor, size: int, error: float, options: argparse.Namespace) -> None:
    if size == weight.shape[1]:
        return  # solved in closed form
    together = options.seeds if default_restarts(weight) > 1 else 1  # large layers do not gain from one pass
    errors = torch.tensor(
        [
            terms.relative_error
            for first in range(100, 100 + options.seeds, together)
            for terms in block_term_decompositions(
                [weight] * together, size, options=FREE, seeds=range(first, first + together)
            )
        ]
    )
    within = int((errors <= error + 0.001).sum())
    print(
        f"    {within} of {options.seeds} seeds within 0.001; mean {errors.mean():.5f}, highest {errors.max():.5f}",
        flush=True,
    )


def drawn(out_channels: int, in_channels: int) -> Tensor:
    """Return a random weight (C_out, C_in, 3, 3) whose channels' spectra decay like those of trained layers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    fall_out, fall_in = (torch.arange(1, size + 1, dtype=torch.float64) ** -0.5 for size in (out_channels, in_channels))
    turn_out, turn_in = (torch.linalg.qr(normal(size, size))[0] for size in (out_channels, in_channels))
    rough = normal(out_channels, in_channels, 3, 3)
    strong = torch.einsum("xyhw,x,y,ox,iy->oihw", rough, fall_out, fall_in, turn_out, turn_in)
    noise = normal(*strong.shape)
    return strong / strong.norm() + 0.5 * noise / noise.norm()


def _in_process(work: Callable[..., T], *arguments: Any) -> T:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _peak(before: int) -> float:
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _ours(
    weight: Tensor, size: int, btd: BTDOptions, options: argparse.Namespace, target: float | None = None
) -> Result:
    torch.set_num_threads(options.threads)
    block_term_decomposition(torch.randn(8, 8, 3, 3), 2, options=BTDOptions(max_steps=20))  # warm-up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    reached: list[float] = []

    def on_step(_: int, value: float) -> None:
        if target is not None and not reached and value <= target:
            reached.append(time.perf_counter() - started)

    terms: BlockTerms = block_term_decomposition(weight, size, options=btd, on_step=on_step)
    return Result(
        error=terms.relative_error,
        seconds=time.perf_counter() - started,
        steps=terms.steps,
        cancellation=terms.cancellation,
        peak_mib=_peak(before),
        reached=reached[0] if reached else None,
    )


def _cyclic(weight: Tensor, group_size: int, cap: float, options: argparse.Namespace) -> Result:
    import tensorly as tl
    from tensorly.decomposition import partial_tucker

    torch.set_num_threads(options.threads)
    tl.set_backend("pytorch")
    groups = weight.shape[1] // group_size
    ranks = [min(group_size, weight.shape[0]), group_size]
    partial_tucker(torch.randn(8, 8, 3, 3, dtype=torch.float64), rank=[2, 2], modes=[0, 1])  # warm-up
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    terms = [torch.zeros_like(weight) for _ in range(groups)]
    rest, norm, error = weight.clone(), float(weight.norm()), 1.0
    steps, stopped, ended = 0, False, False
    started = time.perf_counter()
    while not ended and not stopped:
        for place in range(groups):
            rest = rest + terms[place]
            (core, factors), _ = partial_tucker(rest, rank=ranks, modes=[0, 1], tol=1e-6)
            terms[place] = tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
            rest = rest - terms[place]
            stopped = time.perf_counter() - started > cap
            if stopped:
                break
        steps += 1
        before, error = error, float(rest.norm()) / norm
        ended = not stopped and before - error < 1e-6
    seconds = time.perf_counter() - started
    cancellation = float(torch.stack(terms).norm()) / norm
    return Result(error, seconds, steps, cancellation, _peak(memory), stopped)


def _parafac(weight: Tensor, options: argparse.Namespace) -> tuple[float, float]:
    import tensorly as tl
    from tensorly.decomposition import parafac

    torch.set_num_threads(options.threads)
    tl.set_backend("pytorch")
    tensor = weight.flatten(2)
    started = time.perf_counter()
    errors = []
    for seed in range(3):
        model = parafac(tensor, rank=weight.shape[1], init="random", random_state=seed, n_iter_max=2000, tol=1e-8)
        errors.append(float((tensor - tl.cp_to_tensor(model)).norm() / tensor.norm()))
    return min(errors), time.perf_counter() - started


if __name__ == "__main__":
    main()
