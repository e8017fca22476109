"""Build supernets: decompose the chosen convolutions of a network and replace them by series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from gross_ray.btd.block_terms import BlockTerms
from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.btd.options import BTDOptions
from gross_ray.btd.solver import block_term_decompositions, default_restarts
from gross_ray.errors import InvalidValueError, first_line
from gross_ray.nn.calls import network_calls
from gross_ray.nn.copies import copied
from gross_ray.nn.replace import replace_modules
from gross_ray.space import DENSE
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.layers import LayerChoice, choice_of, choose_layers
from gross_ray.supernet.series import SeriesConv2d


def decompose_model(
    model: nn.Module,
    *,
    layers: Sequence[str] | None = None,
    group_sizes: Mapping[str, Sequence[int]] | Sequence[int] | None = None,
    options: BTDOptions = BTDOptions(),  # noqa: B008 (frozen)
    nested: bool = False,
    seed: int = 0,
    keep_dense: bool = False,
    input_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Return a copy of `model` with a SeriesConv2d in place of each chosen convolution: the supernet.

    `layers` are names or globs (default: `decomposable_layers`). `group_sizes` are the sizes to try, for all layers or
    by name or glob; a layer takes the sizes that divide its input channels (default: all powers of two that do). With
    `nested`, each group-size starts from the expansion of the next smaller one. With `keep_dense`, the original
    layer is a choice too: DENSE, written d. The network's first convolution stays: with `input_shape` (C, H, W) the
    first that a forward pass reaches, otherwise the first registered. With `input_shape`, subclasses of nn.Conv2d that
    derive their weight or pad their input (weight standardisation, "same" padding) are decomposed too, with the weight
    that they use now. `choice_of` returns which layers stay, and why. Raises InvalidValueError like `choice_of`,
    `copied`, and with `input_shape` also like `running_supernet`.
    """
    if isinstance(group_sizes, Mapping):
        choice = choice_of(model, layers, by_layer=group_sizes, keep_dense=keep_dense, input_shape=input_shape)
    else:
        sizes_of_all = () if group_sizes is None else group_sizes
        choice = choice_of(model, layers, sizes_of_all, keep_dense=keep_dense, input_shape=input_shape)
    if input_shape is None:
        copied(choice.network)  # raises before the decompositions, which take long
    else:
        running_supernet(choice.network, choice.group_sizes, input_shape)
    return decompose_choice(choice, options, nested=nested, seed=seed)


def decompose_choice(choice: LayerChoice, options: BTDOptions, *, nested: bool = False, seed: int = 0) -> nn.Module:
    """Return `decompose_model` for a choice of layers whose supernet is known to run (`running_supernet`)."""
    chosen, sizes = choice.convs, choice.group_sizes
    bottlenecks: dict[str, list[Bottleneck]] = {}
    for names in _batches(chosen, sizes):
        weights = [chosen[name].weight for name in names]
        found = _decompose(weights, sizes[names[0]], options, nested=nested, seed=seed)
        bottlenecks |= dict(zip(names, found, strict=True))
    dense = [name for name in chosen if DENSE in sizes[name]]
    return build_supernet(choice.network, {name: bottlenecks[name] for name in chosen}, dense)


def _decompose(
    weights: Sequence[Tensor], group_sizes: Sequence[int], options: BTDOptions, *, nested: bool, seed: int
) -> list[list[Bottleneck]]:
    """Return each weight's bottlenecks; weights of one shape are decomposed in one pass per group-size."""
    bottlenecks: list[list[Bottleneck]] = [[] for _ in weights]
    starts: Sequence[BlockTerms | None] = [None] * len(weights)
    for size in sorted({*group_sizes} - {DENSE}):
        found = block_term_decompositions(weights, size, options=options, starts=starts, seeds=[seed] * len(weights))
        starts = found if nested else starts
        for series, terms in zip(bottlenecks, found, strict=True):
            series.append(terms.to_bottleneck())
    return bottlenecks


def _batches(convs: Mapping[str, nn.Conv2d], group_sizes: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Return the names of layers to decompose in one pass: equal in shape and sizes, and small or on a GPU."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, conv in convs.items():
        pays = conv.weight.is_cuda or default_restarts(conv.weight) > 1
        own_pass = None if pays else name
        alike.setdefault((conv.weight.shape, conv.weight.device, tuple(group_sizes[name]), own_pass), []).append(name)
    return list(alike.values())


def build_supernet(
    model: nn.Module, bottlenecks: Mapping[str, Sequence[Bottleneck]], dense: Collection[str] = ()
) -> nn.Module:
    """Return a copy of `model` with the series of `bottlenecks` in place of the named convolutions.

    The layers in `dense` may also stay as they are, and need no bottlenecks.
    """
    convs = choose_layers(model, list(bottlenecks))
    series = {
        name: SeriesConv2d.from_bottlenecks(conv, bottlenecks[name], keep_dense=name in dense)
        for name, conv in convs.items()
    }
    return replace_modules(model, series)


def empty_supernet(model: nn.Module, group_sizes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` with series of zeros in place of the named convolutions, to load a checkpoint into."""
    convs = choose_layers(model, list(group_sizes))
    return replace_modules(model, {name: SeriesConv2d(convs[name], group_sizes[name]) for name in convs})


def made_up(supernet: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw the weights of a supernet's series at their usual scale, in place: zeros might be faster. Return it."""
    with torch.no_grad():
        for layer in series_layers(supernet).values():
            for parameter in layer.series_parameters():
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return supernet


def running_supernet(
    model: nn.Module, group_sizes: Mapping[str, Sequence[int]], input_shape: Sequence[int]
) -> nn.Module:
    """Return `empty_supernet(model, group_sizes)` after checking that a forward pass of (C, H, W) reaches every series.

    Raises InvalidValueError, naming the layers, if the network bypasses a replaced module, for example by reading its
    weight directly.
    """
    supernet = empty_supernet(model, group_sizes)
    before = Counter(id(call.module) for call in network_calls(model, input_shape))
    reason = _why_bypassed(model, supernet, before, list(group_sizes), input_shape)
    if reason is None:
        return supernet
    alone = {
        name: _why_bypassed(model, empty_supernet(model, {name: sizes}), before, [name], input_shape)
        for name, sizes in group_sizes.items()
    }
    failing = {name: why for name, why in alone.items() if why is not None} or dict.fromkeys(group_sizes, reason)
    raise InvalidValueError(
        f"layers {', '.join(failing)}: with these decomposed, {next(iter(failing.values()))}, because it does not use "
        "them by calling the registered modules; leave them out (decomposition.layers, --layers)"
    )


def _why_bypassed(
    model: nn.Module, supernet: nn.Module, before: Mapping[int, int], names: Sequence[str], input_shape: Sequence[int]
) -> str | None:
    """Return how the network bypasses the series of these names, or None; `before` counts each module's calls."""
    try:
        after = Counter(id(call.module) for call in network_calls(supernet, input_shape))
    except InvalidValueError as error:
        return f"the network does not run ({first_line(error.__cause__ or error)})"
    if all(after[id(supernet.get_submodule(name))] == before[id(model.get_submodule(name))] for name in names):
        return None
    return "the network bypasses them"
