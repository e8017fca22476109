"""Decide whether a network can be traced, by distinguishing errors of its graph from errors of the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class NotTraceableWarning(UserWarning):
    """A network cannot be traced, so configurations are evaluated one by one."""


class RowsApartWarning(NotTraceableWarning):
    """A network mixes the rows of a batch, so configurations cannot share a batch after a decomposed layer."""


class NotTraceableError(Exception):
    """A network cannot be traced, or its graph computes something else than the network."""


_MACHINE = re.compile(
    r"CUDA|cuDNN|CUDNN|cuBLAS|CUBLAS|cuSOLVER|cuFFT|NVRTC|NCCL|HIP error|MPS backend|Triton|out of memory|"
    r"not enough memory|can't allocate memory|cannot allocate memory|bad_alloc|CPUAllocator|"
    r"device-side assert|could not create a primitive|could not execute a primitive",
    re.IGNORECASE,
)
"""Parts of torch's messages when memory, a device or one of its libraries fails, mostly in plain RuntimeErrors."""


def is_of_the_machine(error: BaseException) -> bool:
    """Return whether an error comes from memory or a device, not from the network's code."""
    types = (MemoryError, OSError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    return isinstance(error, types) or (isinstance(error, RuntimeError) and bool(_MACHINE.search(str(error))))


@contextmanager
def graph_faults() -> Iterator[None]:
    """Within the block, turn errors of the traced graph into NotTraceableError.

    Errors of the machine (`is_of_the_machine`) stay unchanged: evaluating one configuration at a time would hide them.
    """
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:
        if is_of_the_machine(error):
            raise
        raise NotTraceableError(f"its graph fails: {type(error).__name__}: {error}") from None
