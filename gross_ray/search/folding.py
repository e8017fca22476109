"""Fold bottlenecks of a plain network into the dense convolutions that they equal, if those cost less."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from gross_ray.errors import InvalidValueError
from gross_ray.nn.calls import input_of, network_calls, network_errors_as_invalid_value
from gross_ray.nn.modes import evaluating
from gross_ray.nn.replace import replace_modules
from gross_ray.search.budgets import Budget, readable_amount
from gross_ray.search.cost import activations, count_parameters, full_costs, plain_macs
from gross_ray.search.forms import bottlenecks, dense_convolution, group_size_of, grouped
from gross_ray.search.latency import LatencyModel
from gross_ray.search.options import LatencyOptions
from gross_ray.search.runtimes import Runtime, runtime_of
from gross_ray.search.timing import Work, timed_device, typical_ms
from gross_ray.supernet.configure import check_plain

OBJECTIVES = ("macs", "parameters", "activations", "latency_ms")
"""The costs to choose by: MACs of one image, weights, activations alive at once, or a measured time."""


@dataclass(frozen=True)
class Folding:
    """One layer's cost in both forms, summed over its calls in a forward pass; activations: the largest call's."""

    layer: str
    """Name of the layer in the network."""
    group_size: int
    """Group-size of its bottleneck."""
    bottleneck: float
    """Cost as a bottleneck, in the objective's unit."""
    dense: float
    """Cost as a dense convolution."""

    @property
    def folded(self) -> bool:
        """Whether the dense convolution costs less, and so replaces the bottleneck."""
        return self.dense < self.bottleneck


def fold(
    network: nn.Module,
    input_shape: Sequence[int],
    *,
    objective: str = "macs",
    latency: LatencyOptions = LatencyOptions(),  # noqa: B008 (frozen)
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, list[Folding]]:
    """Return a copy of `network` with each bottleneck folded if its dense convolution costs less, and all costs.

    `network` is what `extract` returns, (N, *input_shape) its input. In exact arithmetic the outputs are equal; dense
    kernels are computed in float64 and rounded to the network's dtype. "latency_ms" times both forms of each layer
    alone, on `device`, as `latency` says (`num_sampled` is not used); `LatencyModel.fold` folds by the times of whole
    networks, which is more exact. Raises InvalidValueError for a supernet, an unknown objective, a runtime that is not
    installed or cannot take a layer, cuda on a machine without it, and a network that cannot run such an input.
    """
    if objective not in OBJECTIVES:
        raise InvalidValueError(f"objective = {objective!r}: must be one of {', '.join(OBJECTIVES)}")
    check_plain(network, "fold")
    modules = bottlenecks(network)
    if not modules:
        return replace_modules(network, {}), []
    dense = {name: dense_convolution(module) for name, module in modules.items()}
    if objective == "parameters":
        costs = {
            name: (float(count_parameters(modules[name])), float(count_parameters(dense[name]))) for name in modules
        }
    elif objective == "macs":
        costs = _macs(network, modules, dense, input_shape)
    elif objective == "activations":
        costs = _activations(network, modules, input_shape)
    else:
        costs = _milliseconds(network, modules, dense, input_shape, latency, timed_device(device))
    foldings = [Folding(name, group_size_of(modules[name]), *costs[name]) for name in modules]
    replaced = {folding.layer: dense[folding.layer] for folding in foldings if folding.folded}
    return replace_modules(network, replaced), foldings


def fold_within(
    network: nn.Module, latency: LatencyModel, input_shape: Sequence[int], limits: Iterable[Sequence[Budget]]
) -> tuple[nn.Module, dict[str, float], str]:
    """Return `latency.fold(network)`, unless that exceeds a limit on MACs or parameters; then `network`, and why.

    The faster form of a layer may have more MACs and parameters. Each of `limits` is budgets that hold together; of
    those that `network` keeps, the folded network has to keep one. Raises as `LatencyModel.fold`.
    """
    folded, added = latency.fold(network)
    before, after = full_costs(network, input_shape), full_costs(folded, input_shape)
    kept = [limit for limit in limits if not _exceeded(limit, before)]
    exceeded = [budget for limit in kept for budget in _exceeded(limit, after)]
    if not kept or any(not _exceeded(limit, after) for limit in kept):
        return folded, added, ""
    over = exceeded[0]
    has = f"{over.cost}={readable_amount(over.cost, after[over.cost])}"
    return network, {}, f"layers stay bottlenecks: as the faster dense ones they have {has}, above {over}"


def _exceeded(limit: Sequence[Budget], costs: Mapping[str, float]) -> list[Budget]:
    return [budget for budget in limit if budget.cost in costs and costs[budget.cost] > budget.limit]


def _macs(
    network: nn.Module, modules: dict[str, nn.Sequential], dense: dict[str, nn.Conv2d], input_shape: Sequence[int]
) -> dict[str, tuple[float, float]]:
    layer_of = {id(part): name for name, module in modules.items() for part in module}
    costs = dict.fromkeys(modules, (0.0, 0.0))
    for call in network_calls(network, input_shape):
        if (name := layer_of.get(id(call.module))) is None:
            continue
        before, as_dense = costs[name]
        if call.module is grouped(modules[name]):  # the dense convolution has as many output positions
            positions = call.output_size[0] * call.output_size[2] * call.output_size[3]
            as_dense += positions * dense[name].weight.numel()
        costs[name] = (before + plain_macs(call), as_dense)
    return costs


def _activations(
    network: nn.Module, modules: dict[str, nn.Sequential], input_shape: Sequence[int]
) -> dict[str, tuple[float, float]]:
    layer_of = {id(part): name for name, module in modules.items() for part in module}
    costs = dict.fromkeys(modules, (0.0, 0.0))
    inputs: dict[str, int] = {}
    for call in network_calls(network, input_shape):
        if (name := layer_of.get(id(call.module))) is None:
            continue
        parts, (before, as_dense) = modules[name], costs[name]
        if call.module is parts[0]:
            inputs[name] = prod(call.input_size)
        if call.module is parts[-1]:
            as_dense = max(as_dense, inputs[name] + prod(call.output_size))
        costs[name] = (max(before, activations(call)), as_dense)
    return costs


def _milliseconds(
    network: nn.Module,
    modules: dict[str, nn.Sequential],
    dense: dict[str, nn.Conv2d],
    input_shape: Sequence[int],
    options: LatencyOptions,
    device: torch.device,
) -> dict[str, tuple[float, float]]:
    runtime = runtime_of(options.runtime, device, options.threads)
    inputs = _inputs(network, modules, input_shape, options.batch_size)
    with runtime.settings():
        works = {
            (name, form): _work(runtime, module, inputs[name])
            for name in modules
            for form, module in (("bottleneck", modules[name]), ("dense", dense[name]))
        }
        times = typical_ms(works, options.repeats, runtime.clock())
    return {name: (times[name, "bottleneck"], times[name, "dense"]) for name in modules}


def _work(runtime: Runtime, module: nn.Module, inputs: Sequence[Tensor]) -> Work:
    """Return a call that runs a layer on all its inputs, which may differ in shape."""
    runs = [runtime.load(replace_modules(module, {}).eval(), images) for images in inputs]

    def run() -> None:
        for each in runs:
            each()

    return run


def _inputs(
    network: nn.Module, modules: dict[str, nn.Sequential], input_shape: Sequence[int], batch_size: int
) -> dict[str, list[Tensor]]:
    """Return the inputs of each bottleneck when `network` runs a batch of random images."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    names = {id(module): name for name, module in modules.items()}

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs[names[id(module)]].append(input_of(args, kwargs).to("cpu", copy=True))  # a later module may overwrite it

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules.values()]
    images = torch.randn(batch_size, *input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with network_errors_as_invalid_value(input_shape), torch.no_grad(), evaluating(network):
            network(images.to(next(network.parameters())))
    finally:
        for handle in handles:
            handle.remove()
    return inputs
