"""The random numbers of an epoch, all from its seed: the order, crops, configurations and dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gross_ray.data.augment import Augmentation, Crop, ResizedCrop
from gross_ray.data.image_set import ImageSet
from gross_ray.nn.precision import products_at
from gross_ray.seeds import derive_seed
from gross_ray.training.options import NONE, RESIZED_CROP, Schedule

Keep = Callable[[nn.Dropout, Tensor], Tensor]
"""Returns the factors by which a dropout multiplies its input: 0 or 1 / (1 - p)."""


AT_ONCE = 2**26
"""Bytes of images, with their margins, that are gathered and cropped together for several steps; cropping them takes
five times as much for a moment."""


class EpochDraws:
    """The random numbers of one epoch of one training, which depend on the epoch's seed alone."""

    def __init__(self, images: ImageSet, seed: int, schedule: Schedule, dropout: torch.Generator | None = None) -> None:
        """Draw the order and the crops of the whole epoch, so that no step waits for a copy to the device.

        Crops are drawn from the images with their margin, if they have one; without crops, their centres are used.

        `dropout`, a generator on the device, is reseeded and used; without it, one is created.
        """
        self.num_images = schedule.images_of(len(images))
        """Number of images in the epoch."""
        self.device = device = images.device
        self._images = images
        self.generator = torch.Generator().manual_seed(seed)
        """On the CPU; it drew the order and the crops, and draws the configurations next."""
        order = torch.randperm(len(images), generator=self.generator)[: self.num_images]
        self._order = order.to(images.images.device)
        self._augmentation = _augmentation(schedule.augment, images)
        self._crops: Tensor | None = None
        if self._augmentation is not None:
            self._crops = self._augmentation.draw(self.num_images, self.generator).to(device)
        self._dropout = torch.Generator(device) if dropout is None else dropout
        self._dropout.manual_seed(derive_seed(seed, "dropout"))
        self.global_seed = derive_seed(seed, "global")
        """The seed for torch's global generators."""

    def batches(self, size: int, *, at_once: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images (B, 3, H, W), uint8, and labels (B,) of each step, cropped and flipped if augmented.

        With `at_once`, as many images as AT_ONCE allows are gathered and cropped together.
        """
        many = size * (self._steps_at_once(size) if at_once else 1)
        several = self._images.batches(many, self._order, wider=self._augmentation is not None)
        for number, (inputs, labels) in enumerate(several):
            augmented = self._augmented(inputs, [self], slice(number * many, (number + 1) * many))
            yield from zip(augmented.split(size), labels.split(size), strict=True)

    def _steps_at_once(self, images: int) -> int:
        """Return how many steps of `images` images AT_ONCE allows, at least one."""
        return max(1, AT_ONCE // (images * self._images.stored[0].numel()))

    @staticmethod
    def batches_of_all(
        several: Sequence[EpochDraws], size: int, *, at_once: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the `batches` of several trainings, stacked: (S, B, 3, H, W) and (S, B).

        Images on the device are gathered and cropped for all trainings at once, with `at_once` for many steps too.
        """
        first = several[0]
        if first._images.streamed_to is not None or any(each._images is not first._images for each in several):
            for batches in zip(*(each.batches(size, at_once=at_once) for each in several), strict=True):
                yield torch.stack([inputs for inputs, _ in batches]), torch.stack([labels for _, labels in batches])
            return
        order = torch.stack([each._order for each in several])
        source = first._images.images if first._augmentation is None else first._images.stored
        many = size * (first._steps_at_once(size * len(several)) if at_once else 1)
        for start in range(0, order.shape[1], many):
            indices = order[:, start : start + many]
            inputs = first._augmented(source[indices.flatten()], several, slice(start, start + many))
            of_steps = inputs.unflatten(0, indices.shape).split(size, dim=1)
            yield from zip(of_steps, first._images.labels[indices].split(size, dim=1), strict=True)

    def _augmented(self, inputs: Tensor, several: Sequence[EpochDraws], part: slice) -> Tensor:
        """Return the images of a step, those of each training in `several` one after another, cropped if augmented."""
        if self._augmentation is None:
            return inputs
        crops = [each._crops[:, part] for each in several if each._crops is not None]
        with products_at("float32", inputs.device):  # images are the same at every precision of the training
            return self._augmentation(inputs, torch.cat(crops, dim=1))

    def keep(self, dropout: nn.Dropout, inputs: Tensor) -> Tensor:
        """Draw the factors of a dropout, in the shape of its `inputs` (a `Keep`)."""
        if dropout.p == 1:
            return torch.zeros_like(inputs)
        kept = torch.empty(inputs.shape, device=inputs.device).bernoulli_(1 - dropout.p, generator=self._dropout)
        return kept.div_(1 - dropout.p).to(inputs.dtype)


def _augmentation(name: str, images: ImageSet) -> Augmentation | None:
    """Return the augmentation of that name in AUGMENTATIONS for these images."""
    if name == NONE:
        return None
    kind = ResizedCrop if name == RESIZED_CROP else Crop
    return kind(images.stored.shape[2:], images.images.shape[2:])


@contextmanager
def dropout_by(network: nn.Module, keep: Keep) -> Iterator[None]:
    """Within the block, let each `nn.Dropout` of `network` use the factors of `keep` instead of torch's global state.

    Dropout of other kinds, and dropout called as a function, still draw from torch's global generators.
    """
    dropouts = [module for module in network.modules() if type(module) is nn.Dropout]
    before = [vars(dropout).get("forward") for dropout in dropouts]
    for dropout in dropouts:
        vars(dropout)["forward"] = _forward(dropout, keep)
    try:
        yield
    finally:
        for dropout, forward in zip(dropouts, before, strict=True):
            vars(dropout).pop("forward")
            if forward is not None:
                vars(dropout)["forward"] = forward


def _forward(dropout: nn.Dropout, keep: Keep) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        return inputs * keep(dropout, inputs) if dropout.training and dropout.p > 0 else inputs

    return forward
