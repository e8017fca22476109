"""Evaluating all 252 configurations of the four-conv network: shared prefixes against one configuration at a time.

    python benchmarks/search.py [--images 2000] [--threads 2]

Baselines, in the same run on the same images: each configuration extracted and run by itself, as a bottleneck and as
a dense convolution. The ratio printed is against the better of the two; they are timed on every 7th configuration and
scaled up. The counts of correct images are compared.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from gross_ray import BTDOptions, SearchSpace, decompose_model, evaluate_configurations, extract, set_configuration
from gross_ray.data.images import load_dataset
from gross_ray.decomposition.series import SeriesConv2d
from gross_ray.experiment import DataOptions
from gross_ray.models import build_model
from gross_ray.training.loop import count_correct

EVERY = 7


class _Dense(nn.Module):
    """A layer of a supernet at one group-size, as the dense convolution that it equals."""

    def __init__(self, layer: SeriesConv2d) -> None:
        super().__init__()
        self.layer, self.kernel = layer, layer.bottleneck(layer.group_size).dense_kernel().detach()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        return F.conv2d(images, self.kernel, layer.bias, layer.stride, layer.padding, layer.dilation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = load_dataset(DataOptions()).validation.first(options.images)
    network = build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))
    supernet = decompose_model(network, options=BTDOptions(max_steps=3))
    space = SearchSpace.of(supernet)
    sample = list(space)[::EVERY]

    evaluate_configurations(supernet, images.images[:200], images.labels[:200])  # warm-up
    started = time.perf_counter()
    shared = evaluate_configurations(supernet, images.images, images.labels).set_index("configuration")["correct"]
    shared_seconds = time.perf_counter() - started

    seconds = {}
    differing = 0
    for form in ("bottleneck", "dense"):
        started = time.perf_counter()
        for configuration in sample:
            if form == "bottleneck":
                alone = extract(supernet, configuration)
            else:
                set_configuration(supernet, configuration)
                dense = {name: _Dense(supernet.get_submodule(name)) for name in space.layers}
                alone = nn.Sequential(OrderedDict({**dict(supernet.named_children()), **dense}))
            correct = count_correct(alone.to(memory_format=torch.channels_last), images)
            differing += abs(correct - int(shared[str(configuration)]))
        seconds[form] = (time.perf_counter() - started) * len(space) / len(sample)
    print(f"{len(space)} configurations, {options.images} images, {options.threads} threads, torch {torch.__version__}")
    print(f"one by one, bottleneck: {seconds['bottleneck']:6.1f} s    one by one, dense: {seconds['dense']:6.1f} s")
    print(f"shared prefixes:        {shared_seconds:6.1f} s    images counted differently: {differing}")
    print(f"ratio to the better of one by one: {min(seconds.values()) / shared_seconds:.2f}")


if __name__ == "__main__":
    main()
