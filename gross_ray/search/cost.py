"""What networks and configurations cost: multiply-accumulates (MACs), parameters, and any other sum over the layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.nn.calls import Call, network_calls
from gross_ray.search.operations import OperationCount, count_operations
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.series import SeriesConv2d

CONVENTIONS = ("actual", "paper")
COUNTED = ("macs", "macs_paper", "parameters")
"""The costs that `layer_costs` finds from a supernet alone."""

# Shapes: N configurations, L layers, S group-sizes of a layer.


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the MACs of all convolutions and matrix products as `model` runs one image of `input_shape` (C, H, W).

    Functional operations and attention count too; a supernet counts as its active configuration. Warns, naming them,
    of modules that have a weight matrix and for which torch's FlopCounterMode counts nothing. Raises InvalidValueError
    if `model` cannot run such an image.
    """
    counted = count_operations(model, input_shape)
    if counted.uncounted:
        warnings.warn(uncounted_modules(counted), stacklevel=2)
    return counted.macs


def uncounted_modules(counted: OperationCount) -> str:
    """Return one line that names the modules whose MACs are missing from a count."""
    listed = ", ".join(f"{name or 'the network'} ({kind})" for name, kind in counted.uncounted.items())
    return f"the MACs leave out {listed}: torch's FlopCounterMode counts nothing for them"


def configuration_macs(
    supernet: nn.Module,
    configuration: Sequence[int],
    input_shape: Sequence[int],
    *,
    convention: str = "actual",
) -> int:
    """Return the MACs of one configuration for one image of `input_shape` (C, H, W).

    "actual" counts all convolutions and matrix products of the extracted network, as `count_macs` does. "paper" counts
    as the paper's tables do: the bottlenecks of the decomposed layers only, with stride and padding on the first 1x1
    (its Table 1). Raises InvalidValueError if `supernet` cannot run such an image or has no such configuration.
    """
    if convention not in CONVENTIONS:
        raise InvalidValueError(f"convention = {convention!r}: must be one of {', '.join(CONVENTIONS)}")
    cost = "macs" if convention == "actual" else "macs_paper"
    return int(layer_costs(supernet, input_shape, cost).of_one(configuration))


@dataclass(frozen=True)
class LayerCosts:
    """A cost that is a sum over the decomposed layers, as MACs, parameters and predicted latency are."""

    name: str
    """The cost: a column of the table `configurations`."""
    shared: float
    """What every configuration costs, whatever its group-sizes. A whole number for MACs and parameters."""
    by_layer: Mapping[str, Mapping[int, float]]
    """The cost of each decomposed layer, in layer order, at each group-size. Whole numbers for MACs and parameters."""

    def of(self, configurations: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Return the cost of each configuration, (N,): int64 if all parts are whole numbers, else float64.

        `configurations` is (N, L): one row of group-sizes for each. Raises InvalidValueError for an unknown group-size.
        """
        return self.of_places(group_size_places(self.space, configurations))

    def of_places(self, places: np.ndarray) -> np.ndarray:
        """Return what `of` does; `places` (N, L) are the indices of the group-sizes among those of their layers."""
        total: np.ndarray = np.full(len(places), self.shared, dtype=self._dtype)
        for layer, costs in enumerate(self.parts):
            total += costs[places[:, layer]]
        return total

    def of_one(self, configuration: Sequence[int]) -> float:
        """Return the cost of one configuration; raises InvalidValueError if it is not in the space."""
        return self.of([self.space.check(configuration)])[0].item()

    @property
    def minimum(self) -> float:
        """The cost of the cheapest configuration."""
        return self.of([self.cheapest])[0].item()

    @property
    def maximum(self) -> float:
        """The cost of the dearest configuration."""
        return self.of([[max(costs, key=costs.__getitem__) for costs in self.by_layer.values()]])[0].item()

    @property
    def cheapest(self) -> Configuration:
        """The configuration that costs least, of several the one of the smallest group-sizes."""
        return Configuration([min(sorted(costs), key=costs.__getitem__) for costs in self.by_layer.values()])

    @cached_property
    def parts(self) -> tuple[np.ndarray, ...]:
        """The cost of each layer at each group-size, in ascending order of the group-sizes: (S,)."""
        return tuple(np.array([costs[size] for size in sorted(costs)], self._dtype) for costs in self.by_layer.values())

    @cached_property
    def space(self) -> SearchSpace:
        """The configurations that have a cost."""
        return SearchSpace({layer: tuple(costs) for layer, costs in self.by_layer.items()})

    @cached_property
    def _dtype(self) -> type:
        every = [self.shared, *(cost for costs in self.by_layer.values() for cost in costs.values())]
        return np.int64 if all(isinstance(cost, int) for cost in every) else np.float64


def group_size_places(space: SearchSpace, configurations: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    """Return the index of each group-size among those of its layer, (N, L) int64; `configurations` is (N, L) too.

    Raises InvalidValueError for a group-size that the layer does not have.
    """
    chosen = np.asarray(configurations, dtype=np.int64).reshape(-1, len(space.layers))
    places = np.empty_like(chosen)
    for column, (layer, group_sizes) in enumerate(space.group_sizes.items()):
        sizes = np.array(group_sizes)
        places[:, column] = np.searchsorted(sizes, chosen[:, column]).clip(max=len(sizes) - 1)
        unknown = chosen[sizes[places[:, column]] != chosen[:, column], column]
        if len(unknown):
            listed = ", ".join(map(str, group_sizes))
            raise InvalidValueError(f"group-size {unknown[0]} of layer {layer!r}: must be one of {listed}")
    return places


def layer_costs(supernet: nn.Module, input_shape: Sequence[int], cost_name: str) -> LayerCosts:
    """Return one cost of every configuration of `supernet` for an image of `input_shape` (C, H, W).

    `cost_name` is one of `COUNTED`. "macs" and "macs_paper" are the two conventions of `configuration_macs`;
    "parameters" counts biases and all other layers too. The layers' parts are closed forms, and what all configurations
    share is the rest of the network's total. Raises InvalidValueError for another name, and if `supernet` cannot run
    such an image.
    """
    layers = series_layers(supernet)
    if cost_name not in COUNTED:
        raise InvalidValueError(f"cost_name = {cost_name!r}: must be one of {', '.join(COUNTED)}")
    if cost_name == "parameters":
        series = {id(p) for layer in layers.values() for p in layer.series_parameters()}
        shared = sum(p.numel() for p in supernet.parameters() if id(p) not in series)
        by_layer = {name: {s: _series_parameters(one, s) for s in one.group_sizes} for name, one in layers.items()}
        return LayerCosts(cost_name, shared, by_layer)
    if cost_name == "macs_paper":
        return LayerCosts(
            cost_name, 0, _macs_by_layer(layers, network_calls(supernet, input_shape), _series_macs_paper)
        )
    counted = count_operations(supernet, input_shape)
    by_layer = _macs_by_layer(layers, counted.calls, _series_macs)
    active = sum(by_layer[name][layer.group_size] for name, layer in layers.items())
    return LayerCosts(cost_name, counted.macs - active, by_layer)


def _macs_by_layer(
    layers: Mapping[str, SeriesConv2d], calls: Sequence[Call], macs_of: Callable[[Call, int], int]
) -> dict[str, dict[int, int]]:
    """Return the MACs of each layer at each group-size, those of all its calls together."""
    return {
        name: {size: sum(macs_of(call, size) for call in calls if call.module is layer) for size in layer.group_sizes}
        for name, layer in layers.items()
    }


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of `model`."""
    return sum(parameter.numel() for parameter in model.parameters())


def peak_activations(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the most activations, in elements, that a layer holds as `model` runs one image of (C, H, W).

    That is the input and the output of one convolution or linear layer: what a device needs at least, beside the
    weights, that runs layer after layer; what waits on a shortcut comes on top. A SeriesConv2d counts as a bottleneck,
    which holds as much at any group-size.
    """
    return most_held(network_calls(model, input_shape))


def most_held(calls: Sequence[Call]) -> int:
    """Return `peak_activations` of the network whose calls these are."""
    return max(_series_held(call) if isinstance(call.module, SeriesConv2d) else held(call) for call in calls)


def held(call: Call) -> int:
    """Return the elements of a call's input and output together."""
    return elements(call.input_size) + elements(call.output_size)


def elements(size: Sequence[int]) -> int:
    """Return the elements of a tensor; all of them are the one image's, wherever a network folds places into N."""
    return _product(size)


def _series_held(call: Call) -> int:
    layer = call.module
    assert isinstance(layer, SeriesConv2d)
    before, after = (layer.in_channels * _places(size) for size in (call.input_size, call.output_size))
    return max(2 * before, before + after, after + elements(call.output_size))


def plain_macs(call: Call) -> int:
    """Return the MACs of a call of a convolution, of any kind, or of nn.Linear."""
    module = call.module
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # each input goes to a window of each output channel
        return elements(call.input_size) * module.out_channels // module.groups * _product(module.kernel_size)
    if isinstance(module, nn.modules.conv._ConvNd):
        return elements(call.output_size) * module.in_channels // module.groups * _product(module.kernel_size)
    assert isinstance(module, nn.Linear)
    return elements(call.output_size) * module.in_features


def dense_macs(call: Call) -> int:
    """Return the MACs of a call of a SeriesConv2d as the dense convolution that it equals."""
    layer = call.module
    assert isinstance(layer, SeriesConv2d)
    return elements(call.output_size) * layer.in_channels * _product(layer.kernel_size)


def _series_macs(call: Call, group_size: int) -> int:
    layer = call.module
    assert isinstance(layer, SeriesConv2d)
    before, after = _places(call.input_size), _places(call.output_size)
    return _bottleneck_macs(layer, group_size, before, after)


def _series_macs_paper(call: Call, group_size: int) -> int:
    """Count with stride and padding on the first 1x1, as Table 1 of the paper has them."""
    layer = call.module
    assert isinstance(layer, SeriesConv2d)
    padding = layer._padding_both_sides  # left, right, top, bottom
    before = [
        (size + padding[place] + padding[place + 1] - 1) // stride + 1
        for size, stride, place in zip(call.input_size[2:], layer.stride, (2, 0), strict=True)
    ]
    after = [
        size - dilation * (kernel - 1)
        for size, dilation, kernel in zip(before, layer.dilation, layer.kernel_size, strict=True)
    ]
    if min(after) < 1:
        raise InvalidValueError(
            f"convention='paper' puts the stride {tuple(layer.stride)} on the first 1x1, which leaves nothing of an "
            f"input of {tuple(call.input_size[2:])} pixels; count with convention='actual'"
        )
    images = call.input_size[0]
    return _bottleneck_macs(layer, group_size, images * _product(before), images * _product(after))


def _bottleneck_macs(layer: SeriesConv2d, group_size: int, places_before: int, places_after: int) -> int:
    channels = layer.in_channels
    pointwise_in = places_before * channels * channels
    grouped = places_after * channels * group_size * _product(layer.kernel_size)
    return pointwise_in + grouped + places_after * channels * layer.out_channels


def _series_parameters(layer: SeriesConv2d, group_size: int) -> int:
    channels = layer.in_channels
    return channels * (channels + group_size * _product(layer.kernel_size) + layer.out_channels)


def _places(size: Sequence[int]) -> int:
    """Return the places of (N, C, H, W)."""
    return int(size[0]) * _product(size[2:])


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= int(size)
    return total
