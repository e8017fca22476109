"""Cut a search space into shards of consecutive configurations that cost about the same to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.nn.calls import network_calls
from gross_ray.search.cost import dense_macs, plain_macs
from gross_ray.space import SearchSpace
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.series import SeriesConv2d


def segment_macs(supernet: nn.Module, input_shape: Sequence[int]) -> list[int]:
    """Return the MACs for one image of (C, H, W): before any decomposed layer, then from each layer to the next.

    A decomposed layer counts as the equal dense convolution at every group-size. Layers are in the order of the space,
    that of their definition. If the forward pass calls them in another order, or one of them twice, shards still cost
    about the same, but share fewer prefixes than they could.
    """
    order = {id(layer): number for number, layer in enumerate(series_layers(supernet).values(), start=1)}
    macs = [0] * (len(order) + 1)
    segment = 0
    for call in network_calls(supernet, input_shape):
        if isinstance(call.module, SeriesConv2d):
            segment = order[id(call.module)]
            macs[segment] += dense_macs(call)
        else:
            macs[segment] += plain_macs(call)
    return macs


class PrefixCosts:
    """The cost of consecutive configurations of a space, with each prefix computed once."""

    def __init__(self, space: SearchSpace, macs: Sequence[int]) -> None:
        """Take the space and its `segment_macs`."""
        sizes = [len(group_sizes) for group_sizes in space.group_sizes.values()]
        self.num_configurations = len(space)
        # For each depth d, the number of configurations that share their first d group-sizes; they are consecutive.
        self._blocks = [prod(sizes[depth:]) for depth in range(len(sizes) + 1)]
        self._macs = list(macs)

    def of(self, start: int, stop: int) -> int:
        """Return the MACs for one image of the configurations start to stop - 1."""
        if start >= stop:
            return 0
        return sum(
            macs * ((stop - 1) // block - start // block + 1)
            for macs, block in zip(self._macs, self._blocks, strict=True)
        )

    def cut(self, num_shards: int) -> list[range]:
        """Cut the space into at most `num_shards` shards, the most expensive one as cheap as possible.

        Raises InvalidValueError for less than one shard.
        """
        if num_shards < 1:
            raise InvalidValueError(f"num_shards = {num_shards}: must be 1 or more")
        low, high = self.of(0, 1), self.of(0, self.num_configurations)
        while low < high:
            limit = (low + high) // 2
            if len(self._filled(limit, num_shards)) <= num_shards:
                high = limit
            else:
                low = limit + 1
        return self._filled(low, num_shards)

    def _filled(self, limit: int, most: int) -> list[range]:
        """Return shards that cost no more than `limit` each; stops after `most` + 1 of them."""
        shards: list[range] = []
        start = 0
        while start < self.num_configurations and len(shards) <= most:
            low, high = start + 1, self.num_configurations
            while low < high:
                stop = (low + high + 1) // 2
                low, high = (stop, high) if self.of(start, stop) <= limit else (low, stop - 1)
            shards.append(range(start, low))
            start = low
        return shards
