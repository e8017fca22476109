"""Trace the layers that a network calls as it runs an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gross_ray.errors import InvalidValueError, first_line
from gross_ray.nn.modes import evaluating
from gross_ray.space import is_decomposed


@dataclass(frozen=True)
class Call:
    """One call of a layer in a forward pass of one image."""

    module: nn.Module
    """The layer."""
    input_size: tuple[int, ...]
    """Shape of its input, (N, C, H, W) or (N, ..., features); N is 1 unless the network folds positions into it."""
    output_size: tuple[int, ...]
    """Shape of its output."""


def network_calls(model: nn.Module, input_shape: Sequence[int]) -> list[Call]:
    """Return each call of a convolution, linear or decomposed layer as `model` runs one image of (C, H, W).

    Calls are in the order in which they return. Raises InvalidValueError if `model` cannot run such an image.
    """
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        calls.append(Call(module, tuple(input_of(args, kwargs).shape), tuple(output.shape)))

    traced = [module for module in model.modules() if _is_traced(module)]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in traced]
    try:
        output_of(model, input_shape)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _FirstLayer(Exception):
    """Raised by the first layer that an image reaches; the arguments are the channels it takes and those it gets."""


def input_channels(model: nn.Module, image_size: int) -> int | None:
    """Return the number of channels of the square images that `model` takes; None if it is not found.

    It follows from the first convolution or linear layer that an image reaches: if it takes a third of the features
    that an image of three channels brings it, images have one.
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        size, linear = input_of(args, kwargs).shape, isinstance(module, nn.Linear)
        raise _FirstLayer(module.in_features if linear else module.in_channels, size[-1 if linear else 1])

    layers = [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in layers]
    try:
        for channels in (3, 1, 4):  # a forward may check the number of channels before its first layer
            try:
                output_of(model, (channels, image_size, image_size))
            except InvalidValueError as error:
                takes, gets = error.__cause__.args if isinstance(error.__cause__, _FirstLayer) else (0, 1)
                if takes and channels * takes % gets == 0:
                    return channels * takes // gets
    finally:
        for handle in handles:
            handle.remove()
    return None


def _is_traced(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear) or is_decomposed(module)


def input_of(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """Return a layer's input from a hook's arguments: positional, or under the name that torch's own layers use."""
    return args[0] if args else kwargs["input"]


def output_of(model: nn.Module, input_shape: Sequence[int]) -> Any:
    """Return the output of `model` for one black image of (C, H, W), in evaluation mode.

    Raises InvalidValueError if `model` cannot run such an image.
    """
    images = zero_images(model, 1, input_shape)
    with network_errors_as_invalid_value(input_shape), torch.no_grad(), evaluating(model):
        return model(images)


def zero_images(model: nn.Module, number: int, input_shape: Sequence[int]) -> Tensor:
    """Return `number` black images of (C, H, W), in the dtype and on the device of `model`'s first parameter.

    Raises InvalidValueError unless `input_shape` is a shape.
    """
    like = next(model.parameters(), torch.empty(0))
    try:
        return torch.zeros(number, *input_shape, dtype=like.dtype, device=like.device)
    except (TypeError, RuntimeError):
        raise InvalidValueError(f"input_shape = {input_shape!r}: must be (C, H, W), like (3, 32, 32)") from None


@contextmanager
def network_errors_as_invalid_value(input_shape: Sequence[int]) -> Iterator[None]:
    """Re-raise any exception of a network that runs images of (C, H, W) as InvalidValueError, with its cause."""
    try:
        yield
    except Exception as error:  # whatever the user's own code raises
        raise InvalidValueError(
            f"the network cannot run an image of {'x'.join(map(str, input_shape))}: {first_line(error)}; "
            "choose images that fit it (data.image_size, data.channels), or another model"
        ) from error
