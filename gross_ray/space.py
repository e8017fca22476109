"""Configurations of group-sizes, and the search space of all configurations."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from gross_ray.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import nn


DENSE = 0
"""The choice of a layer's original convolution instead of a group-size; written ``d``, as in ``2-d-64``."""


def ordered(choices: Iterable[int]) -> tuple[int, ...]:
    """Return the choices of a layer without repeats: group-sizes ascending, then DENSE."""
    return tuple(sorted(set(choices), key=_place))


def _place(choice: int) -> tuple[bool, int]:
    return choice == DENSE, choice


def listed(choices: Iterable[int], separator: str = ", ") -> str:
    """Return choices as text, with ``d`` for DENSE."""
    return separator.join("d" if choice == DENSE else str(choice) for choice in choices)


class Configuration(tuple[int, ...]):
    """One group-size, or DENSE, for each decomposed layer, in layer order: printed as ``2-32-64`` or ``2-d-64``."""

    __slots__ = ()

    def __new__(cls, group_sizes: Sequence[int]) -> Configuration:
        """Make a configuration; raises InvalidValueError unless all are whole numbers, 0 or more, and there is one."""
        rule = "needs one positive whole group-size for each decomposed layer, like (2, 32, 64), or 0: the layer stays"
        try:
            sizes = tuple(operator.index(size) for size in group_sizes)
        except TypeError:
            raise InvalidValueError(f"configuration {group_sizes!r}: {rule}") from None
        if not sizes or min(sizes) < 0:
            raise InvalidValueError(f"configuration {sizes}: {rule}")
        return super().__new__(cls, sizes)

    def __str__(self) -> str:
        return listed(self, "-")

    def __lt__(self, other: tuple[int, ...]) -> bool:
        """Compare layer by layer, in the order of a layer's choices (`ordered`): 16-1 < d-1."""
        return [_place(size) for size in self] < [_place(size) for size in other]

    def __gt__(self, other: tuple[int, ...]) -> bool:
        return [_place(size) for size in self] > [_place(size) for size in other]

    def __le__(self, other: tuple[int, ...]) -> bool:
        return not self > other

    def __ge__(self, other: tuple[int, ...]) -> bool:
        return not self < other

    def __repr__(self) -> str:
        return f"Configuration({tuple(self)!r})"

    @classmethod
    def parse(cls, text: str) -> Configuration:
        """Parse text like ``"2-32-64"`` or ``"2-d-64"``; raises InvalidValueError for any other text."""
        if not re.fullmatch("([1-9][0-9]*|d)(-([1-9][0-9]*|d))*", text.strip()):
            raise InvalidValueError(
                f"configuration {text!r}: write the group-sizes in layer order with a dash between, like 2-32-64, and "
                "d for a layer that stays as it is"
            )
        return cls([DENSE if part == "d" else int(part) for part in text.strip().split("-")])


class DecomposedLayer(Protocol):
    """Interface of a layer with several group-sizes; this library's is `SeriesConv2d`."""

    group_sizes: tuple[int, ...]
    """All choices: the group-sizes, ascending, and DENSE last if the original convolution is one."""
    group_size: int
    """The active choice."""

    def bottleneck(self, group_size: int) -> Any:
        """Return the bottleneck at one of the group-sizes."""
        ...


def is_decomposed(module: object) -> TypeGuard[DecomposedLayer]:
    """Return whether a network's module is a `DecomposedLayer`."""
    # The class comes first: every training step asks every module, and a missing attribute of an nn.Module is slow.
    has_method = callable(getattr(type(module), "bottleneck", None))
    return has_method and hasattr(module, "group_sizes") and hasattr(module, "group_size")


class SearchSpace(Sequence[Configuration]):
    """Every combination of the layers' choices (group-sizes, DENSE), lexicographic: the last layer changes fastest.

    The space is never listed in memory: members are computed from their index and vice versa, so that a space of
    10^7 members costs nothing.
    """

    def __init__(self, group_sizes: Mapping[str, Sequence[int]]) -> None:
        """Take the choices of each layer, in layer order; they are put in the order of `ordered`."""
        self.group_sizes: dict[str, tuple[int, ...]] = {}
        for layer, sizes in group_sizes.items():
            try:
                self.group_sizes[layer] = ordered(operator.index(size) for size in sizes)
            except TypeError:
                self.group_sizes[layer] = ()
        if not group_sizes or not all(sizes and min(sizes) >= 0 for sizes in self.group_sizes.values()):
            raise InvalidValueError(
                f"search space {dict(group_sizes)}: needs a layer, and positive whole group-sizes, or 0, for each layer"
            )

    def __repr__(self) -> str:
        return f"SearchSpace({self.group_sizes!r})"

    @classmethod
    def of(cls, supernet: nn.Module) -> SearchSpace:
        """Return the space of a supernet of `decompose_model`; raises InvalidValueError for any other network."""
        found = {name: module.group_sizes for name, module in supernet.named_modules() if is_decomposed(module)}
        if not found:
            raise InvalidValueError("this network has no decomposed layer; make one with decompose_model")
        return cls(found)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the decomposed layers, in layer order."""
        return tuple(self.group_sizes)

    @property
    def size(self) -> int:
        """Number of configurations; `len` is equal, but fails from 2^63 on."""
        return prod(len(sizes) for sizes in self.group_sizes.values())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """Return the configuration at `index`, or the list of a slice's configurations."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"configuration {index} of a space of {self.size}")
        rest = index % self.size
        chosen = []
        for sizes in reversed(self.group_sizes.values()):
            rest, digit = divmod(rest, len(sizes))
            chosen.append(sizes[digit])
        return Configuration(chosen[::-1])

    def __iter__(self) -> Iterator[Configuration]:
        return (self[index] for index in range(self.size))

    def __contains__(self, configuration: object) -> bool:
        if not isinstance(configuration, tuple) or len(configuration) != len(self.group_sizes):
            return False
        return all(size in sizes for size, sizes in zip(configuration, self.group_sizes.values(), strict=True))

    def index(self, configuration: Sequence[int]) -> int:  # type: ignore[override]
        """Return the index of `configuration`; raises InvalidValueError like `check`."""
        self.check(configuration)
        index = 0
        for size, sizes in zip(configuration, self.group_sizes.values(), strict=True):
            index = index * len(sizes) + sizes.index(size)
        return index

    def check(self, configuration: Sequence[int]) -> Configuration:
        """Return a member as a Configuration; if it is none, raises InvalidValueError that names layer and choices."""
        configuration = Configuration(configuration)
        if len(configuration) != len(self.group_sizes):
            raise InvalidValueError(
                f"configuration {configuration} has {len(configuration)} group-sizes; "
                f"this space has {len(self.group_sizes)} layers: {', '.join(self.layers)}"
            )
        for size, (layer, sizes) in zip(configuration, self.group_sizes.items(), strict=True):
            if size not in sizes:
                raise InvalidValueError(
                    f"configuration {configuration}: group-size {listed([size])} must be one of those of {layer}: "
                    + listed(sizes)
                )
        return configuration
