"""Replacing modules of any network, wherever it keeps them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

_TORCHS = frozenset(vars(nn.Module()))
"""Attributes of every module, its children among them."""


def replace_modules(
    model: nn.Module, replacements: Mapping[str, nn.Module], *, share_weights: bool = False
) -> nn.Module:
    """Return a deep copy of `model` with the named modules replaced wherever they are used, so that sharing is kept.

    So they are in lists, tuples and dicts that modules have as plain attributes. With `share_weights` the copy has the
    parameters and buffers of `model` itself.
    """
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())} if share_weights else {}
    copied = copy.deepcopy(model, kept)
    new = {id(copied.get_submodule(name)): module for name, module in replacements.items()}
    if id(copied) in new:
        return new[id(copied)]
    for parent in list(copied.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                replacement = new[id(child)]
                replacement.train(child.training)
                setattr(parent, attribute, replacement)
        for attribute, value in list(vars(parent).items()):
            if attribute not in _TORCHS and isinstance(value, list | tuple | dict):
                vars(parent)[attribute] = _replaced(value, new)
    return copied


def _replaced(value: Any, new: Mapping[int, nn.Module]) -> Any:
    """Return a module's replacement, if it has one; lists and dicts get those of their members, tuples become new."""
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if type(value) in (list, dict):
        for key, one in list(value.items() if type(value) is dict else enumerate(value)):
            if (other := _replaced(one, new)) is not one:
                value[key] = other
    elif type(value) is tuple:
        others = tuple(_replaced(one, new) for one in value)
        return others if any(one is not other for one, other in zip(value, others, strict=True)) else value
    return value
