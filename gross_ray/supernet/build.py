"""Building supernets: decompose the chosen convolutions of a network, and put series in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from gross_ray.btd.block_terms import BlockTerms
from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.btd.options import BTDOptions
from gross_ray.btd.solver import block_term_decompositions, default_restarts
from gross_ray.errors import InvalidValueError, first_line
from gross_ray.nn.calls import network_calls
from gross_ray.nn.replace import replace_modules
from gross_ray.supernet.layers import choice_of, choose_layers
from gross_ray.supernet.series import SeriesConv2d, check_dense


def decompose_model(
    model: nn.Module,
    *,
    layers: Sequence[str] | None = None,
    group_sizes: Mapping[str, Sequence[int]] | Sequence[int] | None = None,
    options: BTDOptions = BTDOptions(),  # noqa: B008 (frozen)
    nested: bool = False,
    seed: int = 0,
    input_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Return a copy of `model` with a SeriesConv2d in place of each chosen convolution: the supernet.

    `layers` are names or globs (default: `decomposable_layers`). `group_sizes` are those to try, or those for each name
    or glob, where they divide a layer's input channels; the default are the powers of two that do. What is left alone,
    and why, `choice_of` tells. With `nested`, each group-size starts from the expansion of the next smaller one. The
    first convolution is left alone: the first that an image of `input_shape` (C, H, W) meets, or else the first
    registered. Raises InvalidValueError as `choice_of` does, and with `input_shape` as `running_supernet` does.
    """
    if isinstance(group_sizes, Mapping):
        choice = choice_of(model, layers, by_layer=group_sizes, input_shape=input_shape)
    else:
        choice = choice_of(model, layers, () if group_sizes is None else group_sizes, input_shape=input_shape)
    chosen, sizes = choice.convs, choice.group_sizes
    if input_shape is not None:
        running_supernet(model, sizes, input_shape)
    bottlenecks: dict[str, list[Bottleneck]] = {}
    for names in _batches(chosen, sizes):
        weights = [chosen[name].weight for name in names]
        found = _decompose(weights, sizes[names[0]], options, nested=nested, seed=seed)
        bottlenecks |= dict(zip(names, found, strict=True))
    return build_supernet(model, {name: bottlenecks[name] for name in chosen})


def decompose_layer(
    conv: nn.Conv2d, group_sizes: Sequence[int], *, options: BTDOptions, nested: bool = False, seed: int = 0
) -> list[Bottleneck]:
    """Return one bottleneck for each group-size of `conv`, in ascending order.

    Raises InvalidValueError for a grouped convolution, or a group-size that does not divide its input channels.
    """
    check_dense(conv)
    return _decompose([conv.weight], group_sizes, options, nested=nested, seed=seed)[0]


def _decompose(
    weights: Sequence[Tensor], group_sizes: Sequence[int], options: BTDOptions, *, nested: bool, seed: int
) -> list[list[Bottleneck]]:
    """Return the bottlenecks of each weight, all of one shape and decomposed in one pass for each group-size."""
    bottlenecks: list[list[Bottleneck]] = [[] for _ in weights]
    starts: Sequence[BlockTerms | None] = [None] * len(weights)
    for size in sorted(group_sizes):
        found = block_term_decompositions(weights, size, options=options, starts=starts, seeds=[seed] * len(weights))
        starts = found if nested else starts
        for series, terms in zip(bottlenecks, found, strict=True):
            series.append(terms.to_bottleneck())
    return bottlenecks


def _batches(convs: Mapping[str, nn.Conv2d], group_sizes: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Return the names of layers to decompose in one pass: alike, and small or on a GPU, where that pays."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, conv in convs.items():
        pays = conv.weight.is_cuda or default_restarts(conv.weight) > 1
        alone = None if pays else name
        alike.setdefault((conv.weight.shape, conv.weight.device, tuple(group_sizes[name]), alone), []).append(name)
    return list(alike.values())


def build_supernet(model: nn.Module, bottlenecks: Mapping[str, Sequence[Bottleneck]]) -> nn.Module:
    """Return a copy of `model` whose named convolutions are the series of the given bottlenecks."""
    convs = choose_layers(model, list(bottlenecks))
    return replace_modules(
        model, {name: SeriesConv2d.from_bottlenecks(convs[name], bottlenecks[name]) for name in convs}
    )


def empty_supernet(model: nn.Module, group_sizes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` with series of zeros, to load a checkpoint into."""
    convs = choose_layers(model, list(group_sizes))
    return replace_modules(model, {name: SeriesConv2d(convs[name], group_sizes[name]) for name in convs})


def running_supernet(
    model: nn.Module, group_sizes: Mapping[str, Sequence[int]], input_shape: Sequence[int]
) -> nn.Module:
    """Return `empty_supernet`'s; InvalidValueError, naming the layers, where an image of (C, H, W) would not meet them.

    So it is where a network uses a convolution other than by calling the module that is registered: its weight, say,
    or the same module from a function of its own.
    """
    supernet = empty_supernet(model, group_sizes)
    before = Counter(id(call.module) for call in network_calls(model, input_shape))
    reason = _why_not_met(model, supernet, before, list(group_sizes), input_shape)
    if reason is None:
        return supernet
    alone = {
        name: _why_not_met(model, empty_supernet(model, {name: sizes}), before, [name], input_shape)
        for name, sizes in group_sizes.items()
    }
    failing = {name: why for name, why in alone.items() if why is not None} or dict.fromkeys(group_sizes, reason)
    raise InvalidValueError(
        f"layers {', '.join(failing)}: decomposed, {next(iter(failing.values()))}, for it uses them other than by "
        "calling the module that is registered; leave them out (decomposition.layers, --layers)"
    )


def _why_not_met(
    model: nn.Module, supernet: nn.Module, before: Mapping[int, int], names: Sequence[str], input_shape: Sequence[int]
) -> str | None:
    """Return why series do not stand in for the convolutions of these names, `before` the calls of each; or None."""
    try:
        after = Counter(id(call.module) for call in network_calls(supernet, input_shape))
    except InvalidValueError as error:
        return f"the network does not run ({first_line(error.__cause__ or error)})"
    if all(after[id(supernet.get_submodule(name))] == before[id(model.get_submodule(name))] for name in names):
        return None
    return "the network goes on without them"
