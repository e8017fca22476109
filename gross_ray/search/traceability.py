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
"""Parts of torch's messages when memory, a device or one of its libraries fails in a plain RuntimeError.

torch has no class for failures of the CPU's memory, cuDNN, cuBLAS, oneDNN and MPS. A message that is not known leads to
the slow path, with a warning that contains it.
"""


def is_of_the_machine(error: BaseException) -> bool:
    """Return whether an error comes from memory or a device, not from the network's code."""
    if isinstance(error, MemoryError | OSError | torch.OutOfMemoryError | torch.AcceleratorError):
        return True
    if isinstance(error, NotImplementedError):  # of an operation that a device lacks: its message names the device
        return False
    return isinstance(error, RuntimeError) and bool(_MACHINE.search(str(error)))


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
