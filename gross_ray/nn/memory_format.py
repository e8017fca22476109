"""The memory format in which a network runs: channels last, which is faster, unless the network needs contiguous."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gross_ray.nn.calls import zero_images
from gross_ray.nn.modes import evaluating


def memory_format_of(network: nn.Module, input_shape: Sequence[int], *, trained: bool = False) -> torch.memory_format:
    """Return torch.channels_last, or torch.contiguous_format for a network that runs images (C, H, W) only in that.

    Such a network flattens a convolution's output by `view`, for example. Two black images decide, in evaluation mode;
    with `trained`, also in training mode and backwards. A network that runs in neither format gets channels_last.
    Parameters, buffers, modes and random numbers stay unchanged.
    """
    for runs in (_trains, _evaluates) if trained else (_evaluates,):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            if _succeeds(runs, network, input_shape, memory_format):
                return memory_format
    return torch.channels_last


def _succeeds(
    runs: Callable[[nn.Module, Tensor], object],
    network: nn.Module,
    input_shape: Sequence[int],
    memory_format: torch.memory_format,
) -> bool:
    images = zero_images(network, 2, input_shape)
    devices = [images.device] if images.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices), evaluating(network), _laid_out(network, memory_format):
            runs(network, images.contiguous(memory_format=memory_format))
    except Exception:  # whatever the user's own code raises: the answer is no
        return False
    return True


def _evaluates(network: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        network(images)


def _trains(network: nn.Module, images: Tensor) -> None:
    _evaluates(network, images)
    network.train()
    with torch.enable_grad():
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        torch.autograd.grad(network(images).sum(), parameters, allow_unused=True)


@contextmanager
def _laid_out(network: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    """Within the block, use copies of all parameters and buffers, in `memory_format` as `network.to` would set it."""
    tensors = [*network.parameters(), *network.buffers()]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor, values in zip(tensors, before, strict=True):
            kept = memory_format if values.dim() in (4, 5) else torch.preserve_format
            tensor.data = values.clone(memory_format=kept)
        yield
    finally:
        for tensor, values in zip(tensors, before, strict=True):
            tensor.data = values
