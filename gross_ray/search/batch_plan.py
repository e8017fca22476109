"""Choose how many images and how many prefixes share a batch, so that the live tensors fit a memory budget."""

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
"""Cache size in bytes if the system reports none."""


@dataclass(frozen=True)
class BatchPlan:
    """How many images and prefixes run together."""

    num_images: int
    """Images in a batch."""
    limits: tuple[int, ...]
    """For each decomposed layer, how many prefixes may continue together after it."""


@dataclass(frozen=True)
class SegmentMemory:
    """Bytes per row (one image of one prefix) from one decomposed layer to the next."""

    start: int
    """Live bytes at the start."""
    peak: int
    """The most live bytes up to the next decomposed layer's input."""
    held: int
    """Live bytes while the next layer runs; they stay until all its group-sizes are walked. 0 after the last layer."""
    layer: int
    """Bytes that the next layer needs at one group-size, its output included; 0 after the last layer."""


def default_memory_budget(device: torch.device) -> int:
    """Return the default memory budget in bytes: the largest CPU cache, or half of the GPU's free memory."""
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

    `segments` come from `measure_segments`; `num_siblings` counts the group-sizes of each decomposed layer. Raises
    InvalidValueError if one image (or `batch_size` images) does not fit.
    """
    prefixes = [1] * len(segments)
    images = images_of_batch(_bytes_per_image(segments, prefixes), num_images, memory_budget, batch_size)
    for depth, siblings in enumerate(num_siblings, start=1):
        for together in range(siblings, 0, -1):
            wider = prefixes[:depth] + [prefixes[depth - 1] * together] * (len(segments) - depth)
            if images * _bytes_per_image(segments, wider) <= memory_budget:
                prefixes = wider
                break
    return BatchPlan(images, tuple(prefixes[1:]))


def images_of_batch(bytes_per_image: int, num_images: int, memory_budget: int, batch_size: int | None) -> int:
    """Return `batch_size`, or if it is None, how many images fit `memory_budget` bytes in batches of about equal size.

    Raises InvalidValueError if `batch_size` images, or a single image, do not fit.
    """
    least = batch_size or 1
    if least * bytes_per_image > memory_budget:
        raise InvalidValueError(
            f"memory_budget = {memory_budget} bytes: {least} image{'s' * (least > 1)} need {least * bytes_per_image}; "
            f"give at least that{', or a smaller batch_size' if batch_size else ''}"
        )
    if batch_size is not None:
        return batch_size
    most = min(memory_budget // max(bytes_per_image, 1), num_images)
    return -(-num_images // -(-num_images // most))


def bytes_of_image(segments: Sequence[SegmentMemory]) -> int:
    """Return the peak of live bytes if one image continues with one prefix after each layer."""
    return _bytes_per_image(segments, [1] * len(segments))


def _bytes_per_image(segments: Sequence[SegmentMemory], prefixes: Sequence[int]) -> int:
    """Return the peak of live bytes per image, with `prefixes[d]` prefixes continuing together after d layers."""
    most = held = 0
    for depth, segment in enumerate(segments):
        rows = prefixes[depth]
        most = max(most, held + rows * segment.peak)
        held += rows * segment.held
        if depth + 1 < len(segments):
            after, start = prefixes[depth + 1], segments[depth + 1].start
            output = min(segment.layer, start)
            # Siblings' outputs briefly exist twice: stacked as the layer returns them, and concatenated.
            most = max(most, held + rows * (segment.layer - output) + after * (start + output * (after > rows)))
    return most


def measure_segments(walk: PrefixWalk, image: Tensor, paths: Sequence[Prefix]) -> list[SegmentMemory]:
    """Return the memory of each segment: the maximum over passes of `image`, (1, ...), along each path."""
    batch = torch.cat([image] * PROBE_IMAGES)
    measured = [_measure_path(walk, batch, path) for path in paths]
    return [
        SegmentMemory(*(max(figures) for figures in zip(*map(astuple, segments), strict=True)))
        for segments in zip(*measured, strict=True)
    ]


def _measure_path(walk: PrefixWalk, batch: Tensor, path: Prefix) -> list[SegmentMemory]:
    alive = _AliveBytes(batch)
    starts: list[int] = []
    peaks: list[int] = []
    helds: list[int] = []
    layers: list[int] = []

    def on_depth(depth: int) -> None:
        if depth < len(starts):  # a shared layer is called again
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
    """Return the peak of live bytes per image in a forward pass of `network`."""
    batch = torch.cat([image] * PROBE_IMAGES)
    alive = _AliveBytes(batch)
    with alive:
        network(batch)
    return -(-alive.peak // PROBE_IMAGES)


class _AliveBytes(TorchDispatchMode):
    """While active, count the live bytes of `batch` and of the tensors that operators return."""

    def __init__(self, batch: Tensor) -> None:
        super().__init__()
        self._users: dict[int, int] = {}
        self.now = self.peak = 0
        self._watch(batch)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self:  # an operator's parts may need more memory than its result: max-pooling computes indices
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        result = func(*args, **(kwargs or {}))
        inputs = {address for address in map(_address, tree_leaves((args, kwargs))) if address not in self._users}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in inputs:  # a view of a weight takes no memory
                self._watch(leaf)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._users:
            self._users[address] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[address] += 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            self.now -= size


def _address(value: object) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None
