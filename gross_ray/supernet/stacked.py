"""Several supernets as one: their terms stacked, all group-sizes of one shape, a mask choosing the active ones.

S supernets, K group-sizes of a layer, G the largest of them; shapes are otherwise those of a bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gross_ray.btd.expansion import expand_grouped_weight
from gross_ray.errors import InvalidValueError
from gross_ray.nn.replace import replace_modules
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.series import SeriesConv2d

TERMS = ("pointwise_in", "grouped", "pointwise_out")


class StackedSeries(nn.Module):
    """A series whose terms at all group-sizes are three tensors: the same graph whichever group-size is active.

    Its terms are zero-extended to the largest group-size by Psi (Eq. 5), so that Eq. 6 is a product with `active`,
    which is 1 for the terms that take part and 0 for the others. They are empty until `torch.func.functional_call`
    puts tensors in their place: `pointwise_in` (K, C_in, C_in, 1, 1), `grouped` (K, C_in, G, kH, kW), `pointwise_out`
    (K, C_out, C_in, 1, 1) and `active` (K,).
    """

    blocks: Tensor
    active: Tensor
    pointwise_in: nn.Parameter
    grouped: nn.Parameter
    pointwise_out: nn.Parameter

    def __init__(self, series: SeriesConv2d) -> None:
        """Take the geometry and the bias of `series`, not its terms."""
        super().__init__()
        self.group_sizes, self.out_channels = series.group_sizes, series.out_channels
        self.in_channels, self.kernel_size = series.in_channels, series.kernel_size
        self._convolve = series.convolve
        like = series.grouped[0]
        for name in TERMS:
            self.register_parameter(name, nn.Parameter(torch.empty(0, dtype=like.dtype, device=like.device)))
        self.register_buffer("active", torch.zeros(len(self.group_sizes), dtype=like.dtype, device=like.device))
        self._places = [_places(self.in_channels, size, self.group_sizes[-1]) for size in self.group_sizes]
        blocks = torch.stack([place > 0 for place in self._places])
        # (K, C_in, G, 1, 1): where the terms of a smaller group-size may be other than 0.
        self.register_buffer("blocks", blocks[..., None, None].to(like), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Run the bottleneck that `active` sums up (Eq. 6)."""
        terms = (self.pointwise_in, self.grouped * self.blocks, self.pointwise_out)
        return self._convolve(images, *((self.active @ each.flatten(1)).view(each.shape[1:]) for each in terms))

    def stack(self, terms: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """Return the terms of one supernet's layer, smallest group-size first, as stacked tensors."""
        largest = self.group_sizes[-1]
        expanded = [expand_grouped_weight(term.detach(), largest) for term in terms["grouped"]]
        return {
            "pointwise_in": torch.stack([term.detach() for term in terms["pointwise_in"]]),
            "grouped": torch.stack(expanded),
            "pointwise_out": torch.stack([term.detach() for term in terms["pointwise_out"]]),
        }

    def unstack(self, stacked: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Return what `stack` was given."""
        channels = self.in_channels
        grouped = [
            term.flatten(0, 1)[_order(place, channels * size).to(term.device)].view(channels, size, *self.kernel_size)
            for term, place, size in zip(stacked["grouped"], self._places, self.group_sizes, strict=True)
        ]
        return {
            "pointwise_in": list(stacked["pointwise_in"]),
            "grouped": grouped,
            "pointwise_out": list(stacked["pointwise_out"]),
        }


class SupernetStack:
    """Supernets of one base network that differ in the terms of their series alone."""

    def __init__(self, supernets: Sequence[nn.Module]) -> None:
        """Stack the terms; raises InvalidValueError for supernets of which something else differs."""
        self.supernets = list(supernets)
        _check_alike(self.supernets)
        series = series_layers(self.supernets[0])
        self.template = replace_modules(self.supernets[0], {name: StackedSeries(one) for name, one in series.items()})
        """One of them, with a StackedSeries in each layer: run it by `torch.func.functional_call`."""
        for parameter in self.template.parameters():
            parameter.requires_grad_(False)
        self.layers: dict[str, StackedSeries] = {
            name: module for name, module in self.template.named_modules() if isinstance(module, StackedSeries)
        }
        self.terms = self.stack([dict(supernet.named_parameters()) for supernet in self.supernets])
        """Stacked tensors (S, K, ...) by the names that the template gives them."""

    def stack(self, tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack tensors that belong to the supernets' terms, one mapping by the terms' names a supernet."""
        stacked: dict[str, Tensor] = {}
        for layer, series in self.layers.items():
            members = [
                series.stack(
                    {term: [each[f"{layer}.{term}.{k}"] for k in range(len(series.group_sizes))] for term in TERMS}
                )
                for each in tensors
            ]
            stacked |= {f"{layer}.{term}": torch.stack([member[term] for member in members]) for term in TERMS}
        return stacked

    def unstack(self, stacked: Mapping[str, Tensor], member: int) -> dict[str, Tensor]:
        """Return one supernet's tensors of what `stack` gave, by the terms' names."""
        found: dict[str, Tensor] = {}
        for layer, series in self.layers.items():
            parts = series.unstack({term: stacked[f"{layer}.{term}"][member] for term in TERMS})
            found |= {f"{layer}.{term}.{k}": one for term, terms in parts.items() for k, one in enumerate(terms)}
        return found

    def active(self, configurations: Sequence[Sequence[Sequence[int]]]) -> list[dict[str, Tensor]]:
        """Return for each step the masks (S, K) of its configurations, one a supernet, by the template's names.

        They are copied to the device at once, so that no step waits for it.
        """
        chosen = torch.tensor([[list(one) for one in step] for step in configurations])  # (steps, S, layers)
        masks = {}
        for place, (name, series) in enumerate(self.layers.items()):
            sizes = torch.tensor(series.group_sizes)
            masks[f"{name}.active"] = (sizes <= chosen[..., place, None]).to(series.active)
        return [{name: mask[step] for name, mask in masks.items()} for step in range(len(chosen))]

    def select(self, members: Sequence[int]) -> None:
        """Go on with some of the supernets."""
        self.supernets = [self.supernets[member] for member in members]
        self.terms = {name: term.detach()[list(members)] for name, term in self.terms.items()}

    def write_back(self, member: int) -> nn.Module:
        """Put the stacked terms of one supernet into it, and return it."""
        supernet = self.supernets[member]
        with torch.no_grad():
            parameters = dict(supernet.named_parameters())
            for name, term in self.unstack(self.terms, member).items():
                parameters[name].copy_(term)
        return supernet


def _places(channels: int, size: int, largest: int) -> Tensor:
    """Return for each place of a zero-extended weight (C, G) the place in the weight (C, size), from 1; 0: none."""
    return expand_grouped_weight(torch.arange(1, channels * size + 1).view(channels, size, 1, 1), largest)[..., 0, 0]


def _order(places: Tensor, count: int) -> Tensor:
    return places.flatten().argsort()[-count:]


def _check_alike(supernets: Sequence[nn.Module]) -> None:
    first, *others = supernets
    terms = {
        id(one)
        for supernet in supernets
        for layer in series_layers(supernet).values()
        for one in layer.series_parameters()
    }
    sizes = {name: layer.group_sizes for name, layer in series_layers(first).items()}
    fixed = _fixed(first, terms)
    for other in others:
        theirs = _fixed(other, terms)
        alike = sizes == {name: layer.group_sizes for name, layer in series_layers(other).items()}
        differing = [name for name in fixed.keys() | theirs.keys() if not _equal(fixed.get(name), theirs.get(name))]
        if not alike or differing:
            what = f"{min(differing)!r} differs" if differing else "their group-sizes differ"
            raise InvalidValueError(f"supernets that are trained together must come from one network: {what}")


def _fixed(supernet: nn.Module, terms: set[int]) -> dict[str, Tensor]:
    parameters = {name: one for name, one in supernet.named_parameters() if id(one) not in terms}
    return parameters | dict(supernet.named_buffers())


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
