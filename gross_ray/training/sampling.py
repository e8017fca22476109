"""Sampling of group-sizes during the training of a supernet (Eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from gross_ray.errors import InvalidValueError, is_whole
from gross_ray.space import Configuration, SearchSpace
from gross_ray.training.options import SCALINGS


def sampling_probabilities(num_group_sizes: int, alpha: float, *, scaling: str = "normalised") -> Tensor:
    """Return the probability of each group-size, smallest first: (num_group_sizes,) float64 (Eq. 8).

    "normalised" is proportional to exp(-alpha i / N). "index" is Eq. 8 as printed, proportional to exp(-alpha i): with
    alpha = 4 it almost never draws the larger sizes, which does not fit Figure 1. `alpha` = 0 is uniform in both.
    Raises InvalidValueError for a negative alpha, no group-size or another scaling.
    """
    if not is_whole(num_group_sizes, 1):
        raise InvalidValueError(f"num_group_sizes = {num_group_sizes}: must be 1 or more")
    if not 0 <= alpha < float("inf"):
        raise InvalidValueError(f"alpha = {alpha}: must be 0 (uniform) or more")
    if scaling not in SCALINGS:
        raise InvalidValueError(f"scaling = {scaling!r}: must be one of {', '.join(SCALINGS)}")
    index = torch.arange(1, num_group_sizes + 1, dtype=torch.float64)
    step = alpha if scaling == "index" else alpha / num_group_sizes
    return torch.softmax(-step * index, dim=0)


def settled_scaling(alpha: float, scaling: str) -> str:
    """Return the scaling to store for a supernet: "index" if alpha is 0, where both scalings are equal."""
    return scaling if alpha > 0 else "index"


class ConfigurationSampler:
    """Draws each layer's group-size independently by Eq. 8."""

    def __init__(self, space: SearchSpace, alpha: float, *, scaling: str = "normalised") -> None:
        self._choices = [
            (sizes, sampling_probabilities(len(sizes), alpha, scaling=scaling)) for sizes in space.group_sizes.values()
        ]

    def draw(self, generator: torch.Generator) -> Configuration:
        """Draw one configuration."""
        draws = [int(torch.multinomial(probabilities, 1, generator=generator)) for _, probabilities in self._choices]
        return Configuration([sizes[index] for (sizes, _), index in zip(self._choices, draws, strict=True)])
