"""Networks of a run, built again from what its stages stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gross_ray.decomposition.layers import LayerChoice, choice_of, parse_layer_group_sizes
from gross_ray.decomposition.surgery import empty_supernet, extract
from gross_ray.errors import MissingStageError
from gross_ray.experiment import DecompositionOptions
from gross_ray.models import build_model
from gross_ray.results.store import RunStore
from gross_ray.space import Configuration, SearchSpace
from gross_ray.training.loop import EpochRecord


@dataclass(frozen=True)
class Base:
    """The base network that is decomposed: the one of median validation accuracy."""

    network: nn.Module
    seed: int
    input_shape: tuple[int, int, int]
    choice: LayerChoice
    """What becomes of each convolution."""
    classes: tuple[str, ...]

    @cached_property
    def space(self) -> SearchSpace:
        """The space of its configurations."""
        return SearchSpace(self.choice.group_sizes)


def median_seed(store: RunStore) -> int:
    """Return the seed of the base network of median validation accuracy (the lower one of an even number).

    Raises MissingStageError unless all base networks are stored.
    """
    networks = store.read_table("networks")
    wanted = store.experiment.training.seeds
    if len(networks) < wanted:
        raise MissingStageError(
            f"{len(networks)} of {wanted} base networks are stored in {store.storage}: run `gross train` on it first"
        )
    ordered = networks.sort_values(["val_accuracy", "seed"], kind="stable")
    return int(ordered["seed"].iloc[(len(ordered) - 1) // 2])


def load_base(store: RunStore) -> Base:
    """Return the base network that is decomposed, on the CPU; raises MissingStageError before `train` is done."""
    seed = median_seed(store)
    tensors, about = store.load_checkpoint("train", f"seed={seed}")
    network = new_network(store, about["num_classes"], about["image_size"], torch.Generator())
    network.load_state_dict(tensors)
    channels, height, width = about["input_shape"]
    choice = layer_choice(network, store.experiment.decomposition, (channels, height, width))
    return Base(network, seed, (channels, height, width), choice, tuple(about["classes"]))


def layer_choice(network: nn.Module, options: DecompositionOptions, input_shape: Sequence[int]) -> LayerChoice:
    """Return what becomes of each convolution under an experiment's options; raises as `choice_of` does."""
    by_layer = parse_layer_group_sizes(options.layer_group_sizes)
    return choice_of(network, options.layers, options.group_sizes, by_layer, input_shape=input_shape)


def new_network(store: RunStore, num_classes: int, image_size: int, generator: torch.Generator) -> nn.Module:
    """Return a freshly initialised network of the experiment's kind."""
    return build_model(store.experiment.model, num_classes=num_classes, image_size=image_size, generator=generator)


def load_supernet(store: RunStore, stage: str, unit: str, base: Base | None = None) -> nn.Module:
    """Return the network that `stage` stored for `unit`, on the CPU, with a series in each decomposed layer."""
    base = base or load_base(store)
    tensors, about = store.load_checkpoint(stage, unit)
    supernet = empty_supernet(base.network, {name: tuple(sizes) for name, sizes in about["group_sizes"].items()})
    supernet.load_state_dict(tensors)
    return supernet


def save_supernet(store: RunStore, stage: str, unit: str, supernet: nn.Module, about: dict[str, Any]) -> None:
    """Store a network with a series in each decomposed layer, so that `load_supernet` can build it again."""
    sizes = {name: list(sizes) for name, sizes in SearchSpace.of(supernet).group_sizes.items()}
    tensors: dict[str, Tensor] = supernet.state_dict()
    store.save_checkpoint(stage, unit, tensors, {"group_sizes": sizes, **about})


def metrics(record: EpochRecord) -> dict[str, float]:
    """Return an epoch's numbers by name, without those that were not measured."""
    return {name: value for name, value in vars(record).items() if value is not None}


def history_rows(stage: str, unit: str, seed: int, records: list[EpochRecord]) -> list[dict[str, Any]]:
    """Return the rows of the `history` table for one training."""
    return [{"stage": stage, "unit": unit, "seed": seed, **vars(record)} for record in records]


def load_validated(store: RunStore, configuration: str, seed: int) -> tuple[nn.Module, Base]:
    """Return a validated configuration as a plain network on the CPU, and the network that it was decomposed from.

    Raises MissingStageError if it was not validated, naming those that were.
    """
    base = load_base(store)
    chosen = base.space.check(Configuration.parse(configuration))
    unit = f"{chosen},seed={seed}"
    whole = store.finished_units("validations")
    if unit not in whole or not store.has_checkpoint("validate", unit):
        there = ", ".join(sorted(whole - {unit})) or "none"
        raise MissingStageError(
            f"{unit} is not validated in {store.storage}; there are: {there}. Run `gross validate RUN --configuration "
            f"{chosen}` on it first"
        )
    return extract(load_supernet(store, "validate", unit, base), chosen), base
