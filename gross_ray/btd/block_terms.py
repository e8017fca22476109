"""The result of a block term decomposition: a weight as a sum of low-rank terms (Eq. 1 to 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.errors import InvalidValueError


class BTDStatus(StrEnum):
    """Why a decomposition stopped."""

    CONVERGED = "converged"
    """The last steps lowered sqrt(J) by less than the tolerance each, on average."""
    MAX_STEPS = "max_steps"
    """The step limit came first; raise `max_steps` or `tolerance`."""
    ZERO_WEIGHT = "zero_weight"
    """The weight is zero everywhere, so the terms are zero too."""


@dataclass(frozen=True)
class BlockTerms:
    """A weight as a sum of R terms of rank (g, g): T_r = core_r x1 factor_in_r x2 factor_out_r (Eq. 3)."""

    core: Tensor
    """(R, g, g, kH, kW), input rank before output rank; float64."""
    factor_in: Tensor
    """(R, C_in, g)."""
    factor_out: Tensor
    """(R, C_out, g)."""
    relative_error: float
    """||W - sum of terms|| / ||W|| (Frobenius), section 4.2."""
    cancellation: float
    """sqrt(sum over terms of ||T_r||^2) / ||W||: at most 1 for orthogonal terms, large for degenerate ones."""
    steps: int
    """Number of descent steps; 0 for a single term, which has a closed form."""
    status: BTDStatus
    """Why the decomposition stopped."""

    def __post_init__(self) -> None:
        groups, rank_in, rank_out = self.core.shape[:3]
        in_shape, out_shape = tuple(self.factor_in.shape), tuple(self.factor_out.shape)
        fits_in = rank_in == rank_out and in_shape == (groups, groups * rank_in, rank_in)
        if not fits_in or (out_shape[0], out_shape[2]) != (groups, rank_out):
            raise InvalidValueError(
                f"block terms of shapes core {tuple(self.core.shape)}, factor_in {in_shape}, factor_out {out_shape}: "
                "must be (R, g, g, kH, kW), (R, R g, g) and (R, C_out, g)"
            )

    @property
    def group_size(self) -> int:
        """Rank g of each term in both channel modes."""
        return self.core.shape[1]

    @property
    def groups(self) -> int:
        """Number of terms R."""
        return self.core.shape[0]

    def reconstruct(self) -> Tensor:
        """Return the sum of the terms, (C_out, C_in, kH, kW)."""
        return torch.einsum("rabhw,ria,rob->oihw", self.core, self.factor_in, self.factor_out)

    def to_bottleneck(self) -> Bottleneck:
        """Return the bottleneck that equals the sum of the terms (Table 1).

        Each term contributes with equal Frobenius norms to the three convolutions, so that one learning rate suits
        them all.
        """
        groups, group_size, _, *kernel = self.core.shape
        channels = groups * group_size
        norms = [
            weight.flatten(1).norm(dim=1).clamp_min(1e-30) for weight in (self.factor_in, self.core, self.factor_out)
        ]
        even = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
        # A zero term keeps its factors.
        scale_in, scale_core, scale_out = (torch.where(even > 1e-20, even / norm, 1.0) for norm in norms)
        factor_in = self.factor_in * scale_in[:, None, None]
        core = self.core * scale_core[:, None, None, None, None]
        factor_out = self.factor_out * scale_out[:, None, None]
        return Bottleneck(
            pointwise_in=factor_in.transpose(1, 2).reshape(channels, channels, 1, 1),
            grouped=core.transpose(1, 2).reshape(channels, group_size, *kernel),
            pointwise_out=factor_out.transpose(0, 1).reshape(-1, channels, 1, 1),
        )

    def expand(self, target_group_size: int) -> BlockTerms:
        """Return terms of a larger group-size and the same sum: neighbours merge, cores on a diagonal (Psi, Eq. 5)."""
        if target_group_size % self.group_size or (self.groups * self.group_size) % target_group_size:
            raise InvalidValueError(
                f"target_group_size (={target_group_size}) must be a multiple of the group-size (={self.group_size}) "
                f"and divide C_in (={self.groups * self.group_size})"
            )
        merged = target_group_size // self.group_size
        groups = self.groups // merged
        core = self.core.reshape(groups, merged, *self.core.shape[1:])
        grid = torch.diag_embed(core.movedim(1, -1), dim1=1, dim2=3)

        def side_by_side(factor: Tensor) -> Tensor:
            blocks = factor.reshape(groups, merged, *factor.shape[1:]).transpose(1, 2)
            return blocks.reshape(groups, factor.shape[1], target_group_size)

        core = grid.reshape(groups, target_group_size, target_group_size, *self.core.shape[3:])
        factor_in, factor_out = side_by_side(self.factor_in), side_by_side(self.factor_out)
        norm = _term_norms(core, factor_in, factor_out).square().sum().sqrt()
        before = _term_norms(self.core, self.factor_in, self.factor_out).square().sum().sqrt()
        cancellation = self.cancellation * (float(norm / before) if before > 0 else 1.0)
        return replace(self, core=core, factor_in=factor_in, factor_out=factor_out, cancellation=cancellation)


def zero_terms(weight: Tensor, group_size: int) -> BlockTerms:
    """Return the decomposition of a weight (C_out, C_in, kH, kW) that is zero everywhere."""
    out_channels, in_channels, *kernel = weight.shape
    groups = in_channels // group_size
    return BlockTerms(
        core=weight.new_zeros(groups, group_size, group_size, *kernel),
        factor_in=weight.new_zeros(groups, in_channels, group_size),
        factor_out=weight.new_zeros(groups, out_channels, group_size),
        relative_error=0.0,
        cancellation=0.0,
        steps=0,
        status=BTDStatus.ZERO_WEIGHT,
    )


def _term_norms(core: Tensor, factor_in: Tensor, factor_out: Tensor) -> Tensor:
    """Return ||T_r|| of each term, (R,), for any factors, orthonormal or not."""
    upper_in, upper_out = torch.linalg.qr(factor_in)[1], torch.linalg.qr(factor_out)[1]
    return torch.einsum("rxa,rabhw,ryb->rxyhw", upper_in, core, upper_out).flatten(1).norm(dim=1)
