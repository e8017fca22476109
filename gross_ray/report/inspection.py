"""A preview of decomposing a network: layers, costs and the size of the space, before any computation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gross_ray.report.results import ResultTable, millions
from gross_ray.search.cost import (
    convolution_macs,
    count_parameters,
    layer_costs,
    most_held,
    peak_activations,
    uncounted_modules,
)
from gross_ray.search.operations import count_operations
from gross_ray.space import DENSE, Configuration, SearchSpace, listed
from gross_ray.supernet.build import running_supernet
from gross_ray.supernet.configure import largest_decomposed
from gross_ray.supernet.layers import LayerChoice, by_reason


def inspection(network: nn.Module, choice: LayerChoice, input_shape: Sequence[int]) -> list[ResultTable]:
    """Return the decomposed layers with their costs, the extremes of the space, and the convolutions left alone.

    `network` is `choice.network`, `input_shape` is (C, H, W). Raises InvalidValueError if the network cannot run such
    an image.
    """
    shape = "x".join(map(str, input_shape))
    counted = count_operations(network, input_shape)
    dense = convolution_macs(counted.calls, choice.convs)
    outputs = {id(call.module): "x".join(map(str, call.output_size[1:])) for call in counted.calls}
    supernet = running_supernet(network, choice.group_sizes, input_shape)
    space = SearchSpace.of(supernet)
    macs, parameters = (layer_costs(supernet, input_shape, cost) for cost in ("macs", "parameters"))
    rows = []
    for (name, conv), by_size in zip(choice.convs.items(), macs.by_layer.values(), strict=True):
        decomposed = [millions(cost) for size, cost in by_size.items() if size != DENSE]
        sizes = listed(choice.group_sizes[name], " ")
        costs_of_it = [millions(dense[name]), f"{decomposed[0]} to {decomposed[-1]}"]
        rows.append([name, _kernel(conv), outputs.get(id(conv), "-"), sizes, *costs_of_it])
    heads = ["layer", "kernel", "output", "group-sizes", "M MACs dense", "as bottleneck"]
    notes = [
        f"{what}: {by_reason(reasons)}"
        for what, reasons in (("not tried", choice.dropped), ("made plain", choice.made_plain))
        if reasons
    ]
    layers = ResultTable(f"Decomposed: {len(rows)} layers, for images of {shape}", heads, rows, notes)
    smallest = Configuration([sizes[0] for sizes in space.group_sizes.values()])
    extremes = [smallest, largest_decomposed(supernet)]
    activations = f"{most_held(counted.calls):,}"
    total = [["the network itself", millions(counted.macs), f"{count_parameters(network):,}", activations]]
    activations = f"{peak_activations(supernet, input_shape):,}"
    total += [[str(end), millions(macs.of_one(end)), f"{parameters.of_one(end):,}", activations] for end in extremes]
    heads = ["", "M MACs", "parameters", "activations at once"]
    notes = [uncounted_modules(counted)] if counted.uncounted else []
    whole = ResultTable(f"The space: {space.size:,} configurations", heads, total, notes)
    if not choice.left_alone:
        return [layers, whole]
    rest = [[name, reason] for name, reason in choice.left_alone.items()]
    return [
        layers,
        whole,
        ResultTable(f"Left alone: {len(rest)} convolution{'s' * (len(rest) > 1)}", ["layer", "why"], rest),
    ]


def _kernel(conv: nn.Conv2d) -> str:
    kernel = "x".join(map(str, conv.kernel_size))
    more = [
        f"{name} {value[0] if len(set(value)) == 1 else tuple(value)}"
        for name, value in (("stride", conv.stride), ("dilation", conv.dilation))
        if set(value) != {1}
    ]
    return ", ".join([f"{conv.in_channels} to {conv.out_channels}, {kernel}", *more])
