"""Compare the times of calls on a machine that others use too.

A machine changes its speed for seconds at a time, by more than configurations differ. So every call is timed once in
each round (the fastest of three calls after an untimed one), and each round's own speed is divided out. A single CPU
thread is timed by its process's CPU time, which is what a call takes on a free core: on a shared core, wall time was
three times as long and no longer distinguished configurations. Several threads, and GPUs, are timed by wall time.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gross_ray.errors import InvalidValueError

Work = Callable[[], object]
"""A call that is timed."""
Clock = Callable[[Work], float]
"""Makes a call and returns its time in ms."""
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
    works: Mapping[Any, Work],
    repeats: int,
    clock: Clock,
) -> dict[Any, float]:
    """Return each call's median time over the rounds, in ms, with each round's own speed divided out."""
    times = np.exp(np.median(undisturbed_logs(works, repeats, clock), axis=0))
    return dict(zip(works, times.tolist(), strict=True))


def undisturbed_logs(
    works: Mapping[Any, Work],
    repeats: int,
    clock: Clock,
) -> np.ndarray:
    """Return the logarithm of each call's time in each round, in ms: (repeats, len(works)).

    Each round's own speed is divided out (Tukey's median polish).
    """
    samples = np.empty((_WARM_UP_ROUNDS + repeats, len(works)))
    for row in range(len(samples)):
        for column, work in enumerate(works.values()):
            samples[row, column] = _sample_ms(work, clock)
    logs = np.log(np.maximum(samples[_WARM_UP_ROUNDS:], _TICK_MS))
    slowness = np.zeros((repeats, 1))
    for _ in range(_POLISHES):
        slowness = np.median(logs - np.median(logs - slowness, axis=0), axis=1, keepdims=True)
        slowness -= np.median(slowness)
    return logs - slowness


def _sample_ms(work: Work, clock: Clock) -> float:
    """Return the fastest time of a call, in ms, after an untimed one that fills the caches."""
    return min([clock(work) for _ in range(1 + _CALLS_PER_SAMPLE)][1:])


def cpu_clock(num_threads: int) -> Clock:
    """Return the clock for a number of CPU threads: this process's CPU time for one, wall time for several."""
    now = time.process_time if num_threads == 1 else time.perf_counter

    def milliseconds(work: Work) -> float:
        start = now()
        work()
        return (now() - start) * 1e3

    return milliseconds


def cuda_clock(device: torch.device) -> Clock:
    """Return the clock for work that torch queues on a GPU."""
    stream = torch.cuda.current_stream(device)

    def milliseconds(work: Work) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream.synchronize()
        start.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end)

    return milliseconds


def device_name(device: torch.device) -> str:
    """Return the name of the processor or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
