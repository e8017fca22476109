"""Replace modules of any network, wherever it keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gross_ray.nn.copies import copied

_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes that torch gives every module, among them its children."""


def replace_modules(
    model: nn.Module, replacements: Mapping[str, nn.Module], *, share_weights: bool = False
) -> nn.Module:
    """Return a copy of `model` with the named modules replaced under all their names, so that sharing is kept.

    Modules in plain lists, tuples and dicts are replaced too. With `share_weights` the copy uses the parameters and
    buffers of `model` itself. Raises InvalidValueError like `copied`.
    """
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())} if share_weights else {}
    network = copied(model, kept)
    new = {id(network.get_submodule(name)): module for name, module in replacements.items()}
    if id(network) in new:
        return new[id(network)]
    for parent in list(network.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                replacement = new[id(child)]
                replacement.train(child.training)
                setattr(parent, attribute, replacement)
        for attribute, value in list(vars(parent).items()):
            if attribute not in _TORCH_ATTRIBUTES and isinstance(value, list | tuple | dict):
                vars(parent)[attribute] = _replaced(value, new)
    return network


def _replaced(value: Any, new: Mapping[int, nn.Module]) -> Any:
    """Return the replacement of a module, if any; replace within lists and dicts in place, and rebuild tuples."""
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if type(value) in (list, dict):
        for key, item in list(value.items() if type(value) is dict else enumerate(value)):
            value[key] = _replaced(item, new)
    elif type(value) is tuple:
        items = tuple(_replaced(item, new) for item in value)
        return items if any(item is not old for item, old in zip(items, value, strict=True)) else value
    return value
