"""Block term decomposition of a convolution's weight (Eq. 1 to 3), by joint alternating least squares.

Each step solves exactly, one after the other, for all input factors, all output factors and all cores of

    J = ||W - sum_r T_r||^2 + ridge * sum_r ||T_r||^2,

so J never rises. The ridge keeps the terms from growing against each other (docs/method.md has the figures).

Legend of tensor suffixes: r term, i input channel, o output channel, a input rank, b output rank, k kernel place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from gross_ray.decomposition.bottleneck import Bottleneck
from gross_ray.errors import InvalidValueError

EXACT_CORE_UNKNOWNS = 512
"""Cores of at most this many unknowns are solved exactly, larger ones by conjugate gradients."""
CORE_CG_STEPS = 12
"""Conjugate gradient iterations a step; each lowers J, so that few suffice from the last step's cores."""
GREEDY_ITERATIONS = 8
"""Orthogonal iterations for each term of the greedy start."""


class BTDStatus(StrEnum):
    """Why a decomposition ended."""

    CONVERGED = "converged"
    """A step lowered the error by less than the tolerance."""
    MAX_STEPS = "max_steps"
    """The steps ran out first; raise `max_steps` or `tolerance`."""
    ZERO_WEIGHT = "zero_weight"
    """The weight is zero everywhere, and so are the terms."""


@dataclass(frozen=True, kw_only=True)
class BTDOptions:
    """How a block term decomposition is computed."""

    tolerance: float = 1e-6
    """Stop when a step lowers sqrt(J) / ||W|| by less (the relative error, where ridge is 0)."""
    max_steps: int = 500_000
    """Stop after so many steps."""
    restarts: int = 1
    """How many starts are tried; the first is `init`, the others are random, the lowest J wins."""
    ridge: float = 1e-2
    """Weight of the terms' squared norms in J; 0.0: unconstrained (and often degenerate). Unused for a single term."""
    init: str = "greedy"
    """"greedy": each term fits what the earlier ones leave; "random": random orthonormal factors."""

    def __post_init__(self) -> None:
        rules = (
            (self.tolerance >= 0, "tolerance", "must be 0 or more"),
            (self.max_steps >= 1, "max_steps", "must be 1 or more"),
            (self.restarts >= 1, "restarts", "must be 1 or more"),
            (self.ridge >= 0, "ridge", "must be 0.0 (none) or more"),
            (self.init in ("greedy", "random"), "init", "must be 'greedy' or 'random'"),
        )
        for holds, name, rule in rules:
            if not holds:
                raise InvalidValueError(f"{name} = {getattr(self, name)!r}: {rule}")


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
    """Steps of alternating least squares taken."""
    status: BTDStatus
    """Why it ended."""

    def __post_init__(self) -> None:
        groups, rank_in, rank_out = self.core.shape[:3]
        in_shape, out_shape = tuple(self.factor_in.shape), tuple(self.factor_out.shape)
        lawful = rank_in == rank_out and in_shape == (groups, groups * rank_in, rank_in)
        if not lawful or (out_shape[0], out_shape[2]) != (groups, rank_out):
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

        The scale of each term is spread evenly over the three convolutions (equal Frobenius norms), so that one
        learning rate suits them all.
        """
        groups, group_size, _, *kernel = self.core.shape
        channels = groups * group_size
        norms = [
            weight.flatten(1).norm(dim=1).clamp_min(1e-30) for weight in (self.factor_in, self.core, self.factor_out)
        ]
        even = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
        scale_in, scale_core, scale_out = (
            torch.where(even > 1e-20, even / norm, 1.0) for norm in norms
        )  # a term that is zero keeps its factors
        factor_in, core, factor_out = (
            self.factor_in * scale_in[:, None, None],
            self.core * scale_core[:, None, None, None, None],
            self.factor_out * scale_out[:, None, None],
        )
        return Bottleneck(
            pointwise_in=factor_in.transpose(1, 2).reshape(channels, channels, 1, 1),
            grouped=core.transpose(1, 2).reshape(channels, group_size, *kernel),
            pointwise_out=factor_out.transpose(0, 1).reshape(-1, channels, 1, 1),
        )

    def expand(self, target_group_size: int) -> BlockTerms:
        """Return the equal terms of a larger group-size: neighbours merged, their cores on a diagonal (Psi, Eq. 5)."""
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
        norms = _term_norms(core, side_by_side(self.factor_in), side_by_side(self.factor_out))
        ours = _term_norms(self.core, self.factor_in, self.factor_out).square().sum().sqrt()
        ratio = float(norms.square().sum().sqrt() / ours) if ours > 0 else 1.0
        return replace(
            self,
            core=core,
            factor_in=side_by_side(self.factor_in),
            factor_out=side_by_side(self.factor_out),
            cancellation=self.cancellation * ratio,
        )


def block_term_decomposition(
    weight: Tensor,
    group_size: int,
    *,
    options: BTDOptions = BTDOptions(),  # noqa: B008 (frozen)
    start: BlockTerms | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> BlockTerms:
    """Decompose a convolution's weight into C_in / g block terms of rank (g, g) (Eq. 3, section 4.2).

    `weight` is (C_out, C_in, kH, kW), of a convolution with groups=1; the work is done in float64 on its device.
    `start` replaces the first start; its group-size must divide `group_size`. `on_step` is called with each step's
    number and sqrt(J) / ||W||. Raises InvalidValueError for a group-size that does not divide C_in, a weight of
    another rank or one that is not finite.
    """
    _check(weight, group_size, start)
    target = weight.detach().to(torch.float64)
    norm = float(target.norm())
    if norm == 0:
        return _zero_terms(target, group_size)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, _Terms, int, BTDStatus] | None = None
    for attempt in range(options.restarts):
        terms = _Terms(target / norm, group_size, ridge=options.ridge)
        if attempt == 0 and start is not None:
            terms.begin_from(start, norm)
        elif attempt == 0 and options.init == "greedy":
            terms.begin_greedily(generator)
        else:
            terms.begin_randomly(generator)
        objective, steps, status = _descend(terms, options, on_step)
        if best is None or objective < best[0]:
            best = (objective, terms, steps, status)
    assert best is not None
    return best[1].result(weight.shape, norm, best[2], best[3])


def _check(weight: Tensor, group_size: int, start: BlockTerms | None) -> None:
    if weight.ndim != 4:
        raise InvalidValueError(f"weight of shape {tuple(weight.shape)}: must be (C_out, C_in, kH, kW)")
    out_channels, in_channels, *kernel = weight.shape
    if group_size < 1 or in_channels % group_size:
        raise InvalidValueError(f"group_size (={group_size}) must divide in_channels (={in_channels})")
    if not torch.isfinite(weight).all():
        raise InvalidValueError(f"weight of shape {tuple(weight.shape)} holds NaN or infinity; train the network again")
    if start is None:
        return
    shape = (start.factor_out.shape[1], start.factor_in.shape[1], *start.core.shape[3:])
    if group_size % start.group_size or shape != tuple(weight.shape):
        raise InvalidValueError(
            f"start of group-size {start.group_size} for a weight of shape {shape}: must be for {tuple(weight.shape)} "
            f"and of a group-size that divides {group_size}"
        )


def _descend(
    terms: _Terms, options: BTDOptions, on_step: Callable[[int, float], None] | None
) -> tuple[float, int, BTDStatus]:
    previous = terms.objective()
    for step in range(1, options.max_steps + 1):
        terms.step()
        objective = terms.objective()
        if on_step is not None:
            on_step(step, objective)
        if previous - objective < options.tolerance:
            return objective, step, BTDStatus.CONVERGED
        previous = objective
    return previous, options.max_steps, BTDStatus.MAX_STEPS


class _Terms:
    """Cores and factors of one descent; the factors are orthonormal between steps.

    The output rank is min(g, C_out) in here; `result` fills up with zeros.
    """

    def __init__(self, weight: Tensor, group_size: int, *, ridge: float) -> None:
        self.out_channels, self.in_channels = weight.shape[:2]
        self.spatial = weight.shape[2] * weight.shape[3]
        self.target_oik = weight.reshape(self.out_channels, self.in_channels, self.spatial)
        self.target_i_ok = self.target_oik.transpose(0, 1).reshape(self.in_channels, -1).contiguous()
        self.target_o_ik = self.target_oik.reshape(self.out_channels, -1)
        self.rank_in = group_size
        self.rank_out = min(group_size, self.out_channels)
        self.groups = self.in_channels // group_size
        # One term cannot be played off against another, so that the ridge would only shrink it.
        self.ridge = ridge if self.groups > 1 else 0.0
        self.factor_in = weight.new_zeros(self.groups, self.in_channels, self.rank_in)
        self.factor_out = weight.new_zeros(self.groups, self.out_channels, self.rank_out)
        self.core = weight.new_zeros(self.groups, self.rank_in, self.rank_out, self.spatial)

    def begin_from(self, start: BlockTerms, norm: float) -> None:
        expanded = start.expand(self.rank_in)
        if expanded.groups == 1:  # factors of full rank: take the best start there is for a single term
            self.begin_greedily(torch.Generator().manual_seed(0))
            return
        self.factor_in, self.factor_out = expanded.factor_in.clone(), expanded.factor_out.clone()
        self.core = expanded.core.flatten(3).clone() / norm
        self._orthonormalise()

    def begin_randomly(self, generator: torch.Generator) -> None:
        self.factor_in = self._random_orthonormal(self.factor_in.shape, generator)
        self.factor_out = self._random_orthonormal(self.factor_out.shape, generator)
        self._solve_core()

    def begin_greedily(self, generator: torch.Generator) -> None:
        """Fit each term in turn to what the earlier ones leave, by orthogonal iteration in both channel modes."""
        self.begin_randomly(generator)
        rest_oik = self.target_oik.clone()
        for term in range(self.groups):
            factor_in, factor_out = self.factor_in[term], self.factor_out[term]
            for _ in range(GREEDY_ITERATIONS):
                seen_out = torch.einsum("oik,ob->ibk", rest_oik, factor_out).flatten(1)
                factor_in = torch.linalg.qr(seen_out @ (seen_out.T @ factor_in))[0]
                seen_in = torch.einsum("oik,ia->oak", rest_oik, factor_in).flatten(1)
                factor_out = torch.linalg.qr(seen_in @ (seen_in.T @ factor_out))[0]
            core = torch.einsum("oik,ia,ob->abk", rest_oik, factor_in, factor_out) / (1 + self.ridge)
            rest_oik = rest_oik - torch.einsum("abk,ia,ob->oik", core, factor_in, factor_out)
            self.factor_in[term], self.factor_out[term], self.core[term] = factor_in, factor_out, core

    def step(self) -> None:
        self._solve_factor_in()
        self._orthonormalise()
        self._solve_factor_out()
        self._orthonormalise()
        self._solve_core()

    def objective(self) -> float:
        """Return sqrt(J); the weight has norm 1."""
        return float((self._rest().square().sum() + self.ridge * self._squared_norms().sum()).sqrt())

    def result(self, shape: torch.Size, norm: float, steps: int, status: BTDStatus) -> BlockTerms:
        core = self.core.new_zeros(self.groups, self.rank_in, self.rank_in, self.spatial)
        core[:, :, : self.rank_out] = self.core * norm
        factor_out = self.factor_out.new_zeros(self.groups, self.out_channels, self.rank_in)
        factor_out[:, :, : self.rank_out] = self.factor_out
        return BlockTerms(
            core=core.reshape(self.groups, self.rank_in, self.rank_in, *shape[2:]),
            factor_in=self.factor_in,
            factor_out=factor_out,
            relative_error=float(self._rest().norm()),
            cancellation=float(self._squared_norms().sum().sqrt()),
            steps=steps,
            status=status,
        )

    def _rest(self) -> Tensor:
        """Return what the terms leave of the target, (C_in, C_out K)."""
        return self.target_i_ok - self.factor_in.transpose(0, 1).reshape(self.in_channels, -1) @ self._seen_from_in()

    def _squared_norms(self) -> Tensor:
        return self.core.square().sum(dim=(1, 2, 3))  # orthonormal factors

    def _seen_from_in(self) -> Tensor:
        """Return (C_in = R a, C_out K): the terms without their input factors."""
        seen = self.factor_out[:, None] @ self.core  # r a o k
        return seen.reshape(self.in_channels, -1)

    def _solve_factor_in(self) -> None:
        seen = self._seen_from_in()
        factors = self._solve_joint(seen, self.target_i_ok, self.rank_in)
        self.factor_in = factors.reshape(self.in_channels, self.groups, self.rank_in).transpose(0, 1)

    def _solve_factor_out(self) -> None:
        seen_rbik = self.factor_in[:, None] @ self.core.transpose(1, 2)
        seen = seen_rbik.reshape(self.groups * self.rank_out, -1)
        factors = self._solve_joint(seen, self.target_o_ik, self.rank_out)
        self.factor_out = factors.reshape(self.out_channels, self.groups, self.rank_out).transpose(0, 1)

    def _solve_joint(self, seen: Tensor, target: Tensor, rank: int) -> Tensor:
        """Return all factors X of one mode that minimise ||target - X seen||^2 + ridge sum_r ||X_r seen_r||^2."""
        gram = seen @ seen.T
        if self.ridge:
            blocks = gram.reshape(self.groups, rank, self.groups, rank)
            torch.diagonal(blocks, dim1=0, dim2=2).mul_(1 + self.ridge)
        return _solve_symmetric(gram, seen @ target.T).T

    def _solve_core(self) -> None:
        """Minimise J over all cores; the factors are orthonormal, so that a term's own block of the system is 1."""
        right = self._project(self.target_oik)
        unknowns = self.groups * self.rank_in * self.rank_out
        if unknowns <= EXACT_CORE_UNKNOWNS:
            overlap_in = torch.einsum("ria,sic->rsac", self.factor_in, self.factor_in)
            overlap_out = torch.einsum("rob,sod->rsbd", self.factor_out, self.factor_out)
            gram = torch.einsum("rsac,rsbd->rabscd", overlap_in, overlap_out).reshape(unknowns, unknowns)
            gram.diagonal().add_(self.ridge)
            self.core = _solve_symmetric(gram, right.reshape(unknowns, -1)).reshape(right.shape)
        else:
            self.core = self._conjugate_gradients(right)

    def _project(self, weight_oik: Tensor) -> Tensor:
        """Return the part of a weight that each term's factors see, (R, a, b, K)."""
        seen_raok = (self.factor_in.transpose(1, 2).reshape(self.in_channels, -1) @ _flat_in(weight_oik)).reshape(
            self.groups, self.rank_in, self.out_channels, self.spatial
        )
        return self.factor_out.transpose(1, 2)[:, None] @ seen_raok

    def _apply_gram(self, core: Tensor) -> Tensor:
        seen = (self.factor_out[:, None] @ core).reshape(self.in_channels, -1)
        total_i_ok = self.factor_in.transpose(0, 1).reshape(self.in_channels, -1) @ seen
        total = total_i_ok.reshape(self.in_channels, self.out_channels, self.spatial).transpose(0, 1)
        return self._project(total) + self.ridge * core

    def _conjugate_gradients(self, right: Tensor) -> Tensor:
        core = self.core
        rest = right - self._apply_gram(core)
        direction = rest
        squared = rest.square().sum()
        for _ in range(CORE_CG_STEPS):
            if squared <= 1e-30:
                break
            applied = self._apply_gram(direction)
            length = squared / (direction * applied).sum()
            core = core + length * direction
            rest = rest - length * applied
            new = rest.square().sum()
            direction = rest + (new / squared) * direction
            squared = new
        return core

    def _orthonormalise(self) -> None:
        """Move the scale and the skew of the factors into the cores; the terms stay what they are."""
        self.factor_in, upper_in = torch.linalg.qr(self.factor_in)
        self.factor_out, upper_out = torch.linalg.qr(self.factor_out)
        self.core = torch.einsum("rxa,rabk,ryb->rxyk", upper_in, self.core, upper_out)

    def _random_orthonormal(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.target_oik.device)
        return torch.linalg.qr(drawn)[0]


def _flat_in(weight_oik: Tensor) -> Tensor:
    return weight_oik.transpose(0, 1).reshape(weight_oik.shape[1], -1)


def _solve_symmetric(gram: Tensor, right: Tensor) -> Tensor:
    """Solve gram X = right, gram positive semi-definite; the least-squares solution of least norm if it is singular."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    diagonal = lower.diagonal()
    if not failed and bool(diagonal.min() > 1e-7 * diagonal.max()):
        return torch.cholesky_solve(right, lower)
    return torch.linalg.pinv(gram, hermitian=True, rtol=1e-13) @ right


def _term_norms(core: Tensor, factor_in: Tensor, factor_out: Tensor) -> Tensor:
    """Return ||T_r|| of each term, (R,), for factors that need not be orthonormal."""
    upper_in, upper_out = torch.linalg.qr(factor_in)[1], torch.linalg.qr(factor_out)[1]
    return torch.einsum("rxa,rabhw,ryb->rxyhw", upper_in, core, upper_out).flatten(1).norm(dim=1)


def _zero_terms(weight: Tensor, group_size: int) -> BlockTerms:
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
