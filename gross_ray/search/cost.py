"""What a configuration costs: multiply-accumulates (MACs) and parameters, in closed form from per-layer tables."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.nn.calls import Call, network_calls
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.series import SeriesConv2d

CONVENTIONS = ("actual", "paper")


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the MACs of every convolution and linear layer as `model` runs one image of `input_shape` (C, H, W).

    A SeriesConv2d counts as the bottleneck of its active group-size. Raises InvalidValueError where `model` cannot run
    such an image.
    """
    return sum(
        _series_macs(call, call.module.group_size) if isinstance(call.module, SeriesConv2d) else plain_macs(call)
        for call in network_calls(model, input_shape)
    )


def configuration_macs(
    supernet: nn.Module,
    configuration: Sequence[int],
    input_shape: Sequence[int],
    *,
    convention: str = "actual",
) -> int:
    """Return the MACs of one configuration for one image of `input_shape` (C, H, W).

    "actual" counts every convolution and linear layer of the extracted network. "paper" counts as the paper's tables
    do: the bottlenecks of the decomposed layers only, with stride and padding on the first 1x1 (its Table 1). Raises
    InvalidValueError where `supernet` cannot run such an image, or has no such configuration.
    """
    return CostTable.of(supernet, input_shape, convention=convention).macs(configuration)


class CostTable:
    """MACs and parameters of every layer at every group-size, so that a configuration's cost is a sum."""

    def __init__(
        self, space: SearchSpace, macs: tuple[int, list[dict[int, int]]], parameters: tuple[int, list[dict[int, int]]]
    ) -> None:
        """Take, for each cost, what all configurations share and each layer's part by group-size."""
        self._space, self._macs, self._parameters = space, macs, parameters

    @classmethod
    def of(cls, supernet: nn.Module, input_shape: Sequence[int], *, convention: str = "actual") -> CostTable:
        """Measure `supernet` with one forward pass of an image of `input_shape` (C, H, W)."""
        if convention not in CONVENTIONS:
            raise InvalidValueError(f"convention = {convention!r}: must be one of {', '.join(CONVENTIONS)}")
        layers = series_layers(supernet)
        count = _series_macs if convention == "actual" else _series_macs_paper
        shared_macs = 0
        layer_macs: dict[int, dict[int, int]] = {
            id(layer): dict.fromkeys(layer.group_sizes, 0) for layer in layers.values()
        }
        for call in network_calls(supernet, input_shape):
            if isinstance(call.module, SeriesConv2d):
                for size in call.module.group_sizes:
                    layer_macs[id(call.module)][size] += count(call, size)
            elif convention == "actual":
                shared_macs += plain_macs(call)
        series = {id(p) for layer in layers.values() for p in layer.series_parameters()}
        shared_parameters = sum(p.numel() for p in supernet.parameters() if id(p) not in series)
        return cls(
            SearchSpace.of(supernet),
            (shared_macs, list(layer_macs.values())),
            (
                shared_parameters,
                [{s: _series_parameters(layer, s) for s in layer.group_sizes} for layer in layers.values()],
            ),
        )

    def macs(self, configuration: Sequence[int]) -> int:
        """Return the MACs of `configuration` for one image."""
        return self.macs_of_all([self._space.check(configuration)])[0]

    def parameters(self, configuration: Sequence[int]) -> int:
        """Return the number of parameters of `configuration`, biases and all other layers included."""
        return self.parameters_of_all([self._space.check(configuration)])[0]

    def parts(self, cost: str) -> tuple[int, list[dict[int, int]]]:
        """Return of "macs" or "parameters" what all configurations share, and each layer's part by group-size."""
        return {"macs": self._macs, "parameters": self._parameters}[cost]

    def macs_of_all(self, configurations: Sequence[Configuration]) -> list[int]:
        """Return the MACs of each of many members of the space, which are not checked again."""
        return _sums(configurations, *self._macs)

    def parameters_of_all(self, configurations: Sequence[Configuration]) -> list[int]:
        """Return the parameters of each of many members of the space, which are not checked again."""
        return _sums(configurations, *self._parameters)


def _sums(configurations: Sequence[Configuration], shared: int, by_layer: list[dict[int, int]]) -> list[int]:
    sums = [shared] * len(configurations)
    for place, costs in enumerate(by_layer):
        sums = [total + costs[one[place]] for total, one in zip(sums, configurations, strict=True)]
    return sums


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
