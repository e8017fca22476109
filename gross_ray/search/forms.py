"""The two forms of a decomposed layer as plain modules: a bottleneck, and the dense convolution that it equals."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.nn.replace import replace_modules

PARTS = ("pointwise_in", "grouped", "pointwise_out")
"""The three convolutions of a bottleneck, as `SeriesConv2d.to_modules` names them."""


def bottlenecks(network: nn.Module) -> dict[str, nn.Sequential]:
    """Return the bottlenecks of a plain network by name; one that is used several times appears once."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Sequential) and tuple(module._modules) == PARTS
    }


def grouped(bottleneck: nn.Sequential) -> nn.Conv2d:
    """Return the grouped convolution of a bottleneck."""
    conv = bottleneck.get_submodule("grouped")
    assert isinstance(conv, nn.Conv2d)
    return conv


def group_size_of(bottleneck: nn.Sequential) -> int:
    """Return the group-size of a bottleneck of three convolutions."""
    return grouped(bottleneck).weight.shape[1]


def group_sizes_of(network: nn.Module) -> dict[str, int]:
    """Return the group-size of each bottleneck of a plain network by name."""
    return {name: group_size_of(module) for name, module in bottlenecks(network).items()}


def dense_convolution(bottleneck: nn.Sequential) -> nn.Conv2d:
    """Return the dense convolution that a bottleneck of three convolutions equals."""
    parts: list[nn.Conv2d] = [getattr(bottleneck, part) for part in PARTS]
    _, middle, last = parts
    kernel = Bottleneck(*(part.weight.detach().double() for part in parts)).dense_kernel()
    conv = nn.Conv2d(
        kernel.shape[1],
        kernel.shape[0],
        middle.kernel_size,  # type: ignore[arg-type]
        middle.stride,  # type: ignore[arg-type]
        middle.padding,  # type: ignore[arg-type]
        middle.dilation,  # type: ignore[arg-type]
        bias=last.bias is not None,
        padding_mode=middle.padding_mode,
        dtype=middle.weight.dtype,
        device=middle.weight.device,
    )
    with torch.no_grad():
        conv.weight.copy_(kernel)
        if conv.bias is not None and last.bias is not None:
            conv.bias.copy_(last.bias)
    return conv


def fold_layers(network: nn.Module, layers: Collection[str]) -> nn.Module:
    """Return a copy of `network` with the bottlenecks of these layers as dense convolutions."""
    modules = bottlenecks(network)
    return replace_modules(network, {name: dense_convolution(modules[name]) for name in layers})
