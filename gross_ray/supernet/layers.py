"""Choose the convolutions of a network to decompose and their group-sizes, with a reason for each of the others."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod

from torch import nn

from gross_ray.btd.bottleneck import bottleneck_macs
from gross_ray.errors import InvalidValueError
from gross_ray.nn.calls import network_calls
from gross_ray.space import DENSE, listed

_MOST_NAMED = 8
"""Most names in an error; of more, it lists the closest."""
_UNREACHED = "the forward pass never reaches it"
NOT_PAYING = "no group-size needs fewer MACs or parameters than it"
"""Why a layer that may stay dense is not decomposed at any of its default group-sizes."""


@dataclass(frozen=True)
class LayerChoice:
    """Which convolutions of a network are decomposed, and how."""

    convs: dict[str, nn.Conv2d]
    """The decomposed convolutions by name, in layer order."""
    group_sizes: dict[str, tuple[int, ...]]
    """Their choices: group-sizes, ascending, and DENSE last where the layer may stay as it is."""
    left_alone: dict[str, str]
    """Why each other convolution is left alone, by name."""
    dropped: dict[str, str]
    """For each decomposed layer, the group-sizes that it cannot have or that do not pay, and why."""


def decomposable_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return, in layer order, every dense Conv2d with a kernel larger than 1x1, except the network's first Conv2d.

    A Conv2d with hooks or an overridden forward, which a series would not run, is left out too.
    """
    return _usual(model, _Reached.of(model))


def choose_layers(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Conv2d]:
    """Return the named layers in layer order; without names, all `decomposable_layers`.

    A glob (with *, ? or [) selects the `decomposable_layers` that it matches; a plain name may be any dense
    convolution. Raises InvalidValueError for a name that is no dense convolution of `model`, a glob without a match,
    and if no layer remains.
    """
    return _choose(model, names, _Reached.of(model))


def _choose(model: nn.Module, names: Sequence[str] | None, reached: _Reached) -> dict[str, nn.Conv2d]:
    usual = _usual(model, reached)
    if not names:
        if not usual:
            raise InvalidValueError("this network has no dense convolution with a kernel above 1x1 after its first one")
        return usual
    modules = dict(model.named_modules())
    dense = {name: conv for name, conv in modules.items() if isinstance(conv, nn.Conv2d) and conv.groups == 1}
    chosen: set[str] = set()
    for name in names:
        if name not in modules and any(sign in name for sign in "*?["):
            matching = {layer for layer in usual if fnmatchcase(layer, name)}
            if not matching:
                hint = _other_names(model, name, usual) or _known_names(name, usual)
                raise InvalidValueError(f"layers {name!r}: matches no convolution that can be decomposed; {hint}")
            chosen |= matching
            continue
        if isinstance(conv := modules.get(name), nn.Conv2d) and conv.groups != 1:
            raise InvalidValueError(
                f"layer {name!r} has groups = {conv.groups} of {conv.in_channels} input channels: only a convolution "
                "with groups=1 can be decomposed"
            )
        if name in dense and (custom := _custom(dense[name])):
            raise InvalidValueError(
                f"layer {name!r} is {custom}: only a plain nn.Conv2d can be decomposed; leave it out"
            )
        if name in dense and not reached.has(dense[name]):
            raise InvalidValueError(f"layer {name!r}: {_UNREACHED}; leave it out")
        if name not in dense:
            shared = dict(model.named_modules(remove_duplicate=False)).get(name)
            same = next((other for other, conv in dense.items() if conv is shared), None)
            if same is not None:
                raise InvalidValueError(f"layer {name!r} is the same module as {same!r}: write {same!r}")
            raise InvalidValueError(f"{name!r} is not a dense convolution of this network; {_known_names(name, dense)}")
        chosen.add(name)
    return {name: conv for name, conv in dense.items() if name in chosen}


def choice_of(
    model: nn.Module,
    names: Sequence[str] | None = None,
    sizes: Sequence[int] = (),
    by_layer: Mapping[str, Sequence[int]] | None = None,
    *,
    keep_dense: bool = False,
    input_shape: Sequence[int] | None = None,
) -> LayerChoice:
    """Choose the layers to decompose and their group-sizes, and say why each other convolution is left alone.

    `names` selects layers as in `choose_layers`. Each layer takes those of `sizes` that divide its input channels;
    `by_layer` replaces `sizes` for single layers, by name or glob, and the first match counts. Without sizes a layer
    takes all of `default_group_sizes`. With `keep_dense`, DENSE is a choice of each layer, which with `input_shape`
    takes of the default sizes those that need fewer MACs or parameters than its convolution. A layer that no size
    divides, or for which none pays, is left alone, unless `names` or `by_layer` names it. With `input_shape` (C, H, W),
    the first convolution, which globs never match, is the first that the forward pass reaches instead of the first
    registered, and layers that it never reaches are left alone. Raises InvalidValueError like `choose_layers`; for a
    named layer without a group-size or that the forward pass never reaches; for group-sizes that are not whole numbers
    above 0, or do not divide each other; for a name in `by_layer` that no layer has; if no layer remains; and if the
    network cannot run such an image.
    """
    reached = _Reached.of(model, input_shape)
    convs = _choose(model, names, reached)
    paying = _paying_sizes(model, convs, input_shape) if keep_dense and input_shape is not None else {}
    sizes = _whole_numbers(sizes)
    own = _sizes_by_layer(convs, {name: _whole_numbers(values) for name, values in (by_layer or {}).items()})
    group_sizes, dropped, left_alone = {}, {}, _reasons(model, convs, reached)
    for name, conv in convs.items():
        requested = own.get(name, sizes)
        fitting = _fitting_sizes(name, conv, requested)
        usual = default_group_sizes(conv.in_channels)
        chosen = fitting or (() if requested else paying.get(name, usual))
        if chosen:
            group_sizes[name] = (*chosen, DENSE) if keep_dense else chosen
            if rest := sorted(set(requested).difference(fitting)):
                dropped[name] = f"group-sizes {listed(rest)}: no divisor of {conv.in_channels} input channels"
            elif not requested and (rest := sorted(set(usual).difference(chosen))):
                dropped[name] = f"group-sizes {listed(rest)}: no fewer MACs or parameters than the original layer"
            continue
        left_alone[name] = f"none of the group-sizes {listed(requested)} divides its {conv.in_channels} input channels"
        if not requested:
            left_alone[name] = NOT_PAYING
        if name in (names or ()) or name in own:
            raise InvalidValueError(f"layer {name!r}: {left_alone[name]}; name other group-sizes or leave it out")
    if not group_sizes:
        name = next(iter(convs))
        raise InvalidValueError(f"no layer remains to decompose; {name!r}: {left_alone[name]}; name other group-sizes")
    in_order = [name for name, module in model.named_modules() if name in left_alone]
    return LayerChoice(
        {name: conv for name, conv in convs.items() if name in group_sizes},
        group_sizes,
        {name: left_alone[name] for name in in_order},
        dropped,
    )


def default_group_sizes(in_channels: int) -> tuple[int, ...]:
    """Return the powers of two that divide `in_channels` (section 4.2: all that do not exceed it)."""
    return tuple(2**power for power in range(in_channels.bit_length()) if in_channels % 2**power == 0)


def _fitting_sizes(name: str, conv: nn.Conv2d, requested: Sequence[int]) -> tuple[int, ...]:
    """Return the requested sizes that divide the layer's channels; raises InvalidValueError if they form no series."""
    fitting = tuple(sorted({size for size in requested if conv.in_channels % size == 0}))
    for smaller, larger in pairwise(fitting):
        if larger % smaller:
            raise InvalidValueError(
                f"layer {name!r}: group-sizes {listed(fitting)}: {smaller} does not divide {larger}, and in a series "
                "each must divide the next; omit one (decomposition.layer_group_sizes, --layer-group-sizes)"
            )
    return fitting


def _paying_sizes(
    model: nn.Module, convs: Mapping[str, nn.Conv2d], input_shape: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Return each layer's default group-sizes at which it needs fewer MACs or parameters than as it is."""
    calls = network_calls(model, input_shape)
    paying = {}
    for name, conv in convs.items():
        own = [call for call in calls if call.module is conv]
        before = sum(call.input_size[0] * prod(call.input_size[2:]) for call in own)
        after = sum(call.output_size[0] * prod(call.output_size[2:]) for call in own)
        channels, outputs, kernel = conv.in_channels, conv.out_channels, prod(conv.kernel_size)
        paying[name] = tuple(
            size
            for size in default_group_sizes(channels)
            if bottleneck_macs(channels, outputs, kernel, size, before, after) < after * conv.weight.numel()
            or bottleneck_macs(channels, outputs, kernel, size, 1, 1) < conv.weight.numel()  # its parameters
        )
    return paying


def _whole_numbers(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return group-sizes, also NumPy's, as ints; raises InvalidValueError unless all are whole numbers above 0."""
    try:
        found = tuple(0 if isinstance(size, bool) else operator.index(size) for size in sizes)
    except TypeError:
        found = (0,)
    if min(found, default=1) < 1:
        raise InvalidValueError(f"group-sizes {sizes!r}: must be whole numbers above 0, like (1, 4, 16)")
    return found


def _sizes_by_layer(
    layers: Mapping[str, nn.Conv2d], group_sizes: Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int]]:
    """Return the sizes of each layer that has its own: those under its plain name, else under the first glob."""
    found: dict[str, Sequence[int]] = {}
    for name, sizes in group_sizes.items():
        matching = [layer for layer in layers if layer == name or fnmatchcase(layer, name)]
        if not matching:
            raise InvalidValueError(f"group-sizes for {name!r}, which is not decomposed; {_known_names(name, layers)}")
        for layer in matching:
            found.setdefault(layer, sizes)
    return found | {name: sizes for name, sizes in group_sizes.items() if name in layers}


def by_reason(reasons: Mapping[str, str]) -> str:
    """Return one line that lists the layers of each reason, the first few by name."""
    alike: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        alike.setdefault(reason, []).append(layer)
    parts = []
    for reason, layers in alike.items():
        more = f" and {len(layers) - _MOST_NAMED} more" if len(layers) > _MOST_NAMED else ""
        parts.append(f"{', '.join(layers[:_MOST_NAMED])}{more} ({reason})")
    return "; ".join(parts)


@dataclass(frozen=True)
class _Reached:
    """The modules that a forward pass reaches, in order; without an image's shape, all registered modules."""

    modules: Sequence[nn.Module]

    @classmethod
    def of(cls, model: nn.Module, input_shape: Sequence[int] | None = None) -> _Reached:
        if input_shape is None:
            return cls(list(model.modules()))
        return cls([call.module for call in network_calls(model, input_shape)])

    @property
    def first(self) -> nn.Conv2d | None:
        return next((module for module in self.modules if isinstance(module, nn.Conv2d)), None)

    def has(self, conv: nn.Module) -> bool:
        return any(module is conv for module in self.modules)


def _usual(model: nn.Module, reached: _Reached) -> dict[str, nn.Conv2d]:
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        name: conv
        for name, conv in convs.items()
        if conv is not reached.first
        and reached.has(conv)
        and conv.groups == 1
        and max(conv.kernel_size) > 1
        and not _custom(conv)
    }


def _reasons(model: nn.Module, chosen: Mapping[str, nn.Conv2d], reached: _Reached) -> dict[str, str]:
    """Return why each convolution that is not chosen is left alone."""
    convs = {name: conv for name, conv in model.named_modules() if isinstance(conv, nn.modules.conv._ConvNd)}
    reasons = {}
    for name, conv in convs.items():
        if name in chosen:
            continue
        if isinstance(conv, nn.modules.conv._ConvTransposeNd):
            reasons[name] = "a transposed convolution"
        elif not isinstance(conv, nn.Conv2d):
            reasons[name] = f"a {type(conv).__name__}, not a Conv2d"
        elif custom := _custom(conv):
            reasons[name] = custom
        elif conv.groups == conv.in_channels > 1:
            reasons[name] = "depthwise"
        elif conv.groups > 1:
            reasons[name] = f"already grouped ({conv.groups} groups)"
        elif max(conv.kernel_size) == 1:
            reasons[name] = "1x1"
        elif not reached.has(conv):
            reasons[name] = _UNREACHED
        elif conv is reached.first:
            reasons[name] = "the network's first convolution"
        else:
            reasons[name] = "not named"
    return reasons


def _custom(conv: nn.Conv2d) -> str | None:
    """Return what a convolution has that a series would not run (hooks, an overridden forward), or None."""
    kind = type(conv)
    if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
        return f"a {kind.__name__}, which overrides the forward of nn.Conv2d"
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)
    return f"a {kind.__name__} with hooks" if any(hooks) else None


def _known_names(name: str, known: Mapping[str, object]) -> str:
    if len(known) <= _MOST_NAMED:
        return f"known names: {', '.join(known)}"
    return f"closest names: {', '.join(difflib.get_close_matches(name, known, _MOST_NAMED, cutoff=0.0))}"


def _other_names(model: nn.Module, glob: str, known: Mapping[str, nn.Module]) -> str | None:
    """Return a hint at the known modules whose second name matches the glob, or None."""
    first = {id(module): name for name, module in known.items()}
    again = {
        first[id(module)]
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in first and fnmatchcase(name, glob)
    }
    named = ", ".join(name for name in known if name in again)
    return f"it matches second names of {named}: write those" if again else None
