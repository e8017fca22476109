"""What a budget buys for any network before training: by MACs, and by the latency of each runtime.

    python benchmarks/whole_networks.py [--networks resnet20 vgg16 resnet18] [--runtimes onnxruntime openvino torch]
                                        [--weights FILE] [--sampled NUMBER]

Baseline: the full network in the same runtime, timed beside each configuration. The networks and their layers' choices
are those of `benchmarks/latency.py`; `--weights` gives one network trained weights. Within 40 % of the full network's
MACs, and within 60 % of its time in each runtime, the configuration of the lowest summed relative error of the
decompositions is chosen (exactly, by integer programming), or the cheapest one if nothing fits. Each is timed whole in
every runtime, its layers in the forms that are faster there, as `gross export` writes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from latency import IMAGES, made_up_supernet
from scipy.optimize import LinearConstraint, milp
from torch import nn

from gross_ray.btd.options import BTDOptions
from gross_ray.btd.solver import block_term_decomposition
from gross_ray.search.cost import LayerCosts, layer_costs
from gross_ray.search.latency import LatencyOptions, measure_latency, measure_relative
from gross_ray.search.timing import device_name
from gross_ray.space import DENSE, Configuration, SearchSpace
from gross_ray.supernet.configure import series_layers

Errors = Mapping[str, Mapping[int, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(IMAGES), choices=list(IMAGES))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino", "torch"])
    parser.add_argument("--weights", type=Path, help="trained weights of the network, of which there is then one")
    parser.add_argument("--macs", type=float, default=40.0, help="percent of the full network's")
    parser.add_argument("--latency", type=float, default=60.0, help="percent of the full network's")
    parser.add_argument("--sampled", type=int, default=0, help="networks timed for a prediction [as gross latency]")
    parser.add_argument("--steps", type=int, default=50, help="most steps of a decomposition")
    asked = parser.parse_args()
    if asked.weights and len(asked.networks) != 1:
        parser.error("--weights is for one network: name it with --networks")
    print(f"{device_name(torch.device('cpu'))}, 1 thread, batch of 1; ratios to the full network in the same runtime")
    for name in asked.networks:
        supernet, shape = made_up_supernet(name, asked.weights), (3, IMAGES[name], IMAGES[name])
        errors = decomposition_errors(supernet, asked.steps)
        space = SearchSpace.of(supernet)
        macs = layer_costs(supernet, shape, "macs")
        full = macs.of_one(Configuration([DENSE] * len(space.layers)))
        chosen = {f"macs={asked.macs:g}%": best_within(macs, full * asked.macs / 100, errors)}
        models = {}
        for runtime in asked.runtimes:
            options = LatencyOptions(runtime=runtime, num_sampled=asked.sampled)
            models[runtime] = measure_latency(supernet, shape, options, generator=torch.Generator().manual_seed(0))
            limit = models[runtime].full_ms * asked.latency / 100
            chosen[f"{runtime} {asked.latency:g}%"] = best_within(models[runtime].costs, limit, errors)
        print(f"  {name}: full network {full / 1e6:.1f} M MACs")
        for runtime, model in models.items():
            forms = [model.faster_forms(one) for one, _ in chosen.values()]
            relative = measure_relative(supernet, shape, LatencyOptions(runtime=runtime), forms)
            print(f"    in {runtime} {model.version}, full {model.full_ms:.3g} ms:")
            for (budget, (one, how)), ratio in zip(chosen.items(), relative, strict=True):
                predicted = model.predict(one) / model.full_ms
                error = sum(errors[layer][size] for layer, size in zip(space.layers, one, strict=True))
                print(
                    f"      {budget:>16}: {ratio:.2f} of the time (predicted {predicted:.2f}), "
                    f"{macs.of_one(one) / full:.2f} of the MACs, summed error {error:.2f} {how}{one}",
                    flush=True,
                )


def decomposition_errors(supernet: nn.Module, steps: int) -> Errors:
    """Return the relative error of each layer's decomposition at each group-size; 0 for the dense layer."""
    return {
        name: {
            size: 0.0
            if size == DENSE
            else block_term_decomposition(layer.dense_weight, size, options=BTDOptions(max_steps=steps)).relative_error
            for size in layer.group_sizes
        }
        for name, layer in series_layers(supernet).items()
    }


def best_within(cost: LayerCosts, limit: float, errors: Errors) -> tuple[Configuration, str]:
    """Return the configuration of the lowest summed error within the limit, or the cheapest one, and which it is."""
    layers = list(cost.by_layer)
    columns = [(place, size) for place, layer in enumerate(layers) for size in errors[layer]]
    one_each = np.array([[float(place == row) for place, _ in columns] for row in range(len(layers))])
    costs = np.array([float(cost.by_layer[layers[place]][size]) for place, size in columns])
    found = milp(
        [errors[layers[place]][size] for place, size in columns],
        integrality=np.ones(len(columns)),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None], ub=limit - cost.shared)],
    )
    if not found.success:
        return cost.cheapest, f"(nothing fits: the least {cost.name}) "
    return Configuration([size for (_, size), taken in zip(columns, found.x, strict=True) if taken > 0.5]), ""


if __name__ == "__main__":
    main()
