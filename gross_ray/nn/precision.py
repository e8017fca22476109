"""The precision in which networks are trained and evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

from gross_ray.errors import InvalidValueError

if TYPE_CHECKING:  # the functions import torch: checking options against PRECISIONS must not
    import torch

PRECISIONS = ("float32", "tf32", "bfloat16")
"""float32 (the network's own dtype), tf32 (CUDA's faster products), bfloat16 (autocast)."""


@contextmanager
def at_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in `precision` within the block; raises InvalidValueError if `device` lacks it."""
    with products_at(precision, device), forward_at(precision, device):
        yield


@contextmanager
def products_at(precision: str, device: torch.device) -> Iterator[None]:
    """Set the precision of float32 products, forward and backward; raises InvalidValueError like `at_precision`."""
    if precision == "tf32" and device.type != "cuda":
        raise InvalidValueError(f"precision = 'tf32' on {device.type}: only CUDA has it; use float32 or bfloat16")
    import torch

    with ExitStack() as stack:
        if device.type == "cuda":
            wanted = "tf32" if precision == "tf32" else "ieee"  # torch's default for convolutions is tf32
            for settings in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):  # type: ignore[attr-defined]
                stack.callback(setattr, settings, "fp32_precision", settings.fp32_precision)
                settings.fp32_precision = wanted
        yield


def forward_at(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return autocast for a forward pass in bfloat16; the backward pass, outside of it, uses the same dtypes."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()
