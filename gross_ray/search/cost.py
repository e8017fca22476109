"""Costs of networks and configurations: multiply-accumulates (MACs), parameters, and any other sum over the layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from torch import nn

from gross_ray.btd.bottleneck import bottleneck_macs
from gross_ray.errors import InvalidValueError
from gross_ray.nn.calls import Call, network_calls
from gross_ray.search.operations import OperationCount, count_operations
from gross_ray.space import DENSE, Configuration, SearchSpace, listed, ordered
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.series import SeriesConv2d

CONVENTIONS = ("actual", "paper")
COUNTED = ("macs", "macs_paper", "parameters")
"""The costs that `layer_costs` computes from a supernet, without measuring."""

# Shapes: N configurations, L layers, S group-sizes of a layer.


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the MACs of all convolutions and matrix products when `model` runs one image of `input_shape` (C, H, W).

    Functional operations and attention count too; a supernet counts as its active configuration. Warns about modules
    with a weight matrix for which torch's FlopCounterMode counts nothing. Raises InvalidValueError if `model` cannot
    run such an image.
    """
    counted = count_operations(model, input_shape)
    if counted.uncounted:
        warnings.warn(uncounted_modules(counted), stacklevel=2)
    return counted.macs


def uncounted_modules(counted: OperationCount) -> str:
    """Return a one-line warning that names the modules whose MACs are missing from the count."""
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
    as the paper's tables do: only the bottlenecks of the decomposed layers, with stride and padding on the first 1x1
    (its Table 1). Raises InvalidValueError if `supernet` cannot run such an image or lacks the configuration.
    """
    if convention not in CONVENTIONS:
        raise InvalidValueError(f"convention = {convention!r}: must be one of {', '.join(CONVENTIONS)}")
    cost = "macs" if convention == "actual" else "macs_paper"
    return int(layer_costs(supernet, input_shape, cost).of_one(configuration))


@dataclass(frozen=True)
class LayerCosts:
    """A cost that is a sum over the decomposed layers: MACs, parameters or predicted latency."""

    name: str
    """Name of the cost: a column of the table `configurations`."""
    shared: float
    """The cost of everything but the decomposed layers; a whole number for MACs and parameters."""
    by_layer: Mapping[str, Mapping[int, float]]
    """The cost of each decomposed layer, in layer order, at each choice; whole numbers for MACs and parameters."""

    def of(self, configurations: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Return the cost of each configuration, (N,): int64 if all parts are whole numbers, else float64.

        `configurations` is (N, L): one row of group-sizes each. Raises InvalidValueError for an unknown group-size.
        """
        return self.of_indices(group_size_indices(self.space, configurations))

    def of_indices(self, indices: np.ndarray) -> np.ndarray:
        """Return the same as `of`, from the index of each group-size among those of its layer, (N, L)."""
        total: np.ndarray = np.full(len(indices), self.shared, dtype=self._dtype)
        for layer, costs in enumerate(self.parts):
            total += costs[indices[:, layer]]
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
        """The cost of the most expensive configuration."""
        return self.of([[max(costs, key=costs.__getitem__) for costs in self.by_layer.values()]])[0].item()

    @property
    def cheapest(self) -> Configuration:
        """The cheapest configuration; of several, the one with the smallest group-sizes."""
        return Configuration([min(ordered(costs), key=costs.__getitem__) for costs in self.by_layer.values()])

    @cached_property
    def parts(self) -> tuple[np.ndarray, ...]:
        """The cost of each layer at each choice, in the order of the space: (S,)."""
        return tuple(
            np.array([costs[size] for size in ordered(costs)], self._dtype) for costs in self.by_layer.values()
        )

    @cached_property
    def space(self) -> SearchSpace:
        """The configurations whose cost is known."""
        return SearchSpace({layer: tuple(costs) for layer, costs in self.by_layer.items()})

    @cached_property
    def _dtype(self) -> type:
        costs = [self.shared, *(cost for costs in self.by_layer.values() for cost in costs.values())]
        return np.int64 if all(isinstance(cost, int) for cost in costs) else np.float64


def group_size_indices(space: SearchSpace, configurations: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    """Return the index of each group-size among those of its layer, (N, L) int64; `configurations` is (N, L) too.

    Raises InvalidValueError for a group-size that the layer does not have.
    """
    chosen = np.asarray(configurations, dtype=np.int64).reshape(-1, len(space.layers))
    indices = np.empty_like(chosen)
    for column, (layer, group_sizes) in enumerate(space.group_sizes.items()):
        sizes = np.array(group_sizes)
        ascending = np.argsort(sizes)  # DENSE is the smallest number and the last choice
        places = np.searchsorted(sizes, chosen[:, column], sorter=ascending).clip(max=len(sizes) - 1)
        indices[:, column] = ascending[places]
        unknown = chosen[sizes[indices[:, column]] != chosen[:, column], column]
        if len(unknown):
            wrong = listed([int(unknown[0])])
            raise InvalidValueError(f"group-size {wrong} of layer {layer!r}: must be one of {listed(group_sizes)}")
    return indices


def layer_costs(supernet: nn.Module, input_shape: Sequence[int], cost_name: str) -> LayerCosts:
    """Return one cost of every configuration of `supernet` for an image of `input_shape` (C, H, W).

    `cost_name` is one of `COUNTED`. "macs" and "macs_paper" are the two conventions of `configuration_macs`;
    "parameters" counts biases and all other layers too. The costs of decomposed layers are closed forms; the shared
    cost is the network's counted total minus theirs. Raises InvalidValueError for another name, and if `supernet`
    cannot run such an image.
    """
    layers = series_layers(supernet)
    if cost_name not in COUNTED:
        raise InvalidValueError(f"cost_name = {cost_name!r}: must be one of {', '.join(COUNTED)}")
    if cost_name == "parameters":
        # A dense weight is a parameter if it was trained.
        series = {id(p) for layer in layers.values() for p in (*layer.series_parameters(), layer.dense_weight)}
        shared = sum(p.numel() for p in supernet.parameters() if id(p) not in series)
        by_layer = {
            name: {size: _series_parameters(layer, size) for size in layer.group_sizes}
            for name, layer in layers.items()
        }
        return LayerCosts(cost_name, shared, by_layer)
    if cost_name == "macs_paper":
        calls = network_calls(supernet, input_shape)
        return LayerCosts(cost_name, 0, _macs_by_layer(layers, calls, _series_macs_paper))
    counted = count_operations(supernet, input_shape)
    by_layer = _macs_by_layer(layers, counted.calls, _series_macs)
    active = sum(by_layer[name][layer.group_size] for name, layer in layers.items())
    return LayerCosts(cost_name, counted.macs - active, by_layer)


def counted_costs(supernet: nn.Module, input_shape: Sequence[int]) -> dict[str, LayerCosts | None]:
    """Return every cost of `COUNTED` by its name (`layer_costs`); None for macs_paper where it cannot be counted.

    That is where a stride before the kernel, as the paper has it, leaves nothing of a small response.
    """

    def costs(name: str) -> LayerCosts | None:
        try:
            return layer_costs(supernet, input_shape, name)
        except NothingLeftError:
            return None

    return {name: costs(name) for name in COUNTED}


class NothingLeftError(InvalidValueError):
    """The paper's way of counting leaves nothing of a response, because the stride comes first."""


def _macs_by_layer(
    layers: Mapping[str, SeriesConv2d], calls: Sequence[Call], macs_of: Callable[[Call, int], int]
) -> dict[str, dict[int, int]]:
    """Return the MACs of each layer at each group-size, summed over its calls."""
    return {
        name: {size: sum(macs_of(call, size) for call in calls if call.module is layer) for size in layer.group_sizes}
        for name, layer in layers.items()
    }


def full_costs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, float]:
    """Return the MACs and parameters of a network, by their names; budgets may be a percentage of a full network's."""
    return {
        "macs": float(count_operations(model, input_shape).macs),
        "parameters": float(count_parameters(model)),
    }


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of `model`."""
    return sum(parameter.numel() for parameter in model.parameters())


def peak_activations(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the largest input plus output of a layer, in elements, when `model` runs one image of (C, H, W).

    Of convolutions and linear layers: a device that runs layer after layer needs at least this beside the weights, and
    more while a shortcut waits. A SeriesConv2d counts as a bottleneck, which needs the same at any group-size, or as a
    dense convolution if its active choice is DENSE.
    """
    return most_held(network_calls(model, input_shape))


def most_held(calls: Sequence[Call]) -> int:
    """Return `peak_activations` of the network that made these calls."""
    return max(
        _series_activations(call) if isinstance(call.module, SeriesConv2d) else activations(call) for call in calls
    )


def activations(call: Call) -> int:
    """Return the number of elements of a call's input and output together."""
    return prod(call.input_size) + prod(call.output_size)


def _series_activations(call: Call) -> int:
    layer = call.module
    assert isinstance(layer, SeriesConv2d)
    if layer.group_size == DENSE:
        return activations(call)
    before, after = (layer.in_channels * _positions(size) for size in (call.input_size, call.output_size))
    return max(2 * before, before + after, after + prod(call.output_size))


def plain_macs(call: Call) -> int:
    """Return the MACs of a call of a convolution of any kind, or of nn.Linear."""
    module = call.module
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # each input goes to a window of each output channel
        return prod(call.input_size) * module.out_channels // module.groups * prod(module.kernel_size)
    if isinstance(module, nn.modules.conv._ConvNd):
        return prod(call.output_size) * module.in_channels // module.groups * prod(module.kernel_size)
    assert isinstance(module, nn.Linear)
    return prod(call.output_size) * module.in_features


def convolution_macs(calls: Sequence[Call], convs: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the MACs of each of a network's convolutions, summed over its calls."""
    return {name: sum(plain_macs(call) for call in calls if call.module is conv) for name, conv in convs.items()}


def dense_macs(call: Call) -> int:
    """Return the MACs of a call of a SeriesConv2d, run as the dense convolution that it equals."""
    layer = call.module
    assert isinstance(layer, SeriesConv2d)
    return prod(call.output_size) * layer.in_channels * prod(layer.kernel_size)


def _series_macs(call: Call, group_size: int) -> int:
    layer = call.module
    assert isinstance(layer, SeriesConv2d)
    if group_size == DENSE:
        return dense_macs(call)
    return _bottleneck_macs(layer, group_size, _positions(call.input_size), _positions(call.output_size))


def _series_macs_paper(call: Call, group_size: int) -> int:
    """Count with stride and padding on the first 1x1, as in Table 1 of the paper."""
    layer = call.module
    assert isinstance(layer, SeriesConv2d)
    if group_size == DENSE:
        return dense_macs(call)
    left, right, top, bottom = layer._padding_both_sides
    before = [
        (size + padding - 1) // stride + 1
        for size, stride, padding in zip(call.input_size[2:], layer.stride, (top + bottom, left + right), strict=True)
    ]
    after = [
        size - dilation * (kernel - 1)
        for size, dilation, kernel in zip(before, layer.dilation, layer.kernel_size, strict=True)
    ]
    if min(after) < 1:
        raise NothingLeftError(
            f"convention='paper' puts the stride {tuple(layer.stride)} on the first 1x1, which leaves nothing of an "
            f"input of {tuple(call.input_size[2:])} pixels; count with convention='actual'"
        )
    images = call.input_size[0]
    return _bottleneck_macs(layer, group_size, images * prod(before), images * prod(after))


def _bottleneck_macs(layer: SeriesConv2d, group_size: int, positions_before: int, positions_after: int) -> int:
    kernel = prod(layer.kernel_size)
    return bottleneck_macs(layer.in_channels, layer.out_channels, kernel, group_size, positions_before, positions_after)


def _series_parameters(layer: SeriesConv2d, group_size: int) -> int:
    channels = layer.in_channels
    if group_size == DENSE:
        return layer.dense_weight.numel()
    return channels * (channels + group_size * prod(layer.kernel_size) + layer.out_channels)


def _positions(size: Sequence[int]) -> int:
    """Return N * H * W of a shape (N, C, H, W)."""
    return size[0] * prod(size[2:])
