"""What an epoch draws at random: the order, the crops, the configurations and dropout, all from the epoch's seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gross_ray.data.augment import cropped_and_flipped, draw_crops
from gross_ray.data.image_set import ImageSet
from gross_ray.seeds import derive_seed
from gross_ray.training.options import Schedule

Keep = Callable[[nn.Dropout, Tensor], Tensor]
"""Gives the factors by which a dropout multiplies its input: zeros, and 1 / (1 - p)."""


class EpochDraws:
    """The random numbers of one epoch of one training: they depend on its seed, not on what else is drawn."""

    def __init__(self, images: ImageSet, seed: int, schedule: Schedule, dropout: torch.Generator | None = None) -> None:
        """Draw the order and the crops of the whole epoch, so that no step waits for a copy to the device.

        `dropout`, a generator on the device, is seeded anew and drawn from; without it one is made.
        """
        self.num_images = schedule.images_of(len(images))
        """How many images the epoch takes."""
        self.device = device = images.device
        self._images = images
        self.generator = torch.Generator().manual_seed(seed)
        """On the CPU; behind the order and the crops, it draws the configurations."""
        order = torch.randperm(len(images), generator=self.generator)[: self.num_images]
        self._order = order.to(images.images.device)
        self._crops = draw_crops(self.num_images, self.generator).to(device) if schedule.augment else None
        self._dropout = torch.Generator(device) if dropout is None else dropout
        self._dropout.manual_seed(derive_seed(seed, "dropout"))
        self.global_seed = derive_seed(seed, "global")
        """For what draws from torch's global generators."""

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images (B, 3, H, W), uint8, and labels (B,) of each step, cropped and flipped if so asked."""
        for number, (inputs, labels) in enumerate(self._images.batches(size, self._order)):
            if self._crops is not None:
                inputs = cropped_and_flipped(inputs, self._crops[:, number * size : (number + 1) * size])
            yield inputs, labels

    @staticmethod
    def batches_of_all(several: Sequence[EpochDraws], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what `batches` of each would, stacked: (S, B, 3, H, W) and (S, B).

        Images that reside on the device are gathered and cropped for all of them at once.
        """
        first = several[0]
        if first._images.streamed_to is not None or any(each._images is not first._images for each in several):
            for batches in zip(*(each.batches(size) for each in several), strict=True):
                yield torch.stack([inputs for inputs, _ in batches]), torch.stack([labels for _, labels in batches])
            return
        order = torch.stack([each._order for each in several])
        for start in range(0, order.shape[1], size):
            places = order[:, start : start + size]
            inputs = first._images.images[places.flatten()]
            if first._crops is not None:
                crops = [each._crops[:, start : start + size] for each in several if each._crops is not None]
                inputs = cropped_and_flipped(inputs, torch.cat(crops, dim=1))
            yield inputs.unflatten(0, places.shape), first._images.labels[places]

    def keep(self, dropout: nn.Dropout, inputs: Tensor) -> Tensor:
        """Draw what a dropout keeps of `inputs`, of their shape (a `Keep`)."""
        if dropout.p == 1:
            return torch.zeros_like(inputs)
        kept = torch.empty(inputs.shape, device=inputs.device).bernoulli_(1 - dropout.p, generator=self._dropout)
        return kept.div_(1 - dropout.p).to(inputs.dtype)


@contextmanager
def dropout_by(network: nn.Module, keep: Keep) -> Iterator[None]:
    """Let the `nn.Dropout`s of `network` ask `keep` while the block runs; by themselves they draw what no seed decides.

    Dropout of other kinds, and dropout called as a function, draw from torch's global generators as ever.
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
