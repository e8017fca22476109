"""How many images, and how many prefixes of the tree, run as one batch, so that what is alive fits a memory budget."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gross_ray.errors import InvalidValueError
from gross_ray.search.prefix_walk import Prefix, PrefixWalk

PROBE_IMAGES = 2
CACHES_ON_CPU = 1.0
"""Default budget on a CPU: this many times its largest cache."""
SHARE_OF_FREE = 0.5
"""Default budget on a GPU: this share of its free memory."""
USUAL_CACHE = 32 * 2**20
"""Bytes of the cache where the system does not tell."""


@dataclass(frozen=True)
class BatchPlan:
    """What runs together."""

    num_images: int
    """Images of a batch."""
    limits: tuple[int, ...]
    """The most prefixes that go on together behind each decomposed layer."""


@dataclass(frozen=True)
class SegmentMemory:
    """Bytes for each row (an image in one prefix) between a decomposed layer and the next."""

    start: int
    """Alive at the start."""
    peak: int
    """Alive at most, up to the next decomposed layer's input."""
    held: int
    """Alive while that layer runs, and held while its siblings are walked one after the other; 0 at the end."""
    layer: int
    """What that layer needs for itself at one group-size, its output included; 0 at the end."""


def default_memory_budget(device: torch.device) -> int:
    """Return the bytes that a walk may keep alive where none are given: the cache's size, or half of a GPU's rest."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE_OF_FREE * (torch.cuda.mem_get_info(device)[0] + unused))
    names = ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE")
    sizes = [os.sysconf(name) for name in names if name in os.sysconf_names]
    return int(CACHES_ON_CPU * max([size for size in sizes if size > 0], default=USUAL_CACHE))


def plan_batches(
    segments: Sequence[SegmentMemory],
    num_siblings: Sequence[int],
    num_images: int,
    memory_budget: int,
    *,
    batch_size: int | None = None,
) -> BatchPlan:
    """Return the largest batches whose tensors fit `memory_budget` bytes: first of images, then of prefixes.

    `segments` are those of `measure_segments`, `num_siblings` the group-sizes of each decomposed layer. Raises
    InvalidValueError if one image alone (or a `batch_size` that is given) does not fit.
    """

    def fits(images: int, prefixes: Sequence[int]) -> bool:
        return images * _bytes_an_image(segments, prefixes) <= memory_budget

    ones = [1] * len(segments)
    images = images_of_batch(_bytes_an_image(segments, ones), num_images, memory_budget, batch_size)
    prefixes = list(ones)
    for depth, siblings in enumerate(num_siblings, start=1):
        for together in range(siblings, 0, -1):
            wider = prefixes[:depth] + [prefixes[depth - 1] * together] * (len(segments) - depth)
            if fits(images, wider):
                prefixes = wider
                break
    return BatchPlan(images, tuple(prefixes[1:]))


def images_of_batch(bytes_an_image: int, num_images: int, memory_budget: int, batch_size: int | None) -> int:
    """Return how many images fit `memory_budget` bytes, in batches of about equal size; `batch_size` where it is given.

    Raises InvalidValueError if one image alone, or that many, do not fit.
    """
    least = batch_size or 1
    if least * bytes_an_image > memory_budget:
        raise InvalidValueError(
            f"memory_budget = {memory_budget} bytes: {least} image{'s' * (least > 1)} need {least * bytes_an_image}; "
            f"give at least that{', or a smaller batch_size' if batch_size else ''}"
        )
    if batch_size is not None:
        return batch_size
    most = min(memory_budget // max(bytes_an_image, 1), num_images)
    return -(-num_images // -(-num_images // most))


def _bytes_an_image(segments: Sequence[SegmentMemory], prefixes: Sequence[int]) -> int:
    """Return the most bytes alive for each image of a batch, where `prefixes[d]` go on together behind d layers."""
    most = held = 0
    for depth, segment in enumerate(segments):
        rows = prefixes[depth]
        most = max(most, held + rows * segment.peak)
        held += rows * segment.held
        if depth + 1 < len(segments):
            behind, start = prefixes[depth + 1], segments[depth + 1].start
            output = min(segment.layer, start)
            # Siblings' outputs exist twice for a moment: as the layer gives them, and one after the other.
            most = max(most, held + rows * (segment.layer - output) + behind * (start + output * (behind > rows)))
    return most


def measure_segments(walk: PrefixWalk, image: Tensor, paths: Sequence[Prefix]) -> list[SegmentMemory]:
    """Return what each segment needs: the most over passes of `image`, (1, ...), along some trees of one path."""
    batch = torch.cat([image] * PROBE_IMAGES)
    found = [_measure_path(walk, batch, path) for path in paths]
    return [
        SegmentMemory(*(max(figures) for figures in zip(*map(astuple, segments), strict=True)))
        for segments in zip(*found, strict=True)
    ]


def _measure_path(walk: PrefixWalk, batch: Tensor, path: Prefix) -> list[SegmentMemory]:
    alive = _AliveBytes(batch)
    starts: list[int] = []
    peaks: list[int] = []
    helds: list[int] = []
    layers: list[int] = []

    def on_depth(depth: int) -> None:
        if depth < len(starts):  # a shared layer was met again
            return
        if depth:
            layers.append(alive.peak - helds[-1])
        starts.append(alive.now)
        alive.peak = alive.now

    def on_layer(*_: object) -> None:
        peaks.append(alive.peak)
        helds.append(alive.now)
        alive.peak = alive.now

    with alive:
        walk.run(batch, path, lambda *_: None, limits=[1] * walk.num_layers, on_layer=on_layer, on_depth=on_depth)
    figures = zip(starts, [*peaks, alive.peak], [*helds, 0], [*layers, 0], strict=True)
    return [SegmentMemory(*(-(-figure // len(batch)) for figure in each)) for each in figures]


def bytes_of_pass(network: nn.Module, image: Tensor) -> int:
    """Return the most bytes alive for each image in a forward pass of `network`."""
    batch = torch.cat([image] * PROBE_IMAGES)
    alive = _AliveBytes(batch)
    with alive:
        network(batch)
    return -(-alive.peak // PROBE_IMAGES)


class _AliveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return within it, as long as they are alive."""

    def __init__(self, batch: Tensor) -> None:
        super().__init__()
        self._users: dict[int, int] = {}
        self.now = self.peak = 0
        self._watch(batch)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self:  # what an operator is made of may need more: max-pooling makes its indices
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        result = func(*args, **(kwargs or {}))
        given = {place for place in map(_storage, tree_leaves((args, kwargs))) if place not in self._users}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:  # no view of a weight
                self._watch(leaf)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._users:
            self._users[place] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[place] += 1
        weakref.finalize(tensor, self._released, place, size)

    def _released(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.now -= size


def _storage(value: object) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None
