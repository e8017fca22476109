"""Options of a supernet's decompositions: how each is computed, and for which layers and group-sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gross_ray.btd.options import BTDOptions
from gross_ray.errors import InvalidValueError
from gross_ray.fields import require, require_group_sizes, settle


@dataclass(frozen=True, kw_only=True)
class DecompositionOptions(BTDOptions):
    """The block term decomposition of each layer at each group-size (section 3)."""

    layers: tuple[str, ...] = ()
    """Names or globs of layers to decompose; empty: every dense convolution with a kernel above 1x1 but the first."""
    group_sizes: tuple[int, ...] = ()
    """Group-sizes to try, if they divide a layer's input channels; empty: the powers of two that do."""
    layer_group_sizes: tuple[str, ...] = ()
    """Other group-sizes for single layers, like "layer4.*=16,32" (a name or glob); the first match counts."""
    keep_dense: bool = False
    """Make the original layer a choice too: d in a configuration, like 1-d-16, and 0 in the tables."""
    nested: bool = False
    """Start each group-size from the expansion of the next smaller one (one after the other), not on its own."""

    def __post_init__(self) -> None:
        settle(self, "decomposition.")
        super().__post_init__()
        unique = all(self.layers) and len(set(self.layers)) == len(self.layers)
        require(unique, "decomposition.layers", self.layers, "must be names of layers, each named once")
        require_group_sizes("decomposition.group_sizes", self.group_sizes)
        try:
            parse_layer_group_sizes(self.layer_group_sizes)
        except InvalidValueError as error:
            raise InvalidValueError(f"decomposition.layer_group_sizes: {error}") from None


def parse_layer_group_sizes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Parse texts like ``layer4.*=16,32``, a layer's name or glob and its sizes; else raises InvalidValueError."""
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, listed = text.rpartition("=")
        sizes = [part.strip() for part in listed.split(",")]
        valid = all(part.isascii() and part.isdigit() and int(part) for part in sizes)
        if not name.strip() or not valid or len(set(sizes)) < len(sizes) or name.strip() in found:
            rule = "write GLOB=SIZES, like layer4.*=16,32, each glob once and whole numbers above 0"
            raise InvalidValueError(f"group-sizes {text!r}: {rule}")
        found[name.strip()] = tuple(map(int, sizes))
    return found
