"""Several supernets as one: stacked terms, zero-extended to one shape, and a mask of the active ones.

S: supernets, K: group-sizes of a layer, G: the largest of them; other shapes are those of a bottleneck.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gross_ray.btd.expansion import expand_grouped_weight
from gross_ray.errors import InvalidValueError
from gross_ray.nn.products import conv2d_by_products
from gross_ray.nn.replace import replace_modules
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.series import SeriesConv2d

TERMS = ("pointwise_in", "grouped", "pointwise_out")


class StackedSeries(nn.Module):
    """A series whose terms are three tensors, so that the graph is the same for every active group-size.

    Psi (Eq. 5) extends the terms with zeros to the largest group-size, so Eq. 6 is a product with `active`: 1 for each
    term of the sum, 0 for the others. With none active, the original convolution (DENSE) runs. All are empty until
    `torch.func.functional_call` supplies tensors: `pointwise_in` (K, C_in, C_in, 1, 1), `grouped` (K, C_in, G, kH, kW),
    `pointwise_out` (K, C_out, C_in, 1, 1) and `active` (K,).
    """

    blocks: Tensor
    active: Tensor
    dense_weight: Tensor | None
    pointwise_in: nn.Parameter
    grouped: nn.Parameter
    pointwise_out: nn.Parameter

    def __init__(self, series: SeriesConv2d, kernels: Collection[str] = ()) -> None:
        """Take the geometry and the bias of `series`, but not its terms; compute as in EngineOptions.kernels."""
        super().__init__()
        self.group_sizes, self.out_channels = series.series_sizes, series.out_channels
        self.in_channels, self.kernel_size = series.in_channels, series.kernel_size
        conv2d = conv2d_by_products if "products" in kernels else None
        self._convolve = partial(series.convolve, composed="composed" in kernels, conv2d=conv2d)
        self._convolve_dense = partial(series.convolve_dense, conv2d=conv2d)
        self.register_buffer("dense_weight", series.dense_weight, persistent=False)
        like = series.grouped[0]
        for name in TERMS:
            self.register_parameter(name, nn.Parameter(torch.empty(0, dtype=like.dtype, device=like.device)))
        self.register_buffer("active", torch.zeros(len(self.group_sizes), dtype=like.dtype, device=like.device))
        self._sources = [_sources(self.in_channels, size, self.group_sizes[-1]) for size in self.group_sizes]
        blocks = torch.stack([source > 0 for source in self._sources])
        # (K, C_in, G, 1, 1): 1 for the elements that belong to a group-size, 0 for the zeros of Psi.
        self.register_buffer("blocks", blocks[..., None, None].to(like), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Run the bottleneck that is the sum of the active terms (Eq. 6), or the original convolution."""
        terms = (self.pointwise_in, self.grouped * self.blocks, self.pointwise_out)
        output = self._convolve(images, *((self.active @ term.flatten(1)).view(term.shape[1:]) for term in terms))
        if self.dense_weight is None:
            return output
        is_dense = 1 - self.active[0]  # the first term belongs to the sum at every group-size
        return output + self._convolve_dense(images, self.dense_weight * is_dense, None)

    def stack(self, terms: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """Return one supernet's terms of this layer, smallest group-size first, as stacked tensors."""
        largest = self.group_sizes[-1]
        expanded = [expand_grouped_weight(term.detach(), largest) for term in terms["grouped"]]
        return {
            "pointwise_in": torch.stack([term.detach() for term in terms["pointwise_in"]]),
            "grouped": torch.stack(expanded),
            "pointwise_out": torch.stack([term.detach() for term in terms["pointwise_out"]]),
        }

    def unstack(self, stacked: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Return the terms from which `stack` made `stacked`."""
        channels = self.in_channels
        grouped = [
            term.flatten(0, 1)[source.flatten().argsort()[-channels * size :].to(term.device)].view(
                channels, size, *self.kernel_size
            )
            for term, source, size in zip(stacked["grouped"], self._sources, self.group_sizes, strict=True)
        ]
        return {
            "pointwise_in": list(stacked["pointwise_in"]),
            "grouped": grouped,
            "pointwise_out": list(stacked["pointwise_out"]),
        }


class SupernetStack:
    """Supernets of one base network that differ only in the terms of their series."""

    def __init__(self, supernets: Sequence[nn.Module], kernels: Collection[str] = ()) -> None:
        """Stack the terms; raises InvalidValueError if the supernets differ in anything else.

        `kernels` says how the template computes (EngineOptions.kernels).
        """
        self.supernets = list(supernets)
        _check_alike(self.supernets)
        stacked = {name: StackedSeries(series, kernels) for name, series in series_layers(self.supernets[0]).items()}
        self.template = replace_modules(self.supernets[0], stacked)
        """A supernet with a StackedSeries in each layer; run it by `torch.func.functional_call`."""
        for parameter in self.template.parameters():
            parameter.requires_grad_(False)
        self.layers: dict[str, StackedSeries] = {
            name: module for name, module in self.template.named_modules() if isinstance(module, StackedSeries)
        }
        self.terms = self.stack([dict(supernet.named_parameters()) for supernet in self.supernets])
        """Stacked tensors (S, K, ...) by their names in the template."""

    def stack(self, tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack tensors that belong to the supernets' terms: one mapping for each supernet, by the terms' names."""
        stacked: dict[str, Tensor] = {}
        for layer, series in self.layers.items():
            members = [
                series.stack(
                    {term: [member[f"{layer}.{term}.{k}"] for k in range(len(series.group_sizes))] for term in TERMS}
                )
                for member in tensors
            ]
            stacked |= {f"{layer}.{term}": torch.stack([member[term] for member in members]) for term in TERMS}
        return stacked

    def unstack(self, stacked: Mapping[str, Tensor], member: int) -> dict[str, Tensor]:
        """Return one supernet's tensors from the result of `stack`, by the terms' names."""
        found: dict[str, Tensor] = {}
        for layer, series in self.layers.items():
            parts = series.unstack({term: stacked[f"{layer}.{term}"][member] for term in TERMS})
            found |= {f"{layer}.{name}.{k}": term for name, terms in parts.items() for k, term in enumerate(terms)}
        return found

    def active(self, configurations: Sequence[Sequence[Sequence[int]]]) -> list[dict[str, Tensor]]:
        """Return each step's masks (S, K), by their names in the template; a step has a configuration per supernet.

        One copy brings the masks of all steps to the device, so that no step waits for its own.
        """
        chosen = torch.tensor([[list(sizes) for sizes in step] for step in configurations])  # (steps, S, layers)
        masks = {}
        for index, (name, series) in enumerate(self.layers.items()):
            sizes = torch.tensor(series.group_sizes)
            masks[f"{name}.active"] = (sizes <= chosen[..., index, None]).to(series.active)  # of DENSE: none
        return [{name: mask[step] for name, mask in masks.items()} for step in range(len(chosen))]

    def select(self, members: Sequence[int]) -> None:
        """Go on with some of the supernets."""
        self.supernets = [self.supernets[member] for member in members]
        self.terms = {name: term.detach()[list(members)] for name, term in self.terms.items()}

    def write_back(self, member: int) -> nn.Module:
        """Copy one supernet's stacked terms back into it, and return it."""
        supernet = self.supernets[member]
        with torch.no_grad():
            parameters = dict(supernet.named_parameters())
            for name, term in self.unstack(self.terms, member).items():
                parameters[name].copy_(term)
        return supernet


def _sources(channels: int, size: int, largest: int) -> Tensor:
    """Return for each element of a zero-extended weight (C, G) its index from 1 in the weight (C, size); 0: a zero."""
    return expand_grouped_weight(torch.arange(1, channels * size + 1).view(channels, size, 1, 1), largest)[..., 0, 0]


def _check_alike(supernets: Sequence[nn.Module]) -> None:
    first, *others = supernets
    sizes = {name: layer.group_sizes for name, layer in series_layers(first).items()}
    fixed = _fixed(first)
    for other in others:
        others_fixed = _fixed(other)
        same_sizes = sizes == {name: layer.group_sizes for name, layer in series_layers(other).items()}
        differing = [
            name
            for name in fixed.keys() | others_fixed.keys()
            if name not in fixed or name not in others_fixed or not torch.equal(fixed[name], others_fixed[name])
        ]
        if not same_sizes or differing:
            what = f"{min(differing)!r} differs" if differing else "their group-sizes differ"
            raise InvalidValueError(f"supernets that are trained together must come from one network: {what}")


def _fixed(supernet: nn.Module) -> dict[str, Tensor]:
    """Return all parameters but the series' terms, and all buffers."""
    terms = {id(term) for layer in series_layers(supernet).values() for term in layer.series_parameters()}
    parameters = {name: tensor for name, tensor in supernet.named_parameters() if id(tensor) not in terms}
    return parameters | dict(supernet.named_buffers())
