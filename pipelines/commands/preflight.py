"""Checks of a new experiment that need its network and images, before the run folder is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from gross_ray.data.image_set import Splits
from gross_ray.errors import InvalidValueError, one_line
from gross_ray.experiment import Experiment
from gross_ray.models import build_model
from gross_ray.nn.calls import network_errors_as_invalid_value
from gross_ray.nn.copies import copied
from gross_ray.nn.modes import evaluating
from gross_ray.nn.sharing import check_trainable
from gross_ray.run.opened import layer_choice
from gross_ray.search.budgeted import BudgetedSpace
from gross_ray.search.budgets import amounts, parse_budgets
from gross_ray.search.cost import LayerCosts, full_costs, layer_costs
from gross_ray.search.selection import uniform
from gross_ray.space import DENSE, Configuration, SearchSpace
from gross_ray.supernet.build import running_supernet
from gross_ray.supernet.layers import LayerChoice
from gross_ray.training.together import check_stackable
from gross_ray.weights import load_weights
from pipelines.commands.rehearsal import rehearse, rehearse_export
from pipelines.stages import search
from pipelines.stages.supernets import as_one_graph

_LIMITS_ALONE = (
    'no group-size of all layers is left; have search.limits, like ["macs=2M"], and search.budgets=[], '
    "validation.fixed=[] and sweep.alphas=[]"
)


def check_experiment(experiment: Experiment, splits: Splits, *, endings: Sequence[str] = ()) -> list[str]:
    """Raise InvalidValueError for any mistake that would make a stage of `experiment` on `splits` fail later.

    Return lines for the user: what of the file of weights was taken, and what was passed over.

    Checked are: a factory that returns another network at each call, weights of another network, images that the
    network cannot run, an output that is not logits, unknown layers and group-sizes, fixed configurations and budgets
    outside the space, limits below its cheapest configuration, supernets that the engine cannot stack, and a space that
    is too large for the strategy. Then `rehearse` takes a step of each training, and evaluates as the search does, and
    the network is exported to files with these `endings`. Limits on latency are not checked: it is measured after the
    training.
    """
    shape = splits.train.images.shape[1:]
    network = _built(experiment.model, len(splits.classes), shape[-1])
    notes: list[str] = []
    if experiment.weights:
        trained = experiment.trains_base
        loaded = load_weights(network, experiment.weights, key=experiment.weights_key, new_classifier=trained)
        notes += [f"weights {experiment.weights}: {line}" for line in loaded.lines]
    else:
        check_trainable(network)
    _check_logits(network, shape, experiment.model, len(splits.classes))
    _check_training(network, shape, experiment.model)
    choice = layer_choice(network, experiment.decomposition, shape)
    supernet = running_supernet(choice.network, choice.group_sizes, shape)
    engine = experiment.engine
    stacked = engine.parallel_seeds > 1 or as_one_graph(engine, "cuda" if torch.cuda.is_available() else "cpu")
    if stacked:
        check_stackable(supernet, shape, engine)
    space = SearchSpace.of(supernet)
    _check_fixed(experiment, space, layer_costs(supernet, shape, "macs"), choice)
    if experiment.search.strategy == "exhaustive":
        search.check_size(space)
    limits = experiment.search.limits
    full = full_costs(network, shape) if any("%" in text for text in limits) else {}
    for text in limits:
        budgets = amounts([budget for budget in parse_budgets(text) if budget.cost != "latency_ms"], full)
        BudgetedSpace(space, [layer_costs(supernet, shape, budget.cost) for budget in budgets], budgets)
    rehearse(experiment, splits, network, supernet, original=choice.network, stacked=stacked)
    if endings:
        rehearse_export(experiment.model, supernet, shape, endings)
    return notes


def _built(model: str, num_classes: int, image_size: int) -> nn.Module:
    """Return a new network; raises InvalidValueError if two calls of a user's factory return different layers.

    Every process of a run builds the network anew, and loads the stored weights into it.
    """
    build = partial(build_model, num_classes=num_classes, image_size=image_size, generator=torch.Generator())
    network = build(model)
    again = build(model) if ":" in model else network
    for first, second in zip_longest(_layers(network), _layers(again), fillvalue="nothing"):
        if first != second:
            raise InvalidValueError(
                f"model {model!r}: its factory returns another network at each call, first with {first}, then with "
                f"{second}; let it draw none of its layers at random, or draw them with a fixed seed"
            )
    return network


def _layers(network: nn.Module) -> Iterator[str]:
    """Yield the settings of each module, like its stride, and the shape of each stored tensor."""
    for name, module in network.named_modules():
        if type(module).extra_repr.__module__.startswith("torch.nn."):  # others may show anything, like an address
            yield f"{name or 'the network'}: {type(module).__name__}({module.extra_repr()})"
    for name, value in network.state_dict().items():
        if isinstance(value, Tensor):
            yield f"{name} of {'x'.join(map(str, value.shape))}"


def _check_fixed(experiment: Experiment, space: SearchSpace, macs: LayerCosts, choice: LayerChoice) -> None:
    """Raise InvalidValueError for a fixed configuration outside the space, and for a budget that nothing else fits."""
    common = sorted(set.intersection(*map(set, space.group_sizes.values())) - {DENSE})
    budgets = [size for size in common if _leaves_some(space, uniform(space, size), macs)]
    for name, sizes, allowed in (
        ("search.budgets", experiment.search.budgets, budgets),
        ("validation.fixed", experiment.validation.fixed, common),
    ):
        for size in sizes:
            if size in allowed:
                continue
            try:
                why = f"{uniform(space, size)} is the cheapest configuration, nothing else fits under it"
            except InvalidValueError as error:
                layer = next(layer for layer, sizes in space.group_sizes.items() if size not in sizes)
                dropped = choice.dropped.get(layer) if experiment.decomposition.keep_dense else None
                why = str(error) if dropped is None else f"{error} ({dropped})"
            remedy = f"name such as every layer has: {', '.join(map(str, allowed))}" if allowed else _LIMITS_ALONE
            raise InvalidValueError(f"{name} = {sizes}: {why}; {remedy}")


def _check_logits(network: nn.Module, shape: torch.Size, model: str, num_classes: int) -> None:
    with network_errors_as_invalid_value(shape), torch.no_grad(), evaluating(network):
        logits = network(torch.zeros(1, *shape))
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(found, tuple) or len(found) != 2 or found[1] < num_classes:
        raise InvalidValueError(
            f"model {model!r}: gives {found} for an image of {'x'.join(map(str, shape))}; must give logits "
            f"(1, {num_classes}), one for each class; a factory is given num_classes where it names it"
        )


def _check_training(network: nn.Module, shape: torch.Size, model: str) -> None:
    """Raise InvalidValueError for a network that cannot be trained or stored."""
    others = [name for name, value in network.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        raise InvalidValueError(f"model {model!r}: {others[0]} of its state dict is no tensor; keep it elsewhere")
    try:
        with torch.random.fork_rng(devices=[]):
            logits = copied(network).train()(torch.zeros(2, *shape))
            nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
    except InvalidValueError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise InvalidValueError(
            f"model {model!r}: cannot be trained: {one_line(error)}; a step is made of float32 images, logits from the "
            "network in training mode, and their gradients"
        ) from None


def _leaves_some(space: SearchSpace, fixed: Configuration, macs: LayerCosts) -> bool:
    """Return whether another configuration has at most the MACs of the fixed one."""
    spare = macs.of_one(fixed) - macs.minimum
    least_more = min((np.partition(parts, 1)[1] - parts.min() for parts in macs.parts if len(parts) > 1), default=1)
    return bool(spare >= least_more)
