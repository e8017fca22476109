"""The experiment that compresses a network within budgets, with defaults that fit the network and its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from gross_ray.data.image_set import ImageSet
from gross_ray.data.options import DataOptions
from gross_ray.efforts import EFFORTS
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Experiment
from gross_ray.fields import require
from gross_ray.search.options import SearchOptions
from gross_ray.space import DENSE, SearchSpace
from gross_ray.supernet.layers import NOT_PAYING, LayerChoice, choice_of
from gross_ray.supernet.options import DecompositionOptions
from gross_ray.training.loop import accuracy
from gross_ray.training.options import (
    CROP,
    NONE,
    FinetuningOptions,
    ReconstructionOptions,
    Schedule,
    SupernetOptions,
    SweepOptions,
    TrainingOptions,
    ValidationOptions,
)

GROUP_SIZES = (1, 4, 16)
"""Group-sizes that a layer may take, beside staying dense; those that need no fewer MACs or parameters are left out."""
MOST_EXHAUSTIVE = 1000
"""A space of at most this many configurations is searched whole; a larger one by the strategy `surrogate`."""
LARGEST_BATCH, SMALLEST_BATCH = 128, 16
MIRRORED = 0.05
"""By how much the accuracy on mirrored images may be lower for trainings to mirror them."""
BY_CHANCE = 1.5
"""A network of n classes whose accuracy is at most this many nths tells nothing about mirrored images."""
LEAST_STEPS = 50
"""Steps that an epoch should have: with fewer images, batches are smaller."""


def compression_experiment(
    network: nn.Module,
    input_shape: Sequence[int],
    *,
    budgets: Sequence[str],
    num_images: int,
    model: str = "four-conv",
    data: DataOptions = DataOptions(),  # noqa: B008 (frozen)
    weights: str = "",
    adapt: int = 0,
    effort: str = "normal",
    epochs: int = 0,
    augment: str = CROP,
) -> Experiment:
    """Return the experiment that compresses `network` within `budgets`; `input_shape` is (C, H, W).

    `model`, `weights` and `data` are the names of the network and the images, for a run folder. All `budgets`, like
    "macs=40%", hold at once. `num_images` is the size of the training split. With `adapt`, weights are first trained on
    for that many epochs. `epochs` replaces the effort's epochs of the supernet's fine-tuning, and changes those of a
    configuration in proportion. `augment`, one of AUGMENTATIONS, is that of every training. Learning rates are left
    open: a range test finds each before its training. Raises InvalidValueError for an unknown effort, `adapt` without
    weights, no budget, or as `choice_of`.
    """
    require(effort in EFFORTS, "effort", effort, f"must be one of {', '.join(EFFORTS)}")
    if not budgets:
        raise InvalidValueError("no budget: name one or more, like macs=40% or latency_ms=60%")
    if adapt and not weights:
        raise InvalidValueError(f"adapt = {adapt}: trains given weights on; name weights, or leave it out")
    spent = EFFORTS[effort]
    finetuning = epochs or spent.finetuning
    own = max(1, round(finetuning * spent.own_finetuning / spent.finetuning))
    images = spent.images if spent.images < num_images else 0
    decomposition, space = _choices(network, input_shape)
    whole = space.size <= MOST_EXHAUSTIVE
    schedule = partial(_schedule, images=images, batch_size=_batch_size(images or num_images), augment=augment)
    return Experiment(
        name="compress",
        model=model,
        weights=weights,
        data=data,
        training=_training(schedule, bool(weights), adapt, spent.training),
        decomposition=decomposition,
        supernet=SupernetOptions(seeds=1),
        reconstruction=ReconstructionOptions(**schedule(spent.reconstruction)),
        finetuning=FinetuningOptions(**schedule(finetuning)),
        search=SearchOptions(
            budgets=(),
            limits=(",".join(budgets),),
            top=spent.top,
            strategy="exhaustive" if whole else "surrogate",
            evaluations=0 if whole else spent.evaluations,
        ),
        sweep=SweepOptions(alphas=()),
        validation=ValidationOptions(
            fixed=(),
            seeds=1,
            reconstruction=Schedule(**schedule(spent.own_reconstruction)),
            finetuning=Schedule(**schedule(own)),
        ),
    )


def _training(schedule: Callable[[int], dict[str, Any]], given: bool, adapt: int, epochs: int) -> TrainingOptions:
    """Return the training of the base network: of new weights, or of given ones that are trained on or not at all."""
    if given and not adapt:
        return TrainingOptions(seeds=1)
    return TrainingOptions(seeds=1, start="weights" if adapt else "new", **schedule(adapt or epochs))


def mirrored_alike(network: nn.Module, images: ImageSet) -> bool:
    """Return whether a trained network classifies mirrored images about as well, so that trainings may mirror them.

    A mirrored digit or letter may be of another class, or of none. About as well means within MIRRORED points of
    accuracy; for a network that is no better than chance, the answer is yes.
    """
    plain = accuracy(network, images)
    if plain <= BY_CHANCE / len(images.labels.unique()):
        return True
    return accuracy(network, _Mirrored(**vars(images))) >= plain - MIRRORED


class _Mirrored(ImageSet):
    """The same images, mirrored batch by batch."""

    def as_inputs(self, images: Tensor) -> Tensor:
        return super().as_inputs(images.flip(3))


def augmentation_for(network: nn.Module, images: ImageSet) -> str:
    """Return the augmentation for short trainings of a trained network: crop, or none if images must not be mirrored.

    Both augmentations with crops also mirror images. Resized crops would need longer trainings.
    """
    return CROP if mirrored_alike(network, images) else NONE


def _schedule(epochs: int, *, images: int, batch_size: int, augment: str) -> dict[str, Any]:
    """Return the fields of a schedule: the rate is open, and falls after 60 and 85 % of the epochs."""
    late = tuple(sorted({round(epochs * share) for share in (0.6, 0.85)} - {0, epochs}))
    return {
        "epochs": epochs,
        "lr": 0.0,
        "milestones": late,
        "batch_size": batch_size,
        "images": images,
        "augment": augment,
    }


def _choices(network: nn.Module, input_shape: Sequence[int]) -> tuple[DecompositionOptions, SearchSpace]:
    """Return the options that give each layer the GROUP_SIZES that pay, and dense; and the space."""
    paying = choice_of(network, keep_dense=True, input_shape=input_shape)
    sizes = {layer: tuple(size for size in GROUP_SIZES if size in each) for layer, each in paying.group_sizes.items()}
    layers = [layer for layer, each in sizes.items() if each]
    dividing = {layer: tuple(s for s in GROUP_SIZES if paying.convs[layer].in_channels % s == 0) for layer in layers}
    own = [f"{layer}={','.join(map(str, sizes[layer]))}" for layer in layers if sizes[layer] != dividing[layer]]
    options = DecompositionOptions(
        tolerance=1e-4,
        layers=tuple(layers) if len(layers) < len(_all(paying)) else (),
        group_sizes=GROUP_SIZES,
        layer_group_sizes=tuple(own),
        keep_dense=True,
    )
    return options, SearchSpace({layer: (*sizes[layer], DENSE) for layer in layers})


def _all(choice: LayerChoice) -> list[str]:
    """Return the layers that GROUP_SIZES would decompose if nothing else were named."""
    unpaid = [layer for layer, why in choice.left_alone.items() if why == NOT_PAYING]
    return [*choice.group_sizes, *unpaid]


def _batch_size(num_images: int) -> int:
    """Return the images of a batch: fewer for small datasets, and never such that one is left for the last batch."""
    size = LARGEST_BATCH
    while size > SMALLEST_BATCH and num_images < LEAST_STEPS * size:
        size //= 2
    while size > 2 and num_images % size == 1:
        size -= 1
    return size
