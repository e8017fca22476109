"""The objective of the block term decomposition, and the moves that lower it, for many descents at once.

    J = ||W - sum_r T_r||^2 + ridge * sum_r ||T_r||^2,    ||W|| = 1,

over terms with orthonormal factors, so that a term's norm is its core's. All members of a batch have the same shape;
each has its own weight and start.

Legend of tensor suffixes: n member, r term, i input channel, o output channel, a input rank, b output rank,
k kernel position. A tensor (n, unknowns) of factor_in, factor_out and core, flattened, is called a vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gross_ray.btd.block_terms import BlockTerms, BTDStatus

GREEDY_ITERATIONS = 2
"""Orthogonal iterations for each term of the greedy start; more do not lower the final error."""
SMALLEST_BLOCK = 1e-3
"""Lower bound of a term's part in the scaling of the unknowns, as a fraction of the mean term's."""


class Factors(NamedTuple):
    """The unknowns of N descents; the rows of the factors are orthonormal within each term."""

    factor_in: Tensor
    """(n, r, a, i)"""
    factor_out: Tensor
    """(n, r, b, o); b = min(g, C_out)"""
    core: Tensor
    """(n, r, a k, b)"""

    def select(self, members: Tensor | slice) -> Factors:
        """Return the unknowns of the chosen members."""
        return Factors(*(part[members] for part in self))


class Point(NamedTuple):
    """Unknowns, and the quantities computed from them."""

    factors: Factors
    squared_error: Tensor
    """(n,): ||W - sum_r T_r||^2"""
    seen: Tensor
    """(n, r a, k o): the terms without their input factors"""
    rest: Tensor
    """(n, i, k o): the residual, the weight minus the terms"""

    def objective(self, ridge: Tensor) -> Tensor:
        """Return J, (n,)."""
        return self.squared_error + ridge * torch.linalg.vector_norm(self.factors.core, dim=(1, 2, 3)).square()

    def select(self, members: Tensor) -> Point:
        """Return the point of the chosen members."""
        return Point(self.factors.select(members), *(part[members] for part in self[1:]))


class Scaling(NamedTuple):
    """The Gram matrix of each term's derivatives, as inverse Cholesky factors: it gives all unknowns the same scale."""

    lower_in: Tensor
    """(n, r, a, a)"""
    lower_out: Tensor
    """(n, r, b, b)"""

    def select(self, members: Tensor) -> Scaling:
        """Return the scaling of the chosen members."""
        return Scaling(*(part[members] for part in self))


class TermFit:
    """The fit of terms of rank (g, min(g, C_out)) to weights of one shape."""

    def __init__(self, weights: Tensor, group_size: int, weight_of: Sequence[int]) -> None:
        """Take weights (L, C_out, C_in, kH, kW) of norm 1, and the index of each member's weight."""
        count, self.out_channels, self.in_channels, *kernel = weights.shape
        self.spatial = math.prod(kernel)
        self.rank_in = group_size
        self.rank_out = min(group_size, self.out_channels)
        self.groups = self.in_channels // group_size
        flat = weights.reshape(count, self.out_channels, self.in_channels, self.spatial)
        self._weights = flat.permute(0, 2, 3, 1).reshape(count, self.in_channels, -1).contiguous()
        self._shapes = (
            (self.groups, self.rank_in, self.in_channels),
            (self.groups, self.rank_out, self.out_channels),
            (self.groups, self.rank_in * self.spatial, self.rank_out),
        )
        self.unknowns = sum(map(math.prod, self._shapes))
        self._set_members(torch.tensor(weight_of, device=weights.device))

    def keep(self, members: Tensor) -> None:
        """Drop all members but the chosen ones."""
        self._set_members(self._weight_of[members])

    def _set_members(self, weight_of: Tensor) -> None:
        self._weight_of = weight_of
        shared = len(self._weights) == 1
        self._target_i_ko = self._weights.expand(len(weight_of), -1, -1) if shared else self._weights[weight_of]

    # Moves

    def evaluate(self, factors: Factors) -> Point:
        """Return the point at these unknowns."""
        members = len(factors.core)
        seen = _product(factors.core, factors.factor_out).view(members, self.in_channels, -1)
        rest = torch.baddbmm(self._target_i_ko, self._flat(factors.factor_in).mT, seen, alpha=-1)
        return Point(factors, torch.linalg.vector_norm(rest, dim=(1, 2)).square(), seen, rest)

    def gradient(self, point: Point, ridge: Tensor) -> Tensor:
        """Return the gradient of J / 2, a vector, along the directions that keep the factors orthonormal."""
        factors = point.factors
        seen_in = torch.bmm(self._flat(factors.factor_in), point.rest)
        seen_in = seen_in.view(len(seen_in), self.groups, -1, self.out_channels)
        along_in = torch.bmm(point.seen, point.rest.mT).neg_().view(factors.factor_in.shape)
        along_out = _product(factors.core.mT, seen_in).neg_()
        along_core = (ridge[:, None, None, None] * factors.core).sub_(_product(seen_in, factors.factor_out.mT))
        return self._tangent(factors, along_in, along_out, along_core)

    def ridge_gradient(self, point: Point) -> Tensor:
        """Return the vector that a ridge of 1 adds to `gradient`."""
        factor_in, factor_out, core = point.factors
        return self._vector(torch.zeros_like(factor_in), torch.zeros_like(factor_out), core)

    def scaling(self, point: Point) -> Scaling:
        """Return the scaling of the unknowns at a point.

        With orthonormal factors, the three parts of a term's derivative are orthogonal to each other, and the core's
        Gram matrix is the identity.
        """
        core = point.factors.core
        by_input = core.reshape(len(core), self.groups, self.rank_in, -1)
        gram_in, gram_out = _product(by_input, by_input.mT), _product(core.mT, core)
        least = SMALLEST_BLOCK * gram_in.diagonal(dim1=-1, dim2=-2).mean(dim=(-1, -2))
        least = least.clamp_min(torch.finfo(core.dtype).tiny ** 0.5)[:, None, None]
        for gram in (gram_in, gram_out):
            gram.diagonal(dim1=-1, dim2=-2).add_(least)
        return Scaling(_inverse_cholesky(gram_in), _inverse_cholesky(gram_out))

    def scaled(self, gradient: Tensor, scaling: Scaling) -> Tensor:
        """Return a gradient, a vector, in the coordinates in which a term's unknowns have the same scale."""
        along_in, along_out, along_core = self._parts(gradient)
        return self._vector(_product(scaling.lower_in, along_in), _product(scaling.lower_out, along_out), along_core)

    def direction(self, scaled: Tensor, scaling: Scaling, point: Point) -> Tensor:
        """Return the direction, a vector, that has the given scaled coordinates."""
        along_in, along_out, along_core = self._parts(scaled)
        return self._tangent(
            point.factors,
            _product(scaling.lower_in.mT, along_in),
            _product(scaling.lower_out.mT, along_out),
            along_core,
        )

    def move(self, point: Point, direction: Tensor, length: Tensor | None = None) -> Point:
        """Return the point after `length` (n,) times a direction, with the factors orthonormal again."""
        along_in, along_out, along_core = self._parts(direction if length is None else direction * length[:, None])
        factors = point.factors
        factor_in, factor_out = _retract(factors.factor_in, along_in), _retract(factors.factor_out, along_out)
        return self.evaluate(Factors(factor_in, factor_out, factors.core + along_core))

    # Starts

    def greedy_start(self, generators: Sequence[torch.Generator]) -> Factors:
        """Fit each term in turn to the residual of the earlier ones, by orthogonal iteration from random factors."""
        drawn = [
            [_random_orthonormal(shape, generator, self._weights) for shape in self._shapes[:2]]
            for generator in generators
        ]
        factor_in, factor_out = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        members = len(generators)
        core = factor_in.new_zeros(members, *self._shapes[2])
        rest = self._target_i_ko.clone()
        for term in range(self.groups):
            into, out = factor_in[:, term].mT, factor_out[:, term].mT
            for _ in range(GREEDY_ITERATIONS):
                seen_out = member_product(rest.view(members, -1, self.out_channels), out)
                seen_out = seen_out.view(members, self.in_channels, -1)
                into = torch.linalg.qr(member_product(seen_out, member_product(seen_out.mT, into)))[0]
                seen_in = member_product(into.mT, rest).view(members, -1, self.out_channels)
                out = torch.linalg.qr(member_product(seen_in.mT, member_product(seen_in, out)))[0]
            core[:, term] = member_product(member_product(into.mT, rest).view(members, -1, self.out_channels), out)
            factor_in[:, term], factor_out[:, term] = into.mT, out.mT
            rest = torch.baddbmm(rest, into, (core[:, term] @ out.mT).view(members, self.rank_in, -1), alpha=-1)
        return Factors(factor_in, factor_out, core)

    def random_start(self, generators: Sequence[torch.Generator]) -> Factors:
        """Divide a random orthonormal basis of the input channels among the terms; fit each term to its share."""
        square = (1, self.in_channels, self.in_channels)
        basis = torch.cat([_random_orthonormal(square, generator, self._weights) for generator in generators])
        return self._fit_to_basis(basis)

    def single_term(self) -> Factors:
        """Return the best single term (g = C_in): the leading output subspace (Eckart and Young)."""
        square = torch.eye(self.in_channels, dtype=self._weights.dtype, device=self._weights.device)
        return self._fit_to_basis(square.expand(len(self._weight_of), -1, -1))

    def _fit_to_basis(self, basis: Tensor) -> Factors:
        shares = torch.bmm(basis, self._target_i_ko).view(len(basis), self.groups, -1, self.out_channels)
        factor_out = torch.linalg.eigh(shares.mT @ shares)[1][..., -self.rank_out :].mT.contiguous()
        factor_in = basis.reshape(len(basis), *self._shapes[0]).contiguous()
        return Factors(factor_in, factor_out, shares @ factor_out.mT)

    def from_terms(self, terms: BlockTerms, norm: float) -> Factors:
        """Return one member's unknowns for the terms of a weight of norm `norm`, at this group-size."""
        factor_in, upper_in = torch.linalg.qr(terms.factor_in)
        factor_out, upper_out = torch.linalg.qr(terms.factor_out)
        core = torch.einsum("rxa,rabk,ryb->rxky", upper_in, terms.core.flatten(3) / norm, upper_out)
        parts = (factor_in.mT, factor_out.mT, core.flatten(1, 2))
        return Factors(*(part.to(self._weights).contiguous()[None] for part in parts))

    def terms(self, factors: Factors, norm: float, steps: int, status: BTDStatus, kernel: Sequence[int]) -> BlockTerms:
        """Return one member's unknowns as block terms of a weight of norm `norm`; computes their figures."""
        core = factors.core[0].unflatten(1, (self.rank_in, self.spatial)).transpose(2, 3)
        full = core.new_zeros(self.groups, self.rank_in, self.rank_in, self.spatial)
        full[:, :, : self.rank_out] = core * norm
        factor_out = core.new_zeros(self.groups, self.out_channels, self.rank_in)
        factor_out[:, :, : self.rank_out] = factors.factor_out[0].mT
        return BlockTerms(
            core=full.unflatten(3, tuple(kernel)),
            factor_in=factors.factor_in[0].mT.contiguous(),
            factor_out=factor_out,
            relative_error=float(self.evaluate(factors).rest.norm()),
            cancellation=float(factors.core.norm()),
            steps=steps,
            status=status,
        )

    # Layout

    def _flat(self, factor_in: Tensor) -> Tensor:
        return factor_in.view(len(factor_in), self.in_channels, self.in_channels)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's parts, contiguous: the bits of a product depend on its factors' memory layout."""
        sizes = [math.prod(shape) for shape in self._shapes]
        return [
            part.contiguous().view(len(vector), *shape)
            for part, shape in zip(vector.split(sizes, 1), self._shapes, strict=True)
        ]

    def _vector(self, along_in: Tensor, along_out: Tensor, along_core: Tensor) -> Tensor:
        return torch.cat([along_in.flatten(1), along_out.flatten(1), along_core.flatten(1)], dim=1)

    def _tangent(self, factors: Factors, along_in: Tensor, along_out: Tensor, along_core: Tensor) -> Tensor:
        """Return a vector without the part that only rotates the factors within the spaces they span."""
        factor_in, factor_out = factors.factor_in, factors.factor_out
        return self._vector(
            along_in - _product(_product(along_in, factor_in.mT), factor_in),
            along_out - _product(_product(along_out, factor_out.mT), factor_out),
            along_core,
        )


def orthonormalised(factors: Factors) -> Factors:
    """Return the same terms with factors that are orthonormal to the precision of their dtype."""
    factor_in, upper_in = torch.linalg.qr(factors.factor_in.mT)
    factor_out, upper_out = torch.linalg.qr(factors.factor_out.mT)
    core = factors.core.unflatten(2, (factor_in.shape[-1], -1))
    core = torch.einsum("nrxa,nrakb,nryb->nrxky", upper_in, core, upper_out)
    return Factors(factor_in.mT.contiguous(), factor_out.mT.contiguous(), core.flatten(2, 3))


def member_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right for each member, (n, p, q) and (n, q, s), with the same bits for any number of members.

    For a single member, torch multiplies a matrix by one row or column with another routine, which rounds differently;
    so a single row or column is doubled first.
    """
    row, column = left.shape[1] == 1, right.shape[2] == 1
    left = left.expand(-1, 2, -1) if row else left
    right = right.expand(-1, -1, 2) if column else right
    product = torch.bmm(left, right)
    return product[:, : 1 if row else None, : 1 if column else None]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right for each member and term; faster than `matmul`, which would expand and copy first."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _inverse_cholesky(gram: Tensor) -> Tensor:
    lower = torch.linalg.cholesky_ex(gram).L
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False)


def _retract(factor: Tensor, along: Tensor) -> Tensor:
    """Return orthonormal rows that span the same space as factor + along; `along` is orthogonal to `factor`."""
    gram = _product(along, along.mT)
    gram.diagonal(dim1=-1, dim2=-2).add_(1)
    return _product(_inverse_cholesky(gram), factor + along)


def _random_orthonormal(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Return random orthonormal rows of this shape, in the dtype and on the device of `like`."""
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn.mT)[0].mT.to(like).contiguous()
