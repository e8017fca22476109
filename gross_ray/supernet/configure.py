"""Configurations of a supernet: activate one, or extract one as a plain network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.nn.replace import replace_modules
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.series import SeriesConv2d


def series_layers(supernet: nn.Module) -> dict[str, SeriesConv2d]:
    """Return the SeriesConv2d layers of a supernet by name, in layer order; raises InvalidValueError if it has none."""
    found = {name: module for name, module in supernet.named_modules() if isinstance(module, SeriesConv2d)}
    if not found:
        raise InvalidValueError("this network has no decomposed layer; make one with decompose_model")
    return found


def largest_decomposed(supernet: nn.Module) -> Configuration:
    """Return the configuration of the largest group-sizes: DENSE only for a layer without any."""
    return Configuration([(layer.series_sizes or layer.group_sizes)[-1] for layer in series_layers(supernet).values()])


def set_configuration(supernet: nn.Module, configuration: Sequence[int]) -> None:
    """Activate `configuration`; raises InvalidValueError (and changes nothing) if it is not in the search space."""
    checked = SearchSpace.of(supernet).check(configuration)
    for layer, group_size in zip(series_layers(supernet).values(), checked, strict=True):
        layer.group_size = group_size


def get_configuration(supernet: nn.Module) -> Configuration:
    """Return the active configuration."""
    return Configuration([layer.group_size for layer in series_layers(supernet).values()])


def extract(supernet: nn.Module, configuration: Sequence[int]) -> nn.Module:
    """Return a copy of the network at one configuration, with plain torch.nn modules only."""
    checked = SearchSpace.of(supernet).check(configuration)
    layers = series_layers(supernet)
    return replace_modules(
        supernet, {name: layers[name].to_modules(size) for name, size in zip(layers, checked, strict=True)}
    )


def check_plain(network: nn.Module, what: str) -> None:
    """Raise InvalidValueError if `network` is a supernet; `what` names the refused operation."""
    if any(isinstance(module, SeriesConv2d) for module in network.modules()):
        raise InvalidValueError(
            f"{what} needs a plain network, not a supernet; extract a configuration first (gross_ray.extract)"
        )
