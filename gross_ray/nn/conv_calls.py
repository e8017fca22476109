"""Record the calls of F.conv2d in a forward pass, and find those that no convolution module makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from gross_ray.space import is_decomposed

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


class Conv2dCalls(TorchFunctionMode):
    """Within the block, passes the arguments of each call of F.conv2d, by name and with defaults, to a function."""

    def __init__(self, on_call: Callable[[dict[str, Any]], object]) -> None:
        super().__init__()
        self._on_call = on_call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.conv2d:  # F.conv2d is the same function
            self._on_call(_DEFAULTS | dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Bypasses:
    """The convolutions of a forward pass that are not calls of a convolution module."""

    functional: Counter[str] = field(default_factory=Counter)
    """Number of calls of F.conv2d that other modules make, by the module's name (of the network itself: empty)."""
    weights: set[int] = field(default_factory=set)
    """The ids of parameters of convolution modules that other modules pass to F.conv2d."""


@contextmanager
def bypasses(model: nn.Module) -> Iterator[Bypasses]:
    """Within the block, collect the convolutions that `model` computes other than by calling a convolution module."""
    found, callers = Bypasses(), [model]
    names = {id(module): name for name, module in model.named_modules()}
    own = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and "weight" in module._parameters
    }

    def enter(module: nn.Module, _: Any) -> None:
        callers.append(module)

    def leave(*_: Any) -> None:
        callers.pop()

    def on_call(arguments: dict[str, Any]) -> None:
        if isinstance(callers[-1], _ConvNd) or is_decomposed(callers[-1]):
            return
        if id(arguments["weight"]) in own:
            found.weights.add(id(arguments["weight"]))
        else:
            found.functional[names[id(callers[-1])]] += 1

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(Conv2dCalls(on_call))
        yield found
