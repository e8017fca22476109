"""Limited-memory BFGS over block terms, for many descents at once.

The memory is kept in scaled coordinates (`TermFit.scaled`), in which the Hessian is near the identity, and is carried
from point to point as it is. The ridge starts high and sinks in stages: with a high ridge the terms stay nearly
orthogonal and the objective has fewer poor local minima (docs/method.md has the figures). The last stage's ridge is
relative to the squared error that is left, so that it weighs alike on weights that fit well and on those that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gross_ray.btd.block_terms import BTDStatus
from gross_ray.btd.term_fit import Factors, Point, TermFit, member_product

RIDGE_STAGES = (0.3, 0.1, 0.03, 0.01)
"""Ridges of the first stages."""
STAGE_STEPS = 40
"""Steps of each stage, at most: fewer where it converges before."""
LEAST_SQUARED_ERROR = 1e-12
"""What the last ridge is relative to where the error is less: else a ridge could not act on an exact fit."""
WINDOW = 10
"""Steps over which the decrease is averaged: one slow step ends nothing."""
MEMORY = 6
"""Steps that the Hessian is estimated from."""
SCALING_STEPS = 5
"""Steps between two updates of the scaling."""
HALVINGS = 20
"""Shortenings of a step before it is given up."""
SUFFICIENT = 1e-4
"""Part of the promised decrease that a step must give (Armijo)."""

OnStep = Callable[[int, float], object]


@dataclass(frozen=True)
class Outcome:
    """The end of one descent."""

    factors: Factors
    """The unknowns, of one member."""
    squared_error: float
    """||W - sum_r T_r||^2"""
    ridge: float
    """The ridge in J of the last stage."""
    steps: int
    """Steps taken."""
    status: BTDStatus
    """Why it ended."""


def descend(
    fit: TermFit,
    factors: Factors,
    *,
    ridge: float,
    tolerance: float,
    max_steps: int | Sequence[int],
    warm: Sequence[bool] | None = None,
    on_step: OnStep | None = None,
) -> list[Outcome]:
    """Lower J for every member of `fit`, and return one outcome for each.

    The ridge of the last stage is `ridge` times the squared error at its begin. A member has converged when `WINDOW`
    steps of it lowered sqrt(J) by less than `tolerance` each, on average. `max_steps` (1 or more) limits every member,
    or has a limit for each. `warm` members are in the last stage from their first step. `on_step` is called with each
    step's number and the lowest sqrt(J) so far, at the ridge of its step: it never rises.
    """
    members = len(factors.core)
    most = torch.tensor([max_steps] * members if isinstance(max_steps, int) else list(max_steps))
    descent = _Descent(fit, factors, ridge, warm or [False] * members)
    outcomes: dict[int, Outcome] = {}
    lowest = float("inf")
    while len(outcomes) < members:
        descent.step()
        if on_step is not None:
            lowest = min(lowest, float(descent.objective.min().sqrt()))
            on_step(descent.steps, lowest)
        settled = descent.settled(tolerance)
        converged = settled & descent.in_last_stage()
        descent.next_stage(settled)
        ended = converged | (most <= descent.steps)
        outcomes |= descent.outcomes(converged, BTDStatus.CONVERGED)
        outcomes |= descent.outcomes(ended & ~converged, BTDStatus.MAX_STEPS)
        if ended.any() and not ended.all():
            descent.keep(~ended)
            most = most[~ended]
    return [outcomes[number] for number in range(members)]


class _Descent:
    """The state of the members that have not ended."""

    def __init__(self, fit: TermFit, factors: Factors, ridge: float, warm: Sequence[bool]) -> None:
        self.fit = fit
        self.steps = 0
        self._numbers = torch.arange(len(factors.core))
        self._relative_ridge = ridge
        self._stage = torch.tensor([len(RIDGE_STAGES) if hot else 0 for hot in warm])
        self._stage_steps = torch.zeros_like(self._stage)
        self._point = fit.evaluate(factors)
        self._ridge = torch.full_like(self._point.squared_error, float("inf"))
        self._ridge = self._stage_ridge()
        self._gradient = fit.gradient(self._point, self._ridge)
        self._memory = _Memory(len(factors.core), fit.unknowns, factors.core)
        self.objective = self._point.objective(self._ridge)
        self._last = [self.objective]

    def _stage_ridge(self) -> Tensor:
        """Return the ridges of stages that begin here; they never rise."""
        relative = self._relative_ridge * self._point.squared_error.clamp_min(LEAST_SQUARED_ERROR)
        stages = torch.tensor([*RIDGE_STAGES, 0.0])[self._stage].to(relative)
        return torch.minimum(self._ridge, torch.maximum(stages, relative))

    def step(self) -> None:
        """Move every member once."""
        fit, point, gradient, ridge = self.fit, self._point, self._gradient, self._ridge
        if self.steps % SCALING_STEPS == 0:
            self._scaling = fit.scaling(point)
        self.steps += 1
        scaled = fit.scaled(gradient, self._scaling)
        step = self._memory.direction(scaled)
        direction = fit.direction(step, self._scaling, point)
        slope = (gradient * direction).sum(dim=1)
        uphill = slope >= 0
        if uphill.any():
            self._memory.forget(uphill)
            step = torch.where(uphill[:, None], -scaled, step)
            direction = fit.direction(step, self._scaling, point)
            slope = (gradient * direction).sum(dim=1)
        self._point, self.objective, length = _search(fit, point, direction, self.objective, slope, ridge)
        self._gradient = fit.gradient(self._point, ridge)
        self._memory.forget(length == 0)
        self._memory.remember(step * length[:, None], fit.scaled(self._gradient - gradient, self._scaling))
        self._last = [*self._last[-WINDOW:], self.objective]
        self._stage_steps += 1

    def settled(self, tolerance: float) -> Tensor:
        """Return which members' last steps, all of their present stage, gained less than the tolerance each."""
        gained = self._last[0].sqrt() - self.objective.sqrt()
        return (gained < tolerance * WINDOW).cpu() & (self._stage_steps >= WINDOW)

    def in_last_stage(self) -> Tensor:
        """Return which members have come to their last ridge."""
        return self._stage == len(RIDGE_STAGES)

    def next_stage(self, early: Tensor) -> None:
        """Lower the ridge of the members whose stage has had its steps, or early."""
        going = (early | (self._stage_steps == STAGE_STEPS)) & ~self.in_last_stage()
        if not going.any():
            return
        self._stage[going] += 1
        self._stage_steps[going] = 0
        lowered = torch.where(going.to(self._ridge.device), self._stage_ridge(), self._ridge)
        self._gradient = self._gradient + (lowered - self._ridge)[:, None] * self.fit.ridge_gradient(self._point)
        self._ridge = lowered
        self.objective = self._point.objective(lowered)
        self._last[-1] = self.objective

    def outcomes(self, chosen: Tensor, status: BTDStatus) -> dict[int, Outcome]:
        """Return the outcomes of some members, by their numbers."""
        if not chosen.any():  # at nearly every step: nothing is fetched from the device for it
            return {}
        squared_error, ridge = self._point.squared_error.tolist(), self._ridge.tolist()
        return {
            int(self._numbers[place]): Outcome(
                Factors(*(part[place : place + 1].clone() for part in self._point.factors)),
                squared_error[place],
                ridge[place],
                self.steps,
                status,
            )
            for place in chosen.nonzero()[:, 0].tolist()
        }

    def keep(self, chosen: Tensor) -> None:
        """Leave only some members."""
        self._numbers = self._numbers[chosen]
        self._stage, self._stage_steps = self._stage[chosen], self._stage_steps[chosen]
        stay = chosen.nonzero()[:, 0].to(self.objective.device)
        self.fit.keep(stay)
        self._memory.keep(stay)
        self._point, self._gradient, self.objective = (
            self._point.select(stay),
            self._gradient[stay],
            self.objective[stay],
        )
        self._scaling = self._scaling.select(stay)
        self._ridge = self._ridge[stay]
        self._last = [value[stay] for value in self._last]


def _search(
    fit: TermFit, point: Point, direction: Tensor, objective: Tensor, slope: Tensor, ridge: Tensor
) -> tuple[Point, Tensor, Tensor]:
    """Return the first point along each direction that lowers J enough, its J and its length: 0 where there is none."""
    length = torch.ones_like(slope)
    enough = torch.zeros_like(slope, dtype=torch.bool)
    noise = 4 * torch.finfo(slope.dtype).eps * objective
    after = fit.move(point, direction)
    for _ in range(HALVINGS):
        reached = after.objective(ridge)
        enough |= reached <= objective + 2 * SUFFICIENT * length * slope + noise
        if enough.all():
            return after, reached, length
        # The lowest point of the parabola through what is known, if it is a sensible shortening.
        promised = -slope * length.square() / (reached - objective - 2 * slope * length)
        shorter = torch.maximum(torch.minimum(promised.nan_to_num(0.0), 0.5 * length), 0.1 * length)
        length = torch.where(enough, length, shorter)
        after = fit.move(point, direction, length)
    length = torch.where(enough | (after.objective(ridge) <= objective), length, torch.zeros_like(length))
    after = fit.move(point, direction, length)
    return after, after.objective(ridge), length


class _Memory:
    """The last steps and changes of the gradient of each member, and their products.

    The direction is a combination of them and of the gradient, so that the recursion runs on the products alone
    (small arrays on the host), whatever the number of unknowns.
    """

    def __init__(self, members: int, unknowns: int, like: Tensor) -> None:
        self._vectors = like.new_zeros(members, 2 * MEMORY, unknowns)  # steps, then changes
        self._products = np.zeros((members, 2 * MEMORY + 1, 2 * MEMORY + 1))  # the last one is the gradient
        self._weights = np.zeros((members, MEMORY))  # 1 / (step . change); 0: not used
        self._count = 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Return minus the inverse Hessian's estimate times the gradient."""
        if not self._count:
            return -gradient
        products = member_product(self._vectors, gradient[:, :, None])
        with_gradient = torch.cat([products, gradient.square().sum(1)[:, None, None]], 1)
        self._products[:, -1] = self._products[:, :, -1] = with_gradient[..., 0].cpu().numpy()
        coefficients = np.zeros(self._products.shape[:2])
        coefficients[:, -1] = 1
        places = [place % MEMORY for place in range(max(0, self._count - MEMORY), self._count)]
        factors = {}
        for place in reversed(places):
            factors[place] = (self._products[:, place] * coefficients).sum(1) * self._weights[:, place]
            coefficients[:, MEMORY + place] -= factors[place]
        for place in places:
            back = (self._products[:, MEMORY + place] * coefficients).sum(1) * self._weights[:, place]
            coefficients[:, place] += factors[place] - back
        combination = torch.from_numpy(-coefficients).to(gradient)
        return torch.baddbmm(
            combination[:, -1:, None] * gradient[:, :, None], self._vectors.mT, combination[:, :-1, None]
        )[..., 0]

    def remember(self, step: Tensor, change: Tensor) -> None:
        place = self._count % MEMORY
        self._count += 1
        self._vectors[:, place], self._vectors[:, MEMORY + place] = step, change
        products = (self._vectors @ torch.stack([step, change], dim=1).mT).cpu().double().numpy()
        for column, index in enumerate((place, MEMORY + place)):
            self._products[:, :-1, index] = self._products[:, index, :-1] = products[..., column]
        curvature, size = products[:, place, 1], products[:, MEMORY + place, 1]
        usable = (curvature > 1e-10 * size) & (size > 1e-100)
        self._weights[:, place] = np.divide(1, curvature, out=np.zeros_like(curvature), where=usable)

    def forget(self, members: Tensor) -> None:
        self._weights[members.cpu().numpy()] = 0

    def keep(self, members: Tensor) -> None:
        self._vectors = self._vectors[members]
        host = members.cpu().numpy()
        self._products, self._weights = self._products[host], self._weights[host]
