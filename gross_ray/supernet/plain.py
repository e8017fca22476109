"""Replace convolutions of a class of their own by plain ones, where a plain one gives the same output.

Classes that derive their weight at each call (weight standardisation), or pad the input themselves, override the
forward of nn.Conv2d. The weight and the input that reach F.conv2d are recorded; they make an nn.Conv2d, with an
nn.ZeroPad2d before it if the sides have different paddings, and it is compared with the original.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.nn.utils.parametrize import is_parametrized

from gross_ray.errors import first_line
from gross_ray.nn.calls import Call
from gross_ray.nn.conv_calls import Conv2dCalls
from gross_ray.nn.modes import evaluating
from gross_ray.nn.replace import replace_modules

_TOLERANCE = 1e-5
"""Largest difference from the original's output, relative to its largest value: float32's rounding."""
_Padding = tuple[int, int, int, int]
"""Rows and columns of zeros as F.pad takes them: left, right, top, bottom."""


@dataclass(frozen=True)
class PlainNetwork:
    """A network in which some convolutions of a class of their own are plain."""

    network: nn.Module
    """The given network, or a copy on the same weights if convolutions were replaced."""
    made_plain: dict[str, str] = field(default_factory=dict)
    """What each replaced convolution was, by its name in `network`."""
    renamed: dict[str, str] = field(default_factory=dict)
    """The names in `network` of convolutions behind a padding of their own, by the earlier ones."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why each other convolution of a class of its own was not replaced, by name."""

    def present(self, name: str) -> list[str]:
        """Return what selects in `network` the layers that a name or glob selected before."""
        behind = [new for old, new in self.renamed.items() if old == name or fnmatchcase(old, name)]
        convs = (name for name, module in self.network.named_modules() if isinstance(module, nn.Conv2d))
        return behind if behind and not any(fnmatchcase(conv, name) for conv in convs) else [*behind, name]


def overrides_forward(conv: nn.Conv2d) -> bool:
    """Return whether a convolution's class has a forward of its own."""
    kind = type(conv)
    return kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward


def has_hooks(conv: nn.Module) -> bool:
    """Return whether hooks run when a module is called."""
    return any((conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks))


def with_plain_convolutions(
    model: nn.Module, calls: Sequence[Call] | None, names: Collection[str] = ()
) -> PlainNetwork:
    """Return `model` with plain convolutions in place of those that override the forward, or are parametrized.

    `calls` are the `network_calls` of `model`; without them, only parametrized convolutions are replaced, because their
    weight is known without an input. `names` selects layers as in `choose_layers`; without names, it takes dense
    convolutions larger than 1x1 except the first. A replacement has the weight that the original uses in evaluation
    mode, and gives the same output, in training mode too, for inputs of the size in `calls`.
    """
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    reached = model.modules() if calls is None else [call.module for call in calls]
    first = next((module for module in reached if isinstance(module, nn.Conv2d)), None)
    found = PlainNetwork(model)
    replacements: dict[str, nn.Module] = {}
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d) or conv.groups != 1 or has_hooks(conv):
            continue
        if not _is_wanted(name, names, by_default=conv is not first and max(conv.kernel_size) > 1):
            continue
        shapes = sorted({call.input_size for call in calls or () if call.module is conv})
        if not overrides_forward(conv) and not is_parametrized(conv) or not shapes and calls is not None:
            continue
        try:
            if any(owners[id(parameter)] > 1 for parameter in conv.parameters()):
                raise _NotPlainError("another module has the same weight")
            replacement, was = _replacement(conv, shapes)
        except _NotPlainError as error:
            found.refused[name] = str(error)
            continue
        replacements[name] = replacement
        renamed = name if isinstance(replacement, nn.Conv2d) else f"{name}.conv".removeprefix(".")
        if renamed != name:
            found.renamed[name] = renamed
        found.made_plain[renamed] = was
    if not replacements:
        return found
    network = replace_modules(model, replacements, share_weights=True)
    return PlainNetwork(network, found.made_plain, found.renamed, found.refused)


def _is_wanted(name: str, names: Collection[str], *, by_default: bool) -> bool:
    """Return whether `names` selects a layer, by its present name or the name behind a padding."""
    either = (name, f"{name}.conv")
    if any(each in names for each in either):
        return True
    return by_default and (not names or any(fnmatchcase(each, glob) for glob in names for each in either))


class _NotPlainError(Exception):
    """No plain convolution gives the same output; the message says why."""


def _replacement(conv: nn.Conv2d, shapes: Sequence[tuple[int, ...]]) -> tuple[nn.Module, str]:
    """Return the plain convolution that replaces `conv`, and what `conv` was; `shapes` are those of its inputs."""
    kind = type(conv).__name__
    if not overrides_forward(conv):
        with evaluating(conv), torch.no_grad():
            weight, bias = conv.weight.detach().clone(), _kept(conv.bias)
        return _conv(weight, bias, conv.padding, conv, padding_mode=conv.padding_mode), f"a {kind}, its weight fixed"
    if not shapes:
        raise _NotPlainError("the weight that it uses is known only with an input: pass input_shape")
    generator = torch.Generator().manual_seed(0)
    with _unchanged(conv), torch.no_grad():
        plain = _recorded(conv, shapes[0], generator)
        for shape, number in product(shapes, (2, 3)):
            if not _agree(conv, plain, [number, *shape[1:]], generator):
                raise _NotPlainError("its output is not that of one convolution with a fixed weight and zero padding")
        conv.train()
        if not _agree(conv, plain, [2, *shapes[0][1:]], generator):
            raise _NotPlainError("it computes something else in training mode")
        conv.eval()
        _, channels, height, width = shapes[0]
        try:
            of_any_size = _agree(conv, plain, [2, channels, height + 1, width + 1], generator)
        except _NotPlainError:  # it takes no other size
            of_any_size = False
    plain.train(conv.training)
    return plain, f"a {kind}, its weight{'' if of_any_size else f' and its padding of {height}x{width} inputs'} fixed"


def _recorded(conv: nn.Conv2d, shape: tuple[int, ...], generator: torch.Generator) -> nn.Module:
    """Return the plain convolution of the one call of F.conv2d that `conv` makes for an input."""
    if len(shape) != 4:
        raise _NotPlainError(f"its input has {len(shape)} dimensions, not (N, C, H, W)")
    recorded: list[dict[str, Any]] = []
    images = _random(conv, [2, *shape[1:]], generator)
    with Conv2dCalls(recorded.append):
        _output(conv, images)
    if len(recorded) != 1:
        raise _NotPlainError(f"its forward calls F.conv2d {len(recorded)} times, not once")
    (call,) = recorded
    if call["groups"] != 1 or call["weight"].dim() != 4 or call["input"].dim() != 4:
        raise _NotPlainError(f"it convolves in {call['groups']} groups")
    weight, bias = call["weight"].detach().clone(), _kept(call["bias"])
    geometry, padding, padded = _Geometry(call["stride"], call["dilation"]), call["padding"], call["input"]
    if conv.padding_mode != "zeros" and _equal(
        F.pad(images, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), padded
    ):
        return _conv(weight, bias, conv.padding, geometry, padding_mode=conv.padding_mode)
    added = _added_padding(images, padded)
    if added is None:
        raise _NotPlainError("it changes its input other than by zero padding")
    left, right, top, bottom = added
    if not any(added):
        return _conv(weight, bias, padding, geometry)
    if isinstance(padding, str) and padding != "valid":
        raise _NotPlainError(f"it pads its input, and F.conv2d pads it again ({padding!r})")
    rows, columns = (0, 0) if isinstance(padding, str) else _pair(padding)
    if (left, top) == (right, bottom):
        return _conv(weight, bias, (rows + top, columns + left), geometry)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d(added), conv=_conv(weight, bias, (rows, columns), geometry)))


@dataclass(frozen=True)
class _Geometry:
    """A convolution's stride and dilation, as one number or one for each direction."""

    stride: Any
    dilation: Any


def _conv(weight: Tensor, bias: Tensor | None, padding: Any, like: Any, *, padding_mode: Any = "zeros") -> nn.Conv2d:
    """Return an nn.Conv2d of this weight with the stride and the dilation of `like`."""
    outputs, inputs, *kernel = weight.shape
    conv = nn.Conv2d(
        inputs,
        outputs,
        (kernel[0], kernel[1]),
        stride=_pair(like.stride),
        padding=padding if isinstance(padding, str) else _pair(padding),
        dilation=_pair(like.dilation),
        bias=bias is not None,
        padding_mode=padding_mode,
        dtype=weight.dtype,
        device="meta",  # its random weights are not drawn
    )
    conv.weight = nn.Parameter(weight)
    conv.bias = None if bias is None else nn.Parameter(bias)
    return conv


def _kept(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


def _added_padding(before: Tensor, after: Tensor) -> _Padding | None:
    """Return the zeros with which `after` surrounds `before`; None if they differ in another way."""
    rows, columns = after.shape[2] - before.shape[2], after.shape[3] - before.shape[3]
    for top, left in product(range(rows + 1), range(columns + 1)):
        padding = (left, columns - left, top, rows - top)
        if _equal(F.pad(before, padding), after):
            return padding
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _agree(conv: nn.Module, plain: nn.Module, shape: Sequence[int], generator: torch.Generator) -> bool:
    """Return whether two layers give the same output for random inputs of a shape, but for rounding."""
    images = _random(conv, shape, generator)
    expected, found = _output(conv, images), plain(images)
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    return bool((expected - found).abs().max() <= _TOLERANCE * expected.abs().max())


def _output(conv: nn.Module, images: Tensor) -> Any:
    try:
        return conv(images)
    except Exception as error:  # whatever the user's own code raises
        raise _NotPlainError(f"its forward fails on random inputs: {first_line(error)}") from error


def _random(conv: nn.Module, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(list(shape), generator=generator).to(next(conv.parameters(), torch.empty(0)))


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode within the block; afterwards restore the modes, parameters, buffers and random generators."""
    kept: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (tensors, name, tensor, tensor.detach().clone())
        for each in module.modules()
        for tensors in (each._parameters, each._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    devices = sorted({tensor.device.index for _, _, tensor, _ in kept if tensor.is_cuda})
    try:
        with evaluating(module), torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for tensors, name, tensor, value in kept:
                tensors[name] = tensor.copy_(value)
