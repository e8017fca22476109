"""Accuracy of many configurations at once, exact, each shared prefix computed once.

The same layer input leads to the same output whatever the later layers choose. The network is traced with torch.fx;
its graph is run from one decomposed layer to the next, branching there, depth first, so that the live tensors are
those of one path. A layer's group-sizes run as one convolution on stacked dense kernels.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gross_ray.data.augment import normalise
from gross_ray.decomposition.series import SeriesConv2d
from gross_ray.decomposition.surgery import get_configuration, series_layers, set_configuration
from gross_ray.errors import InvalidValueError
from gross_ray.space import Configuration, SearchSpace

COLUMNS = ("configuration", "correct", "total", "accuracy", "loss")


class NotTraceableWarning(UserWarning):
    """A network cannot be traced, so that configurations are evaluated one by one."""


def evaluate_configurations(
    supernet: nn.Module,
    images: Tensor,
    labels: Tensor,
    configurations: Iterable[Sequence[int]] | None = None,
    *,
    batch_size: int = 100,
) -> pd.DataFrame:
    """Return what a forward pass of each configuration over all images would give.

    `images` are uint8 (N, 3, H, W), normalised here, or floating point, taken as they are; `labels` (N,) int64;
    `configurations` default to the whole space. Columns: configuration (text), correct and total (images), accuracy,
    loss (mean cross-entropy); rows in the order given. A network that torch.fx cannot trace is evaluated with one
    pass a configuration, after a NotTraceableWarning that names the cause. Raises InvalidValueError for a
    configuration outside the space, no images or a batch size below 1.
    """
    space = SearchSpace.of(supernet)
    chosen = list(space) if configurations is None else [space.check(one) for one in configurations]
    if len(images) == 0 or len(images) != len(labels):
        raise InvalidValueError(f"{len(images)} images and {len(labels)} labels: give one label for each, and some")
    if batch_size < 1:
        raise InvalidValueError(f"batch_size = {batch_size}: must be 1 or more")
    active, modes = get_configuration(supernet), {module: module.training for module in supernet.modules()}
    supernet.eval()
    try:
        with torch.inference_mode():
            correct, loss = _evaluate(supernet, images, labels, chosen, batch_size)
    finally:
        for module, training in modes.items():  # one by one: a frozen batch-norm stays frozen
            module.training = training
        set_configuration(supernet, active)
    rows = [
        (str(one), count, len(labels), count / len(labels), total / len(labels))
        for one, count, total in zip(chosen, correct.tolist(), loss.tolist(), strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _evaluate(
    supernet: nn.Module, images: Tensor, labels: Tensor, chosen: list[Configuration], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Return correct images (int64) and summed loss (float64) of each configuration."""
    device = images.device
    correct = torch.zeros(len(chosen), dtype=torch.int64, device=device)
    loss = torch.zeros(len(chosen), dtype=torch.float64, device=device)
    if not chosen:
        return correct.cpu(), loss.cpu()
    graph = _traced(supernet)
    walk = None if graph is None else _PrefixWalk(supernet, graph, chosen)
    with nullcontext() if walk is None else _modules_out_of_place(supernet):
        for start in range(0, len(labels), batch_size):
            batch, truth = images[start : start + batch_size], labels[start : start + batch_size]
            if not batch.is_floating_point():
                batch = normalise(batch)
            batch = batch.contiguous(memory_format=torch.channels_last)
            for place, logits in _logits(supernet, walk, batch, chosen):
                correct[place] += (logits.argmax(dim=1) == truth).sum()
                loss[place] += F.cross_entropy(logits, truth, reduction="sum").double()
    return correct.cpu(), loss.cpu()


def _logits(
    supernet: nn.Module, walk: _PrefixWalk | None, batch: Tensor, chosen: list[Configuration]
) -> Iterable[tuple[Tensor | int, Tensor]]:
    if walk is not None:
        yield from walk.run(batch)
        return
    for place, configuration in enumerate(chosen):
        set_configuration(supernet, configuration)
        yield place, supernet(batch)


def _traced(supernet: nn.Module) -> fx.Graph | None:
    try:
        return _out_of_place(_Tracer().trace(supernet), dict(supernet.named_modules(remove_duplicate=False)))
    except Exception as error:  # torch.fx raises whatever the model's own code meets on symbolic values
        warnings.warn(
            f"this network cannot be traced ({type(error).__name__}: {error}); evaluating one configuration at a time",
            NotTraceableWarning,
            stacklevel=4,
        )
        return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, SeriesConv2d) or super().is_leaf_module(module, qualified_name)


_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _out_of_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> fx.Graph:
    """Rewrite what overwrites its input: sibling branches share the values from before the branch.

    Whatever reads the overwritten value afterwards reads the new one instead. Raises ValueError for a function that
    has no form that leaves its input alone.
    """
    later: set[fx.Node] = set(graph.nodes)
    for node in graph.nodes:
        later.discard(node)
        if _rewritten(node, modules):
            overwritten = node.args[0] if node.args else node.kwargs["input"]
            for user in [user for user in overwritten.users if user in later]:
                user.replace_input_with(overwritten, node)
    return graph


def _rewritten(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether `node` overwrote its first input; it no longer does (a module is switched by the caller)."""
    if node.op == "call_module":
        return getattr(modules[str(node.target)], "inplace", False) is True
    if node.kwargs.get("out") is not None:
        raise ValueError(f"{node.target} writes into `out`")
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    overwrites = name.endswith("_") and not name.endswith("__")
    if node.op == "call_method" and overwrites:
        node.target = name[:-1]
        return True
    if node.op == "call_function" and node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
        return True
    if node.op == "call_function" and overwrites and name not in ("and_", "or_", "not_", "is_"):  # those of `operator`
        twin = getattr(F, name[:-1], None) or getattr(torch, name[:-1], None)
        if twin is None:
            raise ValueError(f"{name} overwrites its input")
        node.target = twin
        return True
    return False


@contextmanager
def _modules_out_of_place(model: nn.Module) -> Iterator[None]:
    """Switch off `inplace` of all modules while it is open."""
    switched = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    for module in switched:
        module.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.inplace = True  # type: ignore[assignment]


@dataclass
class _Prefix:
    """A node of the prefix tree: the places of the configurations that end here, or what follows by group-size."""

    places: list[int] = field(default_factory=list)
    following: dict[int, _Prefix] = field(default_factory=dict)


class _PrefixWalk:
    """Runs a traced supernet over a prefix tree of configurations."""

    def __init__(self, supernet: nn.Module, graph: fx.Graph, chosen: list[Configuration]) -> None:
        names = {id(layer): place for place, layer in enumerate(series_layers(supernet).values())}
        self._modules = dict(supernet.named_modules(remove_duplicate=False))
        self._nodes = list(graph.nodes)
        self._interpreter = fx.Interpreter(supernet, graph=graph)
        # The places in a configuration of the decomposed layers, in the order in which the graph meets them first.
        self._layer_of = {
            node: names[id(self._modules[str(node.target)])]
            for node in self._nodes
            if node.op == "call_module" and isinstance(self._modules[str(node.target)], SeriesConv2d)
        }
        order = list(dict.fromkeys(self._layer_of.values()))
        self._root = _Prefix()
        for place, configuration in enumerate(chosen):
            prefix = self._root
            for layer in order:
                prefix = prefix.following.setdefault(configuration[layer], _Prefix())
            prefix.places.append(place)
        self._last_use: dict[fx.Node, list[fx.Node]] = {}
        last_user = {used: node for node in self._nodes for used in node.all_input_nodes}
        for used, user in last_user.items():
            self._last_use.setdefault(user, []).append(used)
        self._kernels: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def run(self, batch: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield (places, logits): the configurations at `places` all give `logits`."""
        yield from self._walk(0, {"input": batch}, self._root, {})

    def _walk(
        self, start: int, values: dict[Any, Any], prefix: _Prefix, sizes: dict[int, int]
    ) -> Iterable[tuple[Tensor, Tensor]]:
        for index in range(start, len(self._nodes)):
            node = self._nodes[index]
            if node.op == "output":
                yield torch.tensor(prefix.places, device=values[node.args[0]].device), values[node.args[0]]
                return
            layer = self._layer_of.get(node)
            if layer is None:
                values[node] = self._run_node(node, values)
                self._forget(node, values)
                continue
            images = values[node.args[0]]
            if layer in sizes:  # a shared layer met again: its group-size is chosen already
                values[node] = self._siblings(node, images, (sizes[layer],))[0]
                self._forget(node, values)
                continue
            choices = tuple(prefix.following)
            self._forget(node, values)
            for size, output in zip(choices, self._siblings(node, images, choices), strict=True):
                branch = {**values, node: output}
                yield from self._walk(index + 1, branch, prefix.following[size], {**sizes, layer: size})
            return

    def _run_node(self, node: fx.Node, values: dict[Any, Any]) -> Any:
        if node.op == "placeholder":
            return values.pop("input") if "input" in values else node.args[0]  # any other argument: its default
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: values[used])
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)

    def _forget(self, node: fx.Node, values: dict[Any, Any]) -> None:
        for used in self._last_use.get(node, ()):
            values.pop(used, None)

    def _siblings(self, node: fx.Node, images: Tensor, sizes: tuple[int, ...]) -> Sequence[Tensor]:
        """Return the layer's output at each group-size: one convolution on the stacked dense kernels."""
        layer = self._modules[str(node.target)]
        assert isinstance(layer, SeriesConv2d)
        key = (id(layer), sizes)
        if key not in self._kernels:
            kernels = [layer.bottleneck(size).dense_kernel() for size in sizes]
            stacked = torch.cat(kernels).contiguous(memory_format=torch.channels_last)
            self._kernels[key] = stacked
        padding = layer.padding
        if layer.padding_mode != "zeros":
            images = F.pad(images, layer._padding_both_sides, mode=layer.padding_mode)
            padding = (0, 0)
        bias = None if layer.bias is None else layer.bias.repeat(len(sizes))
        outputs = F.conv2d(images, self._kernels[key], bias, layer.stride, padding, layer.dilation)
        # What follows is faster on whole tensors than on slices of one.
        return [output.contiguous(memory_format=torch.channels_last) for output in outputs.split(layer.out_channels, 1)]
