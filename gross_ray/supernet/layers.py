"""Choose the convolutions of a network to decompose and their group-sizes, with a reason for each of the others."""

from __future__ import annotations

import difflib
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gross_ray.btd.bottleneck import bottleneck_macs
from gross_ray.errors import InvalidValueError, first_line
from gross_ray.nn.calls import Call, network_calls
from gross_ray.nn.conv_calls import Bypasses, bypasses
from gross_ray.nn.sharing import shared_parameters
from gross_ray.own_network import accepted
from gross_ray.space import DENSE, listed
from gross_ray.supernet.plain import PlainNetwork, has_hooks, overrides_forward, with_plain_convolutions
from gross_ray.supernet.remedies import remedy_for

_MOST_NAMED = 8
"""Most names in an error; of more, it lists the closest."""
_UNREACHED = "the forward pass never reaches it"
NOT_PAYING = "no group-size needs fewer MACs or parameters than it"
"""Why a layer that may stay dense is not decomposed at any of its default group-sizes."""
_BYPASSED = "the forward pass uses its weight without calling it"
_FUNCTIONAL = "calls F.conv2d itself, outside of any nn.Conv2d"


@dataclass(frozen=True)
class LayerChoice:
    """Which convolutions of a network are decomposed, and how."""

    network: nn.Module
    """The network that is decomposed: the given one, or a copy in which convolutions of `made_plain` are plain."""
    convs: dict[str, nn.Conv2d]
    """The decomposed convolutions by name, in layer order."""
    group_sizes: dict[str, tuple[int, ...]]
    """Their choices: group-sizes, ascending, and DENSE last where the layer may stay as it is."""
    left_alone: dict[str, str]
    """Why each other convolution is left alone, by name."""
    dropped: dict[str, str]
    """For each decomposed layer, the group-sizes that it cannot have or that do not pay, and why."""
    made_plain: dict[str, str]
    """What each convolution of a class of its own was before a plain one replaced it, by its name in `network`."""


def decomposable_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return, in layer order, every dense Conv2d with a kernel larger than 1x1, except the network's first Conv2d.

    A Conv2d with hooks or an overridden forward, which a series would not run, is left out too, and one that shares a
    parameter with another module.
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
            raise _nothing(model, reached)
        return usual
    modules = dict(model.named_modules())
    dense = {name: conv for name, conv in modules.items() if isinstance(conv, nn.Conv2d) and conv.groups == 1}
    sharing = shared_parameters(model)
    chosen: set[str] = set()
    for name in names:
        if name not in modules and any(sign in name for sign in "*?["):
            matching = {layer for layer in usual if fnmatchcase(layer, name)}
            if not usual:
                raise _nothing(model, reached)
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
        if name in dense and (custom := reached.custom(name, dense[name])):
            raise InvalidValueError(
                f"layer {name!r} is {custom}: only a plain nn.Conv2d can be decomposed; leave it out"
            )
        if name in dense and (why := _sharing(dense[name], sharing)):
            raise InvalidValueError(f"layer {name!r} {why}, which a decomposition would end; leave it out")
        if name in dense and not reached.has(dense[name]):
            raise InvalidValueError(f"layer {name!r}: {reached.why_not(dense[name])}; leave it out")
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
    registered, layers that it never reaches are left alone, and `with_plain_convolutions` replaces subclasses of
    nn.Conv2d. Raises InvalidValueError like `choose_layers` and `accepted`; for a named layer without a group-size or
    that the forward pass never reaches; for group-sizes that are not whole numbers above 0, or do not divide each
    other; for a name in `by_layer` that no layer has; if no layer remains; if the network cannot run such an image.
    """
    model = accepted(model, "the network", dtypes=(torch.float32, torch.float64))
    plain, reached = _made_plain(model, names or (), input_shape)
    model, names = plain.network, [present for name in names or () for present in plain.present(name)]
    convs = _choose(model, names, reached)
    paying = _paying_sizes(model, convs, input_shape) if keep_dense and input_shape is not None else {}
    sizes = _whole_numbers(sizes)
    by_name = {name: _whole_numbers(values) for name, values in (by_layer or {}).items()}
    own = _sizes_by_layer(convs, {now: by_name[name] for name in by_name for now in plain.present(name)})
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
        if name in names or name in own:
            raise InvalidValueError(f"layer {name!r}: {left_alone[name]}; name other group-sizes or leave it out")
    if not group_sizes:
        name = next(iter(convs))
        raise InvalidValueError(f"no layer remains to decompose; {name!r}: {left_alone[name]}; name other group-sizes")
    in_order = [name for name, module in model.named_modules() if name in left_alone]
    return LayerChoice(
        network=model,
        convs={name: conv for name, conv in convs.items() if name in group_sizes},
        group_sizes=group_sizes,
        left_alone={name: left_alone[name] for name in [*in_order, *left_alone]},
        dropped=dropped,
        made_plain=plain.made_plain,
    )


def _made_plain(
    model: nn.Module, names: Sequence[str], input_shape: Sequence[int] | None
) -> tuple[PlainNetwork, _Reached]:
    """Return the network with plain convolutions in place of others, and what a forward pass of it reaches."""
    reached = _Reached.of(model, input_shape)
    plain = with_plain_convolutions(model, reached.calls, names)
    if plain.made_plain:
        try:
            reached = _Reached.of(plain.network, input_shape)
        except InvalidValueError as error:
            why = f"with a plain one in its place the network fails: {first_line(error.__cause__ or error)}"
            earlier = {new: old for old, new in plain.renamed.items()}
            refused = {earlier.get(name, name): why for name in plain.made_plain}
            plain = PlainNetwork(model, refused=plain.refused | refused)
    return plain, replace(reached, not_plain=plain.refused)


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
    """Return one line that lists the layers of each reason, commonest first, and the first few layers by name."""
    alike: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        alike.setdefault(reason, []).append(layer)
    parts = []
    for reason, layers in sorted(alike.items(), key=lambda item: -len(item[1])):
        more = f" and {len(layers) - _MOST_NAMED} more" if len(layers) > _MOST_NAMED else ""
        parts.append(f"{', '.join(layers[:_MOST_NAMED])}{more} ({reason})")
    return "; ".join(parts)


def _nothing(model: nn.Module, reached: _Reached) -> InvalidValueError:
    """Return the error for a network in which nothing can be decomposed: why for each convolution, and a remedy."""
    reasons = _reasons(model, {}, reached)
    if not reasons:
        return InvalidValueError("nothing to decompose: this network has no convolution")
    (commonest, _), *_ = Counter(reasons.values()).most_common(1)
    return InvalidValueError(
        f"no convolution of this network can be decomposed: {by_reason(reasons)}; {remedy_for(commonest)}"
    )


@dataclass(frozen=True)
class _Reached:
    """The modules that a forward pass reaches, in order; without an image's shape, all registered modules."""

    modules: Sequence[nn.Module]
    calls: Sequence[Call] | None = None
    """The calls of the forward pass; None without an image's shape."""
    bypasses: Bypasses = field(default_factory=Bypasses)
    not_plain: Mapping[str, str] = field(default_factory=dict)
    """Why no plain convolution can replace each of these convolutions of a class of its own."""

    @classmethod
    def of(cls, model: nn.Module, input_shape: Sequence[int] | None = None) -> _Reached:
        if input_shape is None:
            return cls(list(model.modules()))
        with bypasses(model) as found:
            calls = network_calls(model, input_shape)
        return cls([call.module for call in calls], calls, found)

    @property
    def first(self) -> nn.Conv2d | None:
        return next((module for module in self.modules if isinstance(module, nn.Conv2d)), None)

    def has(self, conv: nn.Module) -> bool:
        return any(module is conv for module in self.modules)

    def why_not(self, conv: nn.Module) -> str:
        """Return why a convolution is not reached."""
        return _BYPASSED if id(conv._parameters.get("weight")) in self.bypasses.weights else _UNREACHED

    def custom(self, name: str, conv: nn.Conv2d) -> str | None:
        """Return `_custom`, and why no plain convolution can replace it."""
        custom, why = _custom(conv), self.not_plain.get(name)
        return custom if why is None or custom is None else f"{custom}: {why}"


def _usual(model: nn.Module, reached: _Reached) -> dict[str, nn.Conv2d]:
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    sharing = shared_parameters(model)
    return {
        name: conv
        for name, conv in convs.items()
        if conv is not reached.first
        and reached.has(conv)
        and conv.groups == 1
        and max(conv.kernel_size) > 1
        and not _custom(conv)
        and not _sharing(conv, sharing)
    }


def _reasons(model: nn.Module, chosen: Mapping[str, nn.Conv2d], reached: _Reached) -> dict[str, str]:
    """Return why each convolution that is not chosen is left alone."""
    convs = {name: conv for name, conv in model.named_modules() if isinstance(conv, nn.modules.conv._ConvNd)}
    sharing = shared_parameters(model)
    reasons = {}
    for name, conv in convs.items():
        if name in chosen:
            continue
        if isinstance(conv, nn.modules.conv._ConvTransposeNd):
            reasons[name] = "a transposed convolution"
        elif not isinstance(conv, nn.Conv2d):
            reasons[name] = f"a {type(conv).__name__}, not a Conv2d"
        elif has_hooks(conv):
            reasons[name] = str(_custom(conv))
        elif conv.groups == conv.in_channels > 1:
            reasons[name] = "depthwise"
        elif conv.groups > 1:
            reasons[name] = f"already grouped ({conv.groups} groups)"
        elif max(conv.kernel_size) == 1:
            reasons[name] = "1x1"
        elif not reached.has(conv):
            reasons[name] = reached.why_not(conv)
        elif conv is reached.first:
            reasons[name] = "the network's first convolution"
        elif custom := reached.custom(name, conv):
            reasons[name] = custom
        elif why := _sharing(conv, sharing):
            reasons[name] = why
        else:
            reasons[name] = "not named"
    return reasons | dict.fromkeys([name or "(network)" for name in reached.bypasses.functional], _FUNCTIONAL)


def _custom(conv: nn.Conv2d) -> str | None:
    """Return what a convolution has that a series would not run (hooks, an overridden forward), or None."""
    kind = type(conv).__name__
    for hook in conv._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            return f"a {kind} pruned by torch.nn.utils.prune"
        if isinstance(hook, WeightNorm | SpectralNorm):
            return f"a {kind} with torch.nn.utils.{'weight' if isinstance(hook, WeightNorm) else 'spectral'}_norm"
    if has_hooks(conv):
        return f"a {kind} with hooks"
    return f"a {kind}, which overrides the forward of nn.Conv2d" if overrides_forward(conv) else None


def _sharing(conv: nn.Module, shared: Mapping[nn.Module, str]) -> str | None:
    """Return what a convolution, or a parametrization of it, shares with another module; a series would not."""
    return next((shared[module] for module in conv.modules() if module in shared), None)


def _known_names(name: str, known: Mapping[str, object]) -> str:
    if not known:
        return "it has none"
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
