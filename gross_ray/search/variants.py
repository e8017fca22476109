"""One network with each of its decomposed layers in any form: as a bottleneck, or as a dense convolution."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from math import prod

import torch
from torch import nn

from gross_ray.nn.calls import network_calls
from gross_ray.nn.replace import replace_modules
from gross_ray.search.forms import dense_convolution
from gross_ray.space import DENSE
from gross_ray.supernet.configure import series_layers

Forms = tuple[int, ...]
"""The form of each decomposed layer, in layer order: the group-size of its bottleneck, or DENSE."""


class Variants:
    """The networks that a supernet's layers can form, all with the same weights.

    A bottleneck equals a dense convolution, so any layer may run as one, whether its choices contain DENSE or not.
    """

    def __init__(self, supernet: nn.Module, device: torch.device | str, input_shape: Sequence[int]) -> None:
        """Copy the supernet to `device`; its inputs are (N, *input_shape)."""
        self.input_shape = tuple(input_shape)
        self._layers = series_layers(supernet)
        self._device = torch.device(device)
        self._made: dict[tuple[str, int], nn.Module] = {}
        dense = {name: self.form(name, DENSE) for name in self._layers}
        self.full = replace_modules(supernet, dense).eval().to(self._device)
        """The network with all layers dense."""

    @property
    def forms(self) -> dict[str, Forms]:
        """The forms of each layer: DENSE, then the group-sizes."""
        return {name: (DENSE, *layer.series_sizes) for name, layer in self._layers.items()}

    @property
    def size(self) -> int:
        """The number of networks."""
        return prod(map(len, self.forms.values()))

    @cached_property
    def calls(self) -> Mapping[str, int]:
        """How often a forward pass calls each layer."""
        modules = [call.module for call in network_calls(self.full, self.input_shape)]
        return {name: sum(module is self.full.get_submodule(name) for module in modules) for name in self._layers}

    def form(self, name: str, size: int) -> nn.Module:
        """Return a layer in one form, contiguous: three convolutions, or the dense one."""
        if (name, size) not in self._made:
            layer = self._layers[name]
            if size == DENSE and DENSE not in layer.group_sizes:
                found: nn.Module = dense_convolution(layer.to_modules(layer.series_sizes[0]))  # type: ignore[arg-type]
            else:
                found = layer.to_modules(size)
            self._made[name, size] = found.eval().to(self._device)
        return self._made[name, size]

    def network(self, forms: Forms) -> nn.Module:
        """Return the network with its layers in these forms; its weights are shared with the others."""
        chosen = {name: self.form(name, size) for name, size in zip(self._layers, forms, strict=True)}
        return replace_modules(self.full, chosen, share_weights=True)


def balanced(
    forms: Mapping[str, Forms], number: int, generator: torch.Generator, besides: Collection[Forms] = ()
) -> list[Forms]:
    """Draw `number` different networks, none of `besides`, in which each layer has each form about equally often.

    Of a space with fewer, return all. Each form is seen beside many forms of the other layers, and a least-squares fit
    averages over them.
    """
    layers = list(forms.values())
    number = min(number, prod(map(len, layers)) - len(besides))
    drawn: dict[Forms, None] = {}
    while len(drawn) < number:
        columns = [_shuffled(each, number, generator) for each in layers]
        drawn |= dict.fromkeys(one for one in zip(*columns, strict=True) if one not in besides)
    return list(drawn)[:number]


def _shuffled(forms: Forms, number: int, generator: torch.Generator) -> list[int]:
    """Return `number` forms, each equally often up to one, in random order."""
    order = torch.randperm(len(forms), generator=generator, device=generator.device).tolist()
    repeated = [forms[order[index % len(forms)]] for index in range(number)]
    return [repeated[index] for index in torch.randperm(number, generator=generator, device=generator.device).tolist()]
