"""Run a traced supernet over the prefix tree of a list of configurations, each prefix once.

A layer's output does not depend on the group-sizes of later layers. The walk is depth first and branches at each
decomposed layer; siblings continue together, as rows of one batch, up to the limit for the following layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gross_ray.errors import InvalidValueError
from gross_ray.nn.batch_norm import has_statistics
from gross_ray.search.graph import Traced
from gross_ray.search.layer_forms import Siblings
from gross_ray.space import Configuration, ordered
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.series import SeriesConv2d


@dataclass(slots=True)
class Prefix:
    """A node of the prefix tree: an inner node has children, a leaf the positions of its configuration."""

    sizes: tuple[int, ...] = ()
    """The group-sizes chosen so far, in the order in which the graph calls the layers."""
    positions: list[int] = field(default_factory=list)
    """Where the leaf's configuration occurs in the list of configurations."""
    following: dict[int, Prefix] = field(default_factory=dict)
    """The children by group-size of the next layer."""


Statistics = dict[tuple[fx.Node, tuple[int, ...]], tuple[Tensor, Tensor]]
"""Mean and variance (C,) of each batch-norm's input after each prefix."""
Values = dict[fx.Node, Any]
OnLeaves = Callable[[list[Prefix], Tensor], None]


class PrefixWalk:
    """The graph of one supernet, ready to run any list of its configurations."""

    def __init__(self, supernet: nn.Module, traced: Traced) -> None:
        modules = dict(supernet.named_modules(remove_duplicate=False))
        in_space = {id(layer): index for index, layer in enumerate(series_layers(supernet).values())}
        self.siblings: Mapping[SeriesConv2d, Siblings] = {}
        """The prepared form of each decomposed layer; to be set before `run`."""
        self._nodes = list(traced.graph.nodes)
        self._constants = traced.constants
        self._input = next(node for node in self._nodes if node.op == "placeholder")
        self._interpreter = fx.Interpreter(supernet, graph=traced.graph)
        called = {node: modules.get(str(node.target)) for node in self._nodes if node.op == "call_module"}
        self._layer_of = {node: layer for node, layer in called.items() if isinstance(layer, SeriesConv2d)}
        self.norms = {n: norm for n, norm in called.items() if isinstance(norm, _BatchNorm) and has_statistics(norm)}
        """The batch-norms that keep statistics, by node."""
        self.layers = list(dict.fromkeys(self._layer_of.values()))
        """The decomposed layers that the graph calls, in the order of their first calls."""
        self.num_layers = len(self.layers)
        self._depth_of = {layer: depth for depth, layer in enumerate(self.layers)}
        self._order = [in_space[id(layer)] for layer in self.layers]
        self._last_use: dict[fx.Node, list[fx.Node]] = {}
        last_user = {used: node for node in self._nodes for used in node.all_input_nodes}
        for used, user in last_user.items():
            self._last_use.setdefault(user, []).append(used)
        self._from_images: set[fx.Node] = set()
        for node in self._nodes:
            if node.op == "placeholder" or any(used in self._from_images for used in node.all_input_nodes):
                self._from_images.add(node)

    def tree(self, configurations: Sequence[Configuration]) -> Prefix:
        """Return the prefix tree of `configurations`, with layers in the order in which the graph calls them."""
        root = Prefix()
        for position, configuration in enumerate(configurations):
            prefix = root
            for layer in self._order:
                size = configuration[layer]
                if size not in prefix.following:
                    prefix.following[size] = Prefix((*prefix.sizes, size))
                prefix = prefix.following[size]
            prefix.positions.append(position)
        return root

    def run(
        self,
        batch: Tensor,
        root: Prefix,
        on_leaves: OnLeaves,
        *,
        limits: Sequence[int],
        apart: bool = False,
        on_layer: Callable[[SeriesConv2d, Tensor], None] | None = None,
        on_depth: Callable[[int], None] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """Run all configurations of the tree on `batch`, (N, ...).

        `on_leaves(leaves, logits)` gets logits (len(leaves) * N, classes), leaf after leaf. Up to `limits[d]` prefixes
        continue together after the d-th decomposed layer; with `apart` each continues alone, and the limit holds only
        for the layer itself. `on_layer` receives the input of each decomposed layer at its first call; `on_depth(d)` is
        called before the nodes that follow d layers. With `statistics`, a batch-norm uses those of its prefix; if they
        are missing, it normalises as in training and stores this batch's statistics there.
        """
        walk = _Walk(self, len(batch), on_leaves, limits, apart, on_layer, on_depth, statistics)
        walk.go(0, {self._input: batch}, [root])


@dataclass
class _Walk:
    """One pass over one batch."""

    graph: PrefixWalk
    num_images: int
    on_leaves: OnLeaves
    limits: Sequence[int]
    apart: bool
    on_layer: Callable[[SeriesConv2d, Tensor], None] | None
    on_depth: Callable[[int], None] | None
    statistics: Statistics | None

    def go(self, start: int, values: Values, prefixes: list[Prefix]) -> None:
        """Run from node `start` on; the rows of each value are ordered by prefix, then by image."""
        graph = self.graph
        if self.on_depth is not None:
            self.on_depth(len(prefixes[0].sizes))
        for index in range(start, len(graph._nodes)):
            node = graph._nodes[index]
            if node.op == "output":
                result = values[node.args[0]] if isinstance(node.args[0], fx.Node) else node.args[0]
                self.on_leaves(prefixes, logits_of(result, len(prefixes) * self.num_images))
                return
            layer = graph._layer_of.get(node)
            if layer is not None:
                self._branch(index, node, layer, values, prefixes)
                return
            if self.statistics is not None and node in graph.norms:
                values[node] = self._normalised(node, values[node.all_input_nodes[0]], prefixes, self.statistics)
            elif node is not graph._input:
                values[node] = self._run_node(node, values)
            self._forget(node, values)

    def _branch(self, index: int, node: fx.Node, layer: SeriesConv2d, values: Values, prefixes: list[Prefix]) -> None:
        """Run the layer at `index` and the rest of the graph; empties `values`, so that tensors are freed early."""
        depth = self.graph._depth_of[layer]
        again = depth < len(prefixes[0].sizes)  # a shared layer called again: its group-size is already chosen
        images = values[node.args[0]]  # type: ignore[index]
        if self.on_layer is not None and not again:
            self.on_layer(layer, images)
        self._forget(node, values)
        groups: dict[tuple[int, ...], list[int]] = {}
        for member, prefix in enumerate(prefixes):
            sizes = (prefix.sizes[depth],) if again else ordered(prefix.following)
            groups.setdefault(sizes, []).append(member)
        pieces = [
            (sizes[first : first + step], members)
            for sizes, members in groups.items()
            for step in [max(1, self.limits[depth] // len(members))]
            for first in range(0, len(sizes), step)
        ]
        for number, (sizes, members) in enumerate(pieces, start=1):
            branch = self._branched(values, members, len(prefixes), len(sizes))
            inputs = images if len(members) == len(prefixes) else self._rows(images, members)
            if number == len(pieces):
                values.clear()
                del images
            outputs = self.graph.siblings[layer].run(inputs, sizes)
            del inputs
            chosen = [prefixes[member] for member in members]
            following = chosen if again else [prefix.following[size] for size in sizes for prefix in chosen]
            if not self.apart:
                branch[node] = outputs
                del outputs
                self.go(index + 1, branch, following)
                continue
            for member, prefix in enumerate(following):
                own = self._branched(branch, [member], len(following), 1)
                own[node] = self._rows(outputs, [member])
                self.go(index + 1, own, [prefix])

    def _normalised(self, node: fx.Node, inputs: Tensor, prefixes: list[Prefix], statistics: Statistics) -> Tensor:
        """Run a batch-norm on the rows of each prefix, with the statistics of that prefix."""
        norm = self.graph.norms[node]
        results = []
        for prefix, rows in zip(prefixes, inputs.chunk(len(prefixes)), strict=True):
            known = statistics.get((node, prefix.sizes))
            mean, variance = known or (None, None)
            results.append(F.batch_norm(rows, mean, variance, norm.weight, norm.bias, known is None, eps=norm.eps))
            if known is None:
                exact = rows.to(torch.promote_types(rows.dtype, torch.float32))  # bfloat16's 8 bits are too few
                variance, mean = torch.var_mean(exact, [dim for dim in range(rows.dim()) if dim != 1])
                statistics[node, prefix.sizes] = mean, variance
        return results[0] if len(results) == 1 else torch.cat(results)

    def _run_node(self, node: fx.Node, values: Values) -> Any:
        if node.op == "placeholder":
            return node.args[0]  # the default of an argument after the images
        if node.op == "get_attr" and node.target in self.graph._constants:
            return self.graph._constants[str(node.target)]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: values[used])
        return getattr(self.graph._interpreter, node.op)(node.target, args, kwargs)

    def _forget(self, node: fx.Node, values: Values) -> None:
        for used in self.graph._last_use.get(node, ()):
            values.pop(used, None)

    def _rows(self, value: Tensor, members: list[int]) -> Tensor:
        """Return the rows of the prefixes `members`; a view if these are consecutive."""
        count = self.num_images
        if members == list(range(members[0], members[0] + len(members))):
            return value.narrow(0, members[0] * count, len(members) * count)
        return torch.cat([value.narrow(0, member * count, count) for member in members])

    def _branched(self, values: Values, members: list[int], num_prefixes: int, times: int) -> Values:
        """Return `values` with only the rows of the prefixes `members`, repeated `times` times."""
        branched = {}
        for node, value in values.items():
            follows_images = node in self.graph._from_images and isinstance(value, Tensor) and value.dim() > 0
            if follows_images and len(value) == num_prefixes * self.num_images:
                chosen = value if len(members) == num_prefixes else self._rows(value, members)
                branched[node] = chosen if times == 1 else torch.cat([chosen] * times)
            else:
                branched[node] = value
        return branched


def logits_of(result: Any, num_images: int) -> Tensor:
    """Return a network's result; raises InvalidValueError unless it is logits (num_images, classes)."""
    if not isinstance(result, Tensor) or result.dim() != 2 or len(result) != num_images:
        found = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise InvalidValueError(f"the network returns {found}: it must return one tensor of logits (N, classes)")
    return result
