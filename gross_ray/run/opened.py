"""An opened run: its experiment, networks and space, each read or built once, when it is first needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gross_ray.errors import ConvertedNetworkWarning, MissingStageError
from gross_ray.experiment import DecompositionOptions, Experiment
from gross_ray.models import build_model
from gross_ray.nn.copies import copied
from gross_ray.run.store import RunStore
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.configure import extract, series_layers
from gross_ray.supernet.layers import LayerChoice, choice_of
from gross_ray.supernet.options import parse_layer_group_sizes
from gross_ray.weights import restore_state

T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """The base network that is decomposed: the network of median validation accuracy."""

    network: nn.Module
    """On the CPU, as stored, with the plain convolutions of `choice`; nothing may change it."""
    seed: int
    input_shape: tuple[int, int, int]
    choice: LayerChoice
    """Which convolutions are decomposed at which group-sizes, and why the others are not decomposed."""
    classes: tuple[str, ...]
    preparation: str
    """How images were resized for it; empty: they were not."""
    _copies: dict[str, nn.Module] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def space(self) -> SearchSpace:
        """The space of its configurations."""
        return SearchSpace(self.choice.group_sizes)

    def on(self, device: str) -> nn.Module:
        """Return a copy of the network on `device` for forward passes, the same copy at each call.

        A copy, because training a supernet sets its mode and memory format, and the latter changes how the sums of a
        decomposition round.
        """
        if device not in self._copies:
            self._copies[device] = copied(self.network).to(device)
        return self._copies[device]


class Run:
    """A run folder and a cache of what was read from it. It pickles without the cache: each process reads on its own.

    `once` caches a value; `changed` drops the cached values that new results of a stage may have changed.
    """

    def __init__(self, store: RunStore) -> None:
        """Nothing is read yet."""
        self.store = store
        self._known: dict[str, Any] = {}
        self._depends: dict[str, set[str]] = {}

    def __reduce__(self) -> tuple[type[Run], tuple[RunStore]]:
        return Run, (self.store,)

    @property
    def experiment(self) -> Experiment:
        """The experiment of the folder."""
        return self.store.experiment

    @property
    def base(self) -> Base:
        """The base network that is decomposed; raises MissingStageError if `train` is not finished."""
        return self.once("base", lambda: _load_base(self.store))

    @property
    def space(self) -> SearchSpace:
        """The space of the base network's configurations; raises MissingStageError if `train` is not finished."""
        return self.base.space

    def once(self, name: str, read: Callable[[], T], *, depends: Collection[str] = ()) -> T:
        """Return `read()`, called once for each name; an error is raised and not cached.

        `depends` are the kinds of results whose change makes the value outdated.
        """
        if name not in self._known:
            self._known[name], self._depends[name] = read(), set(depends)
        known: T = self._known[name]
        return known

    def changed(self, *kinds: str) -> None:
        """Drop the cached values that depend on results of these kinds; without kinds, all but the base network.

        The latter is for files that were deleted, and for units that other processes stored.
        """
        for name in list(self._known):
            if name != "base" and (not kinds or self._depends[name].intersection(kinds)):
                del self._known[name]

    def new_network(self, num_classes: int, image_size: int, generator: torch.Generator) -> nn.Module:
        """Return a newly initialised network of the experiment's model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvertedNetworkWarning)  # the command that made the folder showed it
            return build_model(
                self.experiment.model, num_classes=num_classes, image_size=image_size, generator=generator
            )

    def supernet(self, stage: str, unit: str) -> nn.Module:
        """Return the supernet that `stage` stored for `unit`, on the CPU."""
        tensors, about = self.store.load_checkpoint(stage, unit)
        supernet = empty_supernet(
            self.base.network, {name: tuple(sizes) for name, sizes in about["group_sizes"].items()}
        )
        for name, layer in series_layers(supernet).items():
            if f"{name}.dense_weight" in tensors:  # it was trained (validation.trainable=all)
                layer.train_dense()
        restore_state(supernet, tensors, f"{stage}, {unit} in {self.store.storage}")
        return supernet

    def validated(self, configuration: str, seed: int) -> nn.Module:
        """Return a validated configuration as a plain network on the CPU.

        Raises InvalidValueError if it is outside the space, and MissingStageError, naming the validated ones, if it is
        not validated.
        """
        chosen = self.space.check(Configuration.parse(configuration))
        unit = validation_unit(chosen, seed)
        stored = set(self.store.units("validations"))
        if unit not in stored or not self.store.has_checkpoint("validate", unit):
            others = ", ".join(sorted(stored - {unit})) or "none"
            raise MissingStageError(
                f"{unit} is not validated in {self.store.storage}; validated are: {others}. Run `gross validate RUN "
                f"--configuration {chosen}` on it first"
            )
        return extract(self.supernet("validate", unit), chosen)


def validation_unit(configuration: Configuration, seed: int) -> str:
    """Return the name under which a configuration trained on its own is stored."""
    return f"{configuration},seed={seed}"


def save_supernet(store: RunStore, stage: str, unit: str, supernet: nn.Module, about: dict[str, Any]) -> None:
    """Store a supernet with what `Run.supernet` needs to build it again."""
    sizes = {name: list(sizes) for name, sizes in SearchSpace.of(supernet).group_sizes.items()}
    tensors: dict[str, Tensor] = supernet.state_dict()
    store.save_checkpoint(stage, unit, tensors, {"group_sizes": sizes, **about})


def layer_choice(network: nn.Module, options: DecompositionOptions, input_shape: Sequence[int]) -> LayerChoice:
    """Return which convolutions an experiment decomposes; raises as `choice_of` does."""
    by_layer = parse_layer_group_sizes(options.layer_group_sizes)
    return choice_of(
        network,
        options.layers,
        options.group_sizes,
        by_layer,
        keep_dense=options.keep_dense,
        input_shape=input_shape,
    )


def _load_base(store: RunStore) -> Base:
    seed = _median_seed(store)
    tensors, about = store.load_checkpoint("train", f"seed={seed}")
    network = Run(store).new_network(about["num_classes"], about["image_size"], torch.Generator())
    restore_state(network, tensors, f"train, seed={seed} in {store.storage}")
    channels, height, width = about["input_shape"]
    choice = layer_choice(network, store.experiment.decomposition, (channels, height, width))
    preparation = about.get("preparation", "")  # earlier versions resized no images
    return Base(choice.network, seed, (channels, height, width), choice, tuple(about["classes"]), preparation)


def _median_seed(store: RunStore) -> int:
    """Return the seed of the base network of median validation accuracy (of an even number, the lower middle one)."""
    networks = store.read_table("networks")
    wanted = store.experiment.training.seeds
    if len(networks) < wanted:
        raise MissingStageError(
            f"{len(networks)} of {wanted} base networks are stored in {store.storage}: run `gross train` on it first"
        )
    ordered = networks.sort_values(["val_accuracy", "seed"], kind="stable")
    return int(ordered["seed"].iloc[(len(ordered) - 1) // 2])
