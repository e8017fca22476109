"""Predicted against measured latency of configurations that no fit has seen, in each runtime.

    python benchmarks/latency.py [--networks resnet20 vgg16 resnet18] [--runtimes onnxruntime openvino torch]

Baseline: the time of each configuration measured whole, beside the full network, every layer in its faster form. The
networks are the models of that name with made-up weights: ResNet-20 and VGG-16 for images of 32 pixels, ResNet-18 for
224; each layer may have group-size 1, 4 or 16, or stay dense. The configurations are drawn uniformly, and those of the
fit are others. Each is loaded and timed five times, and the median counts; "noise" is how far one of the five is from
it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from gross_ray.models import build_model
from gross_ray.nn.batch_norm import as_if_trained
from gross_ray.search.latency import LatencyOptions, measure_latency, measure_relative
from gross_ray.search.timing import device_name
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet, made_up
from gross_ray.supernet.layers import choice_of
from gross_ray.weights import load_weights

ROUNDS, TIMES = 5, 5
"""Rounds in which the configurations themselves are timed, and how often they are loaded anew for them."""
IMAGES = {"resnet20": 32, "vgg16": 32, "resnet18": 224}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(IMAGES), choices=list(IMAGES))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino", "torch"])
    parser.add_argument("--configurations", type=int, default=30, help="how many are predicted and timed")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=LatencyOptions.repeats)
    asked = parser.parse_args()
    print(f"{device_name(torch.device('cpu'))}, {asked.threads} thread(s), batch of {asked.batch}")
    for network in asked.networks:
        supernet = made_up_supernet(network)
        for runtime in asked.runtimes:
            options = LatencyOptions(
                runtime=runtime, batch_size=asked.batch, threads=asked.threads, repeats=asked.repeats
            )
            print(f"  {network}, {compared(supernet, IMAGES[network], options, asked.configurations)}", flush=True)


def made_up_supernet(name: str, weights: Path | None = None) -> torch.nn.Module:
    """Return a supernet of a model with group-sizes 1, 4, 16 and dense; the bottlenecks have made-up weights."""
    size, generator = IMAGES[name], torch.Generator().manual_seed(0)
    network = build_model(name, num_classes=10, image_size=size, generator=generator).eval()
    if weights is not None:
        load_weights(network, weights)
    else:
        as_if_trained(network, generator)
    choice = choice_of(network, (), (1, 4, 16), {}, keep_dense=True, input_shape=(3, size, size))
    return made_up(empty_supernet(network, choice.group_sizes), generator)


def compared(supernet: torch.nn.Module, size: int, options: LatencyOptions, number: int) -> str:
    """Return one line: time taken, and the error and rank correlation of the predictions."""
    started = time.perf_counter()
    model = measure_latency(supernet, (3, size, size), options, generator=torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - started
    configurations = drawn(SearchSpace.of(supernet), number)
    more, forms = replace(options, repeats=ROUNDS), [model.faster_forms(one) for one in configurations]
    measured_each = np.array([measure_relative(supernet, (3, size, size), more, forms) for _ in range(TIMES)])
    predicted = np.array([model.predict(one) for one in configurations]) / model.full_ms
    measured = np.median(measured_each, axis=0)
    alike = len({*predicted.tolist()}) == 1  # no bottleneck is faster: each is the full network
    ranks = "all are the full network" if alike else f"Spearman {spearmanr(predicted, measured).statistic:.3f}"
    errors, noise = np.abs(predicted / measured - 1), np.abs(measured_each / measured - 1)
    return (
        f"{options.runtime}: full {model.full_ms:.3g} ms, all at 1 {model.predict([1] * len(model.added_ms)):.3g} ms; "
        f"median error {100 * np.median(errors):.1f} %, largest {100 * errors.max():.0f} %, "
        f"{ranks}; noise {100 * np.median(noise):.1f} %; the model "
        f"itself says {100 * model.median_error:.1f} % and {100 * model.noise:.1f} %; "
        f"{model.num_sampled} networks in {seconds / 60:.1f} minutes"
    )


def drawn(space: SearchSpace, number: int) -> list[Configuration]:
    """Draw configurations uniformly."""
    generator = np.random.default_rng(1)
    sizes = space.group_sizes.values()
    return [Configuration([int(generator.choice(each)) for each in sizes]) for _ in range(number)]


if __name__ == "__main__":
    main()
