"""Count a network's multiply-accumulates (MACs) operation by operation, with torch's FlopCounterMode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gross_ray.nn.calls import Call, network_calls


@dataclass(frozen=True)
class OperationCount:
    """The operations of one forward pass of one image."""

    macs: int
    """MACs of all convolutions and matrix products, including functional calls and attention."""
    calls: list[Call]
    """Calls of convolution, linear and decomposed layers, as `network_calls` returns them."""
    uncounted: dict[str, str]
    """Name and class name of each called module that has a weight matrix but no counted operation."""


def count_operations(model: nn.Module, input_shape: Sequence[int]) -> OperationCount:
    """Run `model` on one black image of `input_shape` (C, H, W) in evaluation mode, and count its operations.

    Modes, hooks and torch's random generators stay unchanged. Raises InvalidValueError if `model` cannot run such an
    image.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports triton

    counter = FlopCounterMode(display=False, custom_mapping=_vector_products())
    names = {id(module): name for name, module in model.named_modules()}
    counts = {id(module): _WeightedModule(module) for module in model.modules() if _has_weight_matrix(module)}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts[id(module)].flops_before = counter.get_total_flops()

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        count = counts[id(module)]
        count.called |= bool(args or kwargs)  # torch's parametrizations, which derive weights, take no arguments
        count.counted |= counter.get_total_flops() > count.flops_before

    handles = [
        handle
        for count in counts.values()
        for handle in (
            count.module.register_forward_pre_hook(enter, with_kwargs=True),
            count.module.register_forward_hook(leave, with_kwargs=True),
        )
    ]
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices), _decomposed_attention(), counter:
            calls = network_calls(model, input_shape)
    finally:
        for handle in handles:
            handle.remove()
    missed = [count.module for count in counts.values() if count.called and not count.counted]
    uncounted = {names[id(module)]: type(module).__name__ for module in missed}
    return OperationCount(counter.get_total_flops() // 2, calls, uncounted)


@dataclass
class _WeightedModule:
    """A module with a weight matrix, whether it was called, and whether its calls counted operations."""

    module: nn.Module
    called: bool = False
    counted: bool = False
    flops_before: int = 0


def _has_weight_matrix(module: nn.Module) -> bool:
    """Return whether a module itself has a parameter of two dimensions or more that is no elementwise scale."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return False
    return any(sum(size > 1 for size in parameter.shape) > 1 for parameter in module.parameters(recurse=False))


@contextmanager
def _decomposed_attention() -> Iterator[None]:
    """Run attention as matrix products: FlopCounterMode does not know all of torch's fused kernels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _vector_products() -> dict[Any, Any]:
    """Return FLOP formulas, from the operands' shapes, for products that FlopCounterMode does not know."""
    aten = torch.ops.aten
    return {
        aten.mv: lambda matrix, vector, **_: 2 * prod(matrix),
        aten.addmv: lambda added, matrix, vector, **_: 2 * prod(matrix),
        aten.dot: lambda left, right, **_: 2 * prod(left),
        aten.vdot: lambda left, right, **_: 2 * prod(left),
        aten.addbmm: lambda added, left, right, **_: 2 * prod(left) * right[2],
        aten.addr: lambda added, left, right, **_: 2 * prod(left) * prod(right),
    }
