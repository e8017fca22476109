"""Sampling of group-sizes while a supernet is trained (Eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from gross_ray.errors import InvalidValueError, is_whole
from gross_ray.space import Configuration, SearchSpace


def sampling_probabilities(num_group_sizes: int, alpha: float, *, scaling: str = "normalised") -> Tensor:
    """Return the probability of each group-size, smallest first: (num_group_sizes,) float64 (Eq. 8).

    "normalised", the default here and of the options, is proportional to exp(-alpha i / N). "index" is Eq. 8 as
    printed, proportional to exp(-alpha i): with alpha = 4 it almost never draws the larger sizes, which does not fit
    Figure 1. `alpha` = 0 is uniform in both. Raises InvalidValueError for a negative alpha, no group-size or another
    scaling.
    """
    if not is_whole(num_group_sizes, 1):
        raise InvalidValueError(f"num_group_sizes = {num_group_sizes}: must be 1 or more")
    if not 0 <= alpha < float("inf"):
        raise InvalidValueError(f"alpha = {alpha}: must be 0 (uniform) or more")
    if scaling not in ("index", "normalised"):
        raise InvalidValueError(f"scaling = {scaling!r}: must be 'index' or 'normalised'")
    place = torch.arange(1, num_group_sizes + 1, dtype=torch.float64)
    step = alpha if scaling == "index" else alpha / num_group_sizes
    return torch.softmax(-step * place, dim=0)


def settled_scaling(alpha: float, scaling: str) -> str:
    """Return the scaling under which a supernet is known: without temperature both are the same, and called "index"."""
    return scaling if alpha > 0 else "index"


class ConfigurationSampler:
    """Draws each layer's group-size independently by Eq. 8."""

    def __init__(self, space: SearchSpace, alpha: float, *, scaling: str = "normalised") -> None:
        """Prepare the probabilities of every layer of `space`."""
        self._choices = [
            (sizes, sampling_probabilities(len(sizes), alpha, scaling=scaling)) for sizes in space.group_sizes.values()
        ]

    def draw(self, generator: torch.Generator) -> Configuration:
        """Return one configuration."""
        return Configuration(
            [
                sizes[int(torch.multinomial(probabilities, 1, generator=generator))]
                for sizes, probabilities in self._choices
            ]
        )
