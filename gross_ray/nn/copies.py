"""Copy a network that holds objects which cannot be copied: locks, open files, generators."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from gross_ray.errors import InvalidValueError, one_line

_CONTAINERS = dict | list | tuple | set | frozenset | deque | MethodType | partial


def copied(network: nn.Module, kept: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of `network`, with modules, parameters and buffers of its own.

    The copy shares the objects in `kept`, by id, and everything that cannot be copied, like a lock, wherever the
    network keeps it. A tensor that autograd computed (`self.last = output`) is copied without its graph. Raises
    InvalidValueError for a module that refuses to be copied.
    """
    memo = dict(kept or {})
    try:
        return copy.deepcopy(network, dict(memo))
    except Exception:  # whatever the network's own objects raise
        _Uncopyable(network, memo).add_to(memo)
    try:
        return copy.deepcopy(network, memo)
    except Exception as error:
        raise InvalidValueError(
            f"this network cannot be copied: {one_line(error)}; let its modules be copied by copy.deepcopy, which "
            "decomposing and training need"
        ) from error


class _Uncopyable:
    """Finds what a network holds that cannot be copied, for the memo of `copy.deepcopy`."""

    def __init__(self, network: nn.Module, kept: Mapping[int, Any]) -> None:
        """`kept` are objects that are not copied anyway."""
        self._modules = list(network.modules())
        tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_leaf]
        self._known = {id(one): one for one in (*self._modules, *tensors)} | dict(kept)
        self._instead: dict[int, Any] = {}
        self._seen: set[int] = set()

    def add_to(self, memo: dict[int, Any]) -> None:
        """Add what the copy uses instead of a copy of each object, by the object's id."""
        for module in self._modules:
            for value in vars(module).values():
                self._search(value)
        memo.update(self._instead)

    def _search(self, value: object) -> None:
        """Search `value` for the smallest parts that cannot be copied; any but a container or module is one whole."""
        if value is None or isinstance(value, str | int | float) or id(value) in self._seen | self._known.keys():
            return
        if self._can_be_copied(value):
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                self._instead[id(value)] = value.detach().clone()
            return
        if isinstance(value, nn.Module | _CONTAINERS) or _has_networks(value, set()):
            for part in _parts(value):
                self._search(part)
        if not isinstance(value, nn.Module) and not self._can_be_copied(value):
            self._instead[id(value)] = value

    def _can_be_copied(self, value: object) -> bool:
        try:
            copy.deepcopy(value, self._known | self._instead)
        except Exception:  # whatever the network's own objects raise
            return False
        return True


def _parts(value: object) -> Iterator[object]:
    """Yield what a container contains, and the attributes of any other object."""
    if isinstance(value, dict):
        yield from (*value.keys(), *value.values())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    if not isinstance(value, ModuleType):
        yield from getattr(value, "__dict__", {}).values()


def _has_networks(value: object, seen: set[int]) -> bool:
    """Return whether an object holds a module or a tensor, at any depth."""
    if isinstance(value, nn.Module | Tensor):
        return True
    if id(value) in seen or isinstance(value, type):
        return False
    seen.add(id(value))
    return any(_has_networks(part, seen) for part in _parts(value))
