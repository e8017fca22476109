"""A network as a torch.fx graph whose nodes can be run more than once on the same values.

Sibling branches of a search share the values computed before they branch, so no node may overwrite its input.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gross_ray.supernet.series import SeriesConv2d


@dataclass(frozen=True)
class Traced:
    """A network's graph, and the tensors that its code creates, by the names that `get_attr` nodes use."""

    graph: fx.Graph
    constants: dict[str, Tensor]


def trace(supernet: nn.Module) -> Traced:
    """Return the graph of `supernet` in its present mode, with each decomposed layer as a single node.

    Nodes that overwrite an input are rewritten, except in-place modules: run the graph within `modules_out_of_place`.
    Raises whatever the network's own code raises on symbolic values, and ValueError for a function that can only
    overwrite its input, or a forward with variable arguments.
    """
    before = set(vars(supernet))
    try:
        graph = _Tracer().trace(supernet)
    finally:  # the tracer leaves constants on the network
        constants = {name: vars(supernet).pop(name) for name in set(vars(supernet)) - before}
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("*"):
            raise ValueError(f"forward takes {node.target}")
        if node.op == "call_module" and not node.args and set(node.kwargs) == {"input"}:  # layer(input=x)
            node.args, node.kwargs = (node.kwargs["input"],), {}
    return Traced(_out_of_place(graph, dict(supernet.named_modules(remove_duplicate=False))), constants)


@contextmanager
def modules_out_of_place(model: nn.Module) -> Iterator[None]:
    """Switch off `inplace` of all modules within the block."""
    switched = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    for module in switched:
        module.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.inplace = True  # type: ignore[assignment]


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
    """Make every node keep its input, and later readers of an overwritten value read the new one instead.

    Raises ValueError for a function that can only overwrite its input.
    """
    later: set[fx.Node] = set(graph.nodes)
    for node in graph.nodes:
        later.discard(node)
        if _rewrite(node, modules):
            overwritten = node.args[0] if node.args else node.kwargs["input"]
            for user in [user for user in overwritten.users if user in later]:
                user.replace_input_with(overwritten, node)
    return graph


def _rewrite(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Make `node` keep its first input (modules: the caller does); return whether it used to overwrite it."""
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
        if not callable(getattr(torch.Tensor, name[:-1], None)):
            raise ValueError(f"{name} overwrites its input")
        node.target = name[:-1]
        return True
    if node.op == "call_function" and node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
        return True
    if node.op == "call_function" and overwrites and name not in ("and_", "or_", "not_", "is_"):  # of module operator
        twin = getattr(F, name[:-1], None) or getattr(torch, name[:-1], None)
        if twin is None:
            raise ValueError(f"{name} overwrites its input")
        node.target = twin
        return True
    return False
