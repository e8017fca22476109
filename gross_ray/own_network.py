"""Bring a user's network into the form that gross_ray works on, or refuse it in one line."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from gross_ray.errors import ConvertedNetworkWarning, InvalidValueError
from gross_ray.nn.copies import copied

_WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)
"""Classes that only call the network in their attribute `module`."""


def accepted(network: nn.Module, what: str, *, dtypes: Collection[torch.dtype] = (torch.float32,)) -> nn.Module:
    """Return `network` without wrappers, not compiled, and in float32 unless all its parameters are of `dtypes`.

    A network that needs no change is returned itself. The wrappers of torch.compile, DataParallel,
    DistributedDataParallel and AveragedModel are taken off; what else changes is changed in a copy, and a
    ConvertedNetworkWarning reports a change of dtype. `what` names the network in errors. Raises InvalidValueError,
    naming the module, for a wrapper within the network, a module of torch.jit, a lazy one, one on the meta device, and
    one that is quantised, and like `copied` for a network that has to be copied.
    """
    network = unwrapped(network)
    for path, module in network.named_modules():
        if problem := _problem(module):
            raise InvalidValueError(f"{what}: {f'its module {path!r}' if path else 'it'} {problem}")
    if any(module._compiled_call_impl is not None for module in network.modules()):
        network = copied(network)  # copies are not compiled
    others = {tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()}.difference(dtypes)
    if others:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        warnings.warn(
            f"{what}: has parameters of {names}; converted to float32, in which it is compressed",
            ConvertedNetworkWarning,
            stacklevel=3,
        )
        network = copied(network).float()
    return network


def unwrapped(network: nn.Module) -> nn.Module:
    """Return `network` without the wrappers of torch.compile, DataParallel and their kin; they only call it."""
    while (inner := _within(network)) is not None:
        network = inner
    return network


def _within(module: nn.Module) -> nn.Module | None:
    """Return the network within a wrapper; None if `module` is no wrapper."""
    if type(module).__name__ == "OptimizedModule":  # of torch.compile; importing its class takes a second
        return module._modules.get("_orig_mod")
    return module.module if isinstance(module, _WRAPPERS) else None


def _problem(module: nn.Module) -> str | None:
    """Return why nothing can be done with a network that contains this module, and the remedy; None if all is well."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return f"is a {kind} of torch.jit, whose layers cannot be replaced: use the nn.Module that it was made from"
    if _within(module) is not None:
        attribute = "_orig_mod" if kind == "OptimizedModule" else "module"
        return f"is wrapped in {kind}: put the module that it wraps, its attribute {attribute}, in its place"
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if any(map(is_lazy, tensors)):
        return f"is a {kind} without weights yet: run an image through it in the factory, or before you pass it"
    if any(tensor.is_meta for tensor in tensors):
        return (
            f"is a {kind} on the meta device, without weights: build it on the CPU, or call to_empty(device='cpu') and "
            "load its weights"
        )
    if _is_quantised(module):
        return f"is a {kind} with quantised weights: use the network from before it was quantised"
    return None


def _is_quantised(module: nn.Module) -> bool:
    packed = type(module).__module__.startswith("torch.ao.nn") and hasattr(module, "_packed_params")
    return packed or any(
        parameter.dtype in (torch.int8, torch.uint8) or type(parameter.data) is not Tensor
        for parameter in module.parameters(recurse=False)
    )
