"""Evaluating many configurations: shared prefixes against one configuration at a time.

    python benchmarks/search.py                        four-conv, all 252 configurations, 10,000 images
    python benchmarks/search.py --network resnet18     1,000 random configurations of 4^16
    python benchmarks/search.py --network vgg16        the 4,096 configurations that differ in the last 6 of 12 layers

Baselines, in the same run on the same images: each configuration is extracted and run on its own, as bottlenecks and
as dense convolutions, with the fastest batch size of --batches. They are timed on --sample configurations, spread over
the space, and scaled up; the printed ratio is against the faster of the two. The counts of correct images are compared
on that sample, and the rate of multiplications is printed beside that of a matrix product on the same cores. vgg16 and
resnet18 have random weights and images: only their times are meaningful.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gross_ray import BTDOptions, Configuration, SearchSpace, decompose_model, extract
from gross_ray.data.image_set import ImageSet
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions
from gross_ray.models import build_model
from gross_ray.search.evaluator import Evaluator
from gross_ray.search.options import EvaluationOptions
from gross_ray.search.sharding import segment_macs
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.layers import decomposable_layers
from gross_ray.supernet.series import SeriesConv2d
from gross_ray.training.loop import count_correct

DEEP_SIZES = (1, 4, 16, 32)
DEEP_LAYERS = 6


class _Dense(nn.Module):
    """A layer of a supernet at one group-size, as the equivalent dense convolution."""

    def __init__(self, layer: SeriesConv2d, group_size: int) -> None:
        super().__init__()
        kernel = layer.bottleneck(group_size).dense_kernel().detach()
        self.kernel, self.bias = kernel.contiguous(memory_format=torch.channels_last), layer.bias
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.kernel, self.bias, self.stride, self.padding, self.dilation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=["four-conv", "resnet18", "vgg16"], default="four-conv")
    parser.add_argument("--images", type=int, default=0, help="0: 10,000 for four-conv, 32 for the others")
    parser.add_argument("--sample", type=int, default=18, help="configurations that are also run one by one")
    parser.add_argument("--batches", type=int, nargs="+", default=[50, 250], help="batch sizes of the baselines")
    parser.add_argument("--memory-budget", type=int, help="MiB of live tensors [the default of the library]")
    parser.add_argument("--form", default="auto")
    parser.add_argument("--precision", nargs="+", default=["float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dataset", default="fashion-mnist", help="for four-conv; choose `sample` if it is missing")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    supernet, chosen, images = four_conv(options) if options.network == "four-conv" else made_up(options)
    supernet, images = supernet.to(options.device), images.to(options.device)
    sample = chosen[:: max(1, len(chosen) // options.sample)]
    budget = options.memory_budget and options.memory_budget * 2**20
    print(
        f"{options.network}, {len(chosen)} configurations of {len(SearchSpace.of(supernet))}, {len(images)} images, "
        f"{options.threads} threads, torch {torch.__version__}, {options.device}"
    )
    alone = one_by_one(supernet, images, sample, options)
    best = min(seconds for seconds, _ in alone.values()) * len(chosen) / len(sample)
    for form, (seconds, _) in alone.items():
        print(f"one by one, {form}: {seconds * len(chosen) / len(sample):.1f} s ({seconds / len(sample):.3f} s each)")
    for precision in options.precision:
        settings = EvaluationOptions(memory_budget=budget, form=options.form, precision=precision)
        evaluator = Evaluator(supernet, settings)
        preparing = _seconds(lambda: evaluator.evaluate(images.images[:200], images.labels[:200], chosen[:1]))  # noqa: B023
        started = time.perf_counter()
        correct, _ = evaluator.evaluate(images.images, images.labels, chosen)
        seconds = time.perf_counter() - started
        counts = dict(zip(chosen, correct.tolist(), strict=True))
        differing = [sum(abs(counts[one] - by[one]) for one in sample) for _, by in alone.values()]
        print(
            f"shared prefixes, {precision}: {seconds:.1f} s, {preparing:.1f} s to prepare; of {len(sample)} x "
            f"{len(images)} images counted differently: {' and '.join(map(str, differing))}"
        )
        print(f"ratio to the better of one by one: {best / seconds:.2f}", flush=True)
    rate = _matmul_rate(options.device)
    dense = 2 * sum(segment_macs(supernet, tuple(images.images.shape[1:]))) * len(images)
    each, _ = alone["dense"]
    print(f"GFLOP/s: dense one by one {dense * len(sample) / each / 1e9:.0f}, matrix product {rate:.0f}; ", end="")
    print(f"the whole work one by one in {seconds:.1f} s would be {dense * len(chosen) / seconds / 1e9:.0f}")
    print({name: dict(form.by_size) | {"stacked": form.stacked} for name, form in evaluator.forms.items()})


def four_conv(options: argparse.Namespace) -> tuple[nn.Module, list[Configuration], ImageSet]:
    images = load_dataset(DataOptions(name=options.dataset)).validation.first(options.images or 10_000)
    network = build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))
    supernet = decompose_model(network, options=BTDOptions(max_steps=3))
    return supernet, list(SearchSpace.of(supernet)), images


def made_up(options: argparse.Namespace) -> tuple[nn.Module, list[Configuration], ImageSet]:
    generator = torch.Generator().manual_seed(0)
    network = build_model(options.network, num_classes=10, generator=generator)
    supernet = empty_supernet(network, {name: DEEP_SIZES for name in decomposable_layers(network)})
    with torch.no_grad():
        for layer in series_layers(supernet).values():
            for parameter in layer.series_parameters():
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    space = SearchSpace.of(supernet)
    if options.network == "vgg16":
        chosen = space[: len(DEEP_SIZES) ** DEEP_LAYERS]
    else:
        chosen = [space[place] for place in random.Random(0).sample(range(len(space)), 1000)]
    count = options.images or 32
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return supernet.eval(), chosen, ImageSet(pixels, torch.randint(0, 10, (count,), generator=generator))


def one_by_one(
    supernet: nn.Module, images: ImageSet, sample: Sequence[Configuration], options: argparse.Namespace
) -> dict[str, tuple[float, dict[Configuration, int]]]:
    """Return seconds and counts of the sample in each form, with its fastest batch size."""
    found = {}
    for form in ("bottleneck", "dense"):
        networks = [(one, _alone(supernet, one, form)) for one in sample]

        def run(size: int, some: Sequence[tuple[Configuration, nn.Module]]) -> dict[Configuration, int]:
            return {one: count_correct(network, images, batch_size=size) for one, network in some}

        middle = networks[len(networks) // 2 :][:2]
        trials = {size: _seconds(lambda: run(size, middle)) for size in options.batches for _ in range(2)}  # noqa: B023
        size = min(trials, key=lambda size: trials[size])
        started = time.perf_counter()
        counts = run(size, networks)
        found[form] = (time.perf_counter() - started, counts)
    return found


def _alone(supernet: nn.Module, configuration: Configuration, form: str) -> nn.Module:
    if form == "bottleneck":
        return extract(supernet, configuration).eval().to(memory_format=torch.channels_last)
    network = copy.deepcopy(supernet)
    for (name, layer), size in zip(series_layers(supernet).items(), configuration, strict=True):
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, _Dense(layer, size))
    return network.eval().to(memory_format=torch.channels_last)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _matmul_rate(device: str) -> float:
    """Return GFLOP/s of a 2,048 x 2,048 matrix product."""
    size = 2048
    one, other = torch.randn(2, size, size, device=device)

    def work() -> None:
        for _ in range(5):
            torch.mm(one, other)
        if device == "cuda":
            torch.cuda.synchronize()

    work()
    return 5 * 2 * size**3 / min(_seconds(work) for _ in range(3)) / 1e9


if __name__ == "__main__":
    main()
