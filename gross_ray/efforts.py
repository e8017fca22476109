"""How much a compression spends: named numbers of epochs and evaluations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is spent: epochs of each training, evaluations of the search, configurations trained at the end."""

    training: int
    """Epochs of a base network without weights."""
    reconstruction: int
    """Epochs of the supernet's response reconstruction."""
    finetuning: int
    """Epochs of the supernet's fine-tuning."""
    own_reconstruction: int
    """Epochs of a selected configuration's response reconstruction."""
    own_finetuning: int
    """Epochs of a selected configuration's fine-tuning."""
    images: int
    """Most training images in an epoch; 0: all."""
    evaluations: int
    """Configurations that the search evaluates, if it does not evaluate all."""
    top: int
    """Configurations that are trained on their own."""


EFFORTS = {
    "quick": Effort(
        training=5,
        reconstruction=1,
        finetuning=2,
        own_reconstruction=1,
        own_finetuning=1,
        images=12_800,
        evaluations=100,
        top=2,
    ),
    "normal": Effort(
        training=30,
        reconstruction=1,
        finetuning=6,
        own_reconstruction=1,
        own_finetuning=4,
        images=0,
        evaluations=300,
        top=3,
    ),
    "long": Effort(
        training=100,
        reconstruction=3,
        finetuning=30,
        own_reconstruction=2,
        own_finetuning=12,
        images=0,
        evaluations=1000,
        top=5,
    ),
}
