"""Which convolutions of a network are decomposed, at which group-sizes, and why the others are left alone."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.nn.calls import network_calls

_MOST_NAMED = 8
"""Names that an error lists; of more, the closest."""
_NOT_MET = "no image meets it"


@dataclass(frozen=True)
class LayerChoice:
    """What becomes of each convolution of a network."""

    convs: dict[str, nn.Conv2d]
    """Those that are decomposed, in layer order."""
    group_sizes: dict[str, tuple[int, ...]]
    """Their group-sizes, ascending."""
    left_alone: dict[str, str]
    """Why each of the others is not, by name."""
    dropped: dict[str, str]
    """Which of the group-sizes asked for a layer that is decomposed does not have, and why, by name."""


def decomposable_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return, in layer order, every dense Conv2d with a kernel larger than 1x1 but the first of all Conv2d's.

    Those are left out that have a forward or hooks of their own, which a series would not run.
    """
    return _usual(model, _Met.of(model))


def choose_layers(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Conv2d]:
    """Return the named layers in layer order (all `decomposable_layers` where no names are given).

    A name with *, ? or [ stands for those of `decomposable_layers` that it matches, as in a shell; a plain one may
    be any dense convolution. Raises InvalidValueError for a name that is not a dense convolution of `model`, one that
    matches none, and if nothing is left.
    """
    return _choose(model, names, _Met.of(model))


def _choose(model: nn.Module, names: Sequence[str] | None, met: _Met) -> dict[str, nn.Conv2d]:
    usual = _usual(model, met)
    if not names:
        if not usual:
            raise InvalidValueError("this network has no dense convolution with a kernel above 1x1 after its first one")
        return usual
    modules = dict(model.named_modules())
    dense = {name: one for name, one in modules.items() if isinstance(one, nn.Conv2d) and one.groups == 1}
    chosen: set[str] = set()
    for name in names:
        if name not in modules and any(sign in name for sign in "*?["):
            matching = {one for one in usual if fnmatchcase(one, name)}
            if not matching:
                hint = _other_names(model, name, usual) or _there(name, usual)
                raise InvalidValueError(
                    f"layers {name!r}: no convolution that can be decomposed has such a name; {hint}"
                )
            chosen |= matching
            continue
        if isinstance(conv := modules.get(name), nn.Conv2d) and conv.groups != 1:
            raise InvalidValueError(
                f"layer {name!r} has groups = {conv.groups} of {conv.in_channels} input channels: only a convolution "
                "with groups=1 can be decomposed"
            )
        if name in dense and (own := _own_way(dense[name])):
            raise InvalidValueError(f"layer {name!r} is {own}: only plain nn.Conv2d's can be decomposed; leave it out")
        if name in dense and not met.has(dense[name]):
            raise InvalidValueError(f"layer {name!r}: {_NOT_MET}; leave it out")
        if name not in dense:
            same = next((one for one, conv in dense.items() if conv is _module_at(model, name)), None)
            if same is not None:
                raise InvalidValueError(f"layer {name!r} is the same module as {same!r}: name that one")
            raise InvalidValueError(f"{name!r} is not a dense convolution of this network; {_there(name, dense)}")
        chosen.add(name)
    return {name: conv for name, conv in dense.items() if name in chosen}


def choice_of(
    model: nn.Module,
    names: Sequence[str] | None = None,
    sizes: Sequence[int] = (),
    by_layer: Mapping[str, Sequence[int]] | None = None,
    *,
    input_shape: Sequence[int] | None = None,
) -> LayerChoice:
    """Return what becomes of each convolution: `names` as in `choose_layers`, each at those of `sizes` that fit it.

    `by_layer` has other sizes for some of them, by name or glob; the first that names a layer counts. Without sizes, a
    layer is decomposed at all of `default_group_sizes`. One whose input channels no size divides is left alone, unless
    it is named plainly or by `by_layer`. With `input_shape`, the network's first convolution, which no glob names, is
    the first that an image of (C, H, W) meets, not the first registered, and one that none meets is left alone. Raises
    InvalidValueError for a layer that is named and fits no size or is not met, for group-sizes that are no whole
    numbers above 0 or of which one does not divide the next, for a name in `by_layer` that no layer has, as
    `choose_layers` does, if none is left, and where the network cannot run such an image.
    """
    met = _Met.of(model, input_shape)
    convs = _choose(model, names, met)
    sizes = _whole_numbers(sizes)
    own = _sizes_by_layer(convs, {name: _whole_numbers(some) for name, some in (by_layer or {}).items()})
    group_sizes, dropped, left_alone = {}, {}, _reasons(model, convs, met)
    for name, conv in convs.items():
        asked = own.get(name, sizes)
        fitting = tuple(sorted({size for size in asked if conv.in_channels % size == 0}))
        for smaller, larger in pairwise(fitting):
            if larger % smaller:
                raise InvalidValueError(
                    f"layer {name!r}: group-sizes {_listed(fitting)}: {smaller} does not divide {larger}, and in a "
                    "series each divides the next; leave one out (decomposition.layer_group_sizes, --layer-group-sizes)"
                )
        if fitting or not asked:
            group_sizes[name] = fitting or default_group_sizes(conv.in_channels)
            if rest := sorted(set(asked).difference(fitting)):
                dropped[name] = f"group-sizes {_listed(rest)}: no divisor of {conv.in_channels} input channels"
            continue
        left_alone[name] = f"none of the group-sizes {_listed(asked)} divides its {conv.in_channels} input channels"
        if name in (names or ()) or name in own:
            raise InvalidValueError(f"layer {name!r}: {left_alone[name]}; name other group-sizes or leave it out")
    if not group_sizes:
        name = next(iter(convs))
        raise InvalidValueError(f"no layer is left to decompose; {name!r}: {left_alone[name]}")
    in_order = [name for name, module in model.named_modules() if name in left_alone]
    return LayerChoice(
        {name: conv for name, conv in convs.items() if name in group_sizes},
        group_sizes,
        {name: left_alone[name] for name in in_order},
        dropped,
    )


def default_group_sizes(in_channels: int) -> tuple[int, ...]:
    """Return the powers of two that divide `in_channels` (section 4.2: all that do not exceed them)."""
    return tuple(2**power for power in range(in_channels.bit_length()) if in_channels % 2**power == 0)


def _whole_numbers(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return group-sizes, NumPy's too, as ints; raises InvalidValueError for what is none."""
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
    """Return the sizes of each layer that is named plainly, or else by a glob: the first that fits it."""
    found: dict[str, Sequence[int]] = {}
    for name, sizes in group_sizes.items():
        matching = [one for one in layers if one == name or fnmatchcase(one, name)]
        if not matching:
            raise InvalidValueError(f"group-sizes for {name!r}, which is not decomposed; {_there(name, layers)}")
        for one in matching:
            found.setdefault(one, sizes)
    return found | {name: sizes for name, sizes in group_sizes.items() if name in layers}


def by_reason(reasons: Mapping[str, str]) -> str:
    """Return layers in a line by their reasons, of many the first."""
    alike: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        alike.setdefault(reason, []).append(layer)
    parts = []
    for reason, layers in alike.items():
        more = f" and {len(layers) - _MOST_NAMED} more" if len(layers) > _MOST_NAMED else ""
        parts.append(f"{', '.join(layers[:_MOST_NAMED])}{more} ({reason})")
    return "; ".join(parts)


@dataclass(frozen=True)
class _Met:
    """The modules that an image meets, in their order; where nothing is known of that, all that are registered."""

    modules: Sequence[nn.Module]

    @classmethod
    def of(cls, model: nn.Module, input_shape: Sequence[int] | None = None) -> _Met:
        if input_shape is None:
            return cls(list(model.modules()))
        return cls([call.module for call in network_calls(model, input_shape)])

    @property
    def first(self) -> nn.Conv2d | None:
        return next((one for one in self.modules if isinstance(one, nn.Conv2d)), None)

    def has(self, conv: nn.Module) -> bool:
        return any(one is conv for one in self.modules)


def _usual(model: nn.Module, met: _Met) -> dict[str, nn.Conv2d]:
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        name: conv
        for name, conv in convs.items()
        if conv is not met.first
        and met.has(conv)
        and conv.groups == 1
        and max(conv.kernel_size) > 1
        and not _own_way(conv)
    }


def _reasons(model: nn.Module, chosen: Mapping[str, nn.Conv2d], met: _Met) -> dict[str, str]:
    """Return why each convolution that is not chosen is left alone."""
    convs = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.modules.conv._ConvNd)]
    reasons = {}
    for name, conv in convs:
        if name in chosen:
            continue
        if isinstance(conv, nn.modules.conv._ConvTransposeNd):
            reasons[name] = "a transposed convolution"
        elif not isinstance(conv, nn.Conv2d):
            reasons[name] = f"a {type(conv).__name__}, no Conv2d"
        elif own := _own_way(conv):
            reasons[name] = own
        elif conv.groups == conv.in_channels > 1:
            reasons[name] = "depthwise"
        elif conv.groups > 1:
            reasons[name] = f"grouped already ({conv.groups} groups)"
        elif max(conv.kernel_size) == 1:
            reasons[name] = "1x1"
        elif not met.has(conv):
            reasons[name] = _NOT_MET
        elif conv is met.first:
            reasons[name] = "the network's first convolution"
        else:
            reasons[name] = "not named"
    return reasons


def _own_way(conv: nn.Conv2d) -> str | None:
    """Return what a convolution does that a series would not do: a forward or hooks of its own; None if nothing."""
    kind = type(conv)
    if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
        return f"a {kind.__name__}, which computes in a way of its own"
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)
    return f"a {kind.__name__} with hooks of its own" if any(hooks) else None


def _there(name: str, known: Mapping[str, object]) -> str:
    if len(known) <= _MOST_NAMED:
        return f"there are: {', '.join(known)}"
    return f"the closest: {', '.join(difflib.get_close_matches(name, known, _MOST_NAMED, cutoff=0.0))}"


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _other_names(model: nn.Module, glob: str, known: Mapping[str, nn.Module]) -> str | None:
    """Return which known modules have a second name that fits the glob, told; None if none has."""
    first = {id(module): name for name, module in known.items()}
    again = {
        first[id(module)]
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in first and fnmatchcase(name, glob)
    }
    named = ", ".join(name for name in known if name in again)
    return f"it fits other names of {named}: name these" if again else None


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module of that name, a second one of a shared module too, or None."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
