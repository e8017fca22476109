"""Time of a supernet's training step, and of several supernets in one pass.

    python benchmarks/supernet.py [--batch 128] [--threads 2] [--members 2 4]
    python benchmarks/supernet.py --device cuda --batch 256 --images 10240 --epochs 5 --members 5 --capture

First: a fine-tuning step with a configuration active in the supernet, against the same step of the extracted
configuration (the baseline), for small, medium and large group-sizes. Second: training a supernet with sampled
configurations, against training a single configuration (the baseline), both by the library's fine-tuning with the
options of the command. Third: several supernets in one batched pass (engine.parallel_seeds), against the same supernets
one after another (the baseline). Each case alternates with its baseline, and the script prints medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from gross_ray import Configuration, SearchSpace, extract, set_configuration
from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.experiment import EngineOptions, Schedule
from gross_ray.models import build_model
from gross_ray.supernet.build import build_supernet
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.layers import decomposable_layers
from gross_ray.training.capture import captures
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import finetune, freeze_all_but_series
from gross_ray.training.together import Member, finetune_together

REPEATS = 7
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--epochs", type=int, default=1, help="epochs of a training; with more, a capture weighs less")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--capture", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} CPU threads"
    print(f"four-conv, batches of {options.batch}, {name}, torch {torch.__version__}, median of {REPEATS}")
    for text in ("1-1-1", "4-4-4", "16-16-16", "32-32-64"):
        _steps(Configuration.parse(text), options.batch, device)
    engine = EngineOptions(precision=options.precision, compile=options.compile, capture=options.capture)
    print(engine)
    splits = noise(options.images, device)
    schedule = Schedule(epochs=options.epochs, lr=1e-6, batch_size=options.batch)
    _epochs(splits, schedule, engine, device)
    for members in options.members:
        _together(members, splits, schedule, engine, device)


def random_supernet(
    device: torch.device, network: nn.Module | None = None, sizes: Sequence[int] | None = None
) -> nn.Module:
    """Return a supernet of a network, by default four-conv, with random weights and all powers of two as group-sizes.

    `sizes` are the group-sizes of every layer instead.
    """
    generator = torch.Generator().manual_seed(0)
    network = network or build_model("four-conv", num_classes=10, generator=generator)
    bottlenecks: Mapping[str, list[Bottleneck]] = {
        layer: [
            Bottleneck(
                torch.randn(channels, channels, 1, 1, generator=generator) / channels,
                torch.randn(channels, size, 3, 3, generator=generator) / size,
                torch.randn(network.get_submodule(layer).out_channels, channels, 1, 1, generator=generator) / channels,
            )
            for size in (sizes or [2**power for power in range(channels.bit_length())])
        ]
        for layer, channels in ((one, network.get_submodule(one).in_channels) for one in decomposable_layers(network))
    }
    return build_supernet(network, bottlenecks).to(device=device, memory_format=torch.channels_last)


def _steps(configuration: Configuration, batch: int, device: torch.device) -> None:
    supernet = random_supernet(device)
    set_configuration(supernet, configuration)
    extracted = extract(supernet, configuration).to(device=device, memory_format=torch.channels_last)
    trained = [one for one in extracted.modules() if isinstance(one, nn.Sequential) and one is not extracted]
    for parameter in extracted.parameters():
        parameter.requires_grad_(False)
    for module in trained:
        for one in module:
            one.weight.requires_grad_()
    parameters = list(freeze_all_but_series(supernet).values())
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device=device, memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), generator=generator).to(device)
    ours = _step(supernet, parameters, images, labels)
    theirs = _step(extracted, [one for one in extracted.parameters() if one.requires_grad], images, labels)
    seconds = [each / STEPS for each in _in_turn([ours, theirs], device)]
    print(
        f"step at {configuration}: supernet {1e3 * seconds[0]:.1f} ms, extracted {1e3 * seconds[1]:.1f} ms, "
        f"ratio {seconds[0] / seconds[1]:.2f}"
    )


def _step(
    network: nn.Module, parameters: list[nn.Parameter], images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    network.train()
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-3)

    def step() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()

    return step


def single(size: int, device: torch.device) -> nn.Module:
    """Return a network of one group-size, ready to be trained on its own."""
    layers = series_layers(random_supernet(device))
    network = build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))
    one = build_supernet(network, {name: [layer.bottleneck(size)] for name, layer in layers.items()})
    return one.to(device=device, memory_format=torch.channels_last)


def noise(num_images: int, device: torch.device) -> Splits:
    """Return random training images, and one image for each other split."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    train = ImageSet(pixels, torch.randint(10, (num_images,), generator=generator).to(device))
    few = ImageSet(train.images[:1], train.labels[:1])
    return Splits("noise", train, few, few, tuple("abcdefghij"))


def _epochs(splits: Splits, schedule: Schedule, engine: EngineOptions, device: torch.device) -> None:
    supernet = random_supernet(device)
    sampler = ConfigurationSampler(SearchSpace.of(supernet), 0.0)
    one = single(4, device)

    def drawn() -> None:
        if engine.compile or captures(engine, device):
            finetune_together([Member(copy.deepcopy(supernet), 0, sampler)], splits, schedule, engine=engine)
        else:
            finetune(copy.deepcopy(supernet), splits, schedule, seed=0, sampler=sampler, engine=engine)

    def alone() -> None:
        finetune(copy.deepcopy(one), splits, schedule, seed=0, engine=engine)

    seconds = _in_turn([drawn, alone], device)
    steps = schedule.epochs * -(-len(splits.train) // schedule.batch_size)
    print(
        f"{schedule.epochs} epochs, {steps} steps: supernet {1e3 * seconds[0] / steps:.2f} ms a step, "
        f"4-4-4 on its own {1e3 * seconds[1] / steps:.2f} ms, ratio {seconds[0] / seconds[1]:.2f}"
    )


def _together(members: int, splits: Splits, schedule: Schedule, engine: EngineOptions, device: torch.device) -> None:
    supernet = random_supernet(device)
    sampler = ConfigurationSampler(SearchSpace.of(supernet), 0.0)

    def one_by_one() -> None:
        for seed in range(members):
            if engine.compile or captures(engine, device):
                finetune_together([Member(copy.deepcopy(supernet), seed, sampler)], splits, schedule, engine=engine)
            else:
                finetune(copy.deepcopy(supernet), splits, schedule, seed=seed, sampler=sampler, engine=engine)

    def in_one_pass() -> None:
        some = [Member(copy.deepcopy(supernet), seed, sampler) for seed in range(members)]
        finetune_together(some, splits, schedule, engine=engine)

    together, alone = _in_turn([in_one_pass, one_by_one], device)
    print(
        f"{members} supernets, {schedule.epochs} epochs of {len(splits.train)} images: in one pass {together:.2f} s, "
        f"one by one {alone:.2f} s, ratio {alone / together:.2f}"
    )


def _in_turn(actions: list[Callable[[], None]], device: torch.device) -> list[float]:
    seconds: list[list[float]] = [[] for _ in actions]
    for repeat in range(REPEATS + 1):
        for place, action in enumerate(actions):
            started = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first run warms up
                seconds[place].append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


if __name__ == "__main__":
    main()
