"""Compare the times of modules on a machine that others use too.

A machine changes its speed for seconds at a time, by more than configurations differ. So every module is timed once in
each round (the fastest of three calls after an untimed one), and each round's own speed is divided out. A single CPU
thread is timed by its CPU time, which is what a call takes on a free core: on a shared core, wall time was three times
as long and no longer distinguished configurations. Several threads, and GPUs, are timed by wall time.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gross_ray.errors import InvalidValueError

Work = tuple[nn.Module, Sequence[Tensor]]
"""A module, and the inputs of its calls."""
_WARM_UP_ROUNDS = 2
_CALLS_PER_SAMPLE = 3
_POLISHES = 3
_TICK_MS = 1e-6  # the clock's resolution: a layer that is never called takes less


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use this number of CPU threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed_device(device: torch.device | str) -> torch.device:
    """Return `device`; raises InvalidValueError if it is not cpu or cuda, or this machine does not have it."""
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InvalidValueError(f"device = {str(device)!r}: latency is measured on cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidValueError(f"device = {str(device)!r}: this machine has none that torch can use; use cpu")
    return torch.device(device)


def typical_ms(
    works: Mapping[Any, Work], repeats: int, device: torch.device, on_part: Callable[[int, int], object] | None = None
) -> dict[Any, float]:
    """Return each module's median time over the rounds, with each round's speed divided out (Tukey's median polish)."""
    samples = np.empty((_WARM_UP_ROUNDS + repeats, len(works)))
    for row in range(len(samples)):
        for column, (module, inputs) in enumerate(works.values()):
            samples[row, column] = _sample_ms(module, inputs, device)
            if on_part is not None:
                on_part(row * len(works) + column + 1, samples.size)
    logs = np.log(np.maximum(samples[_WARM_UP_ROUNDS:], _TICK_MS))
    slowness = np.zeros((repeats, 1))
    for _ in range(_POLISHES):
        slowness = np.median(logs - np.median(logs - slowness, axis=0), axis=1, keepdims=True)
        slowness -= np.median(slowness)
    return dict(zip(works, np.exp(np.median(logs - slowness, axis=0)).tolist(), strict=True))


def _sample_ms(module: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> float:
    """Return the fastest time of `module` on all `inputs`, in ms, after an untimed warm-up that fills the caches."""
    clock = _cuda_ms if device.type == "cuda" else _cpu_ms
    return min([clock(module, inputs, device) for _ in range(1 + _CALLS_PER_SAMPLE)][1:])


def _cpu_ms(module: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for images in inputs:
        module(images)
    return (clock() - start) * 1e3


def _cuda_ms(module: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    stream.synchronize()
    start.record(stream)
    for images in inputs:
        module(images)
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)


def device_name(device: torch.device) -> str:
    """Return the name of the processor or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
