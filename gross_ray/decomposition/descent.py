"""Limited-memory BFGS over block terms, for many descents at once.

The memory is kept in scaled coordinates (`TermFit.scaled`), in which the Hessian is near the identity, and is carried
from point to point as it is. The ridge starts high and sinks to its own value: with a high ridge the terms stay nearly
orthogonal and the objective has fewer poor local minima (docs/method.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gross_ray.decomposition.block_terms import BTDStatus
from gross_ray.decomposition.term_fit import Factors, Point, TermFit

RIDGE_STAGES = (0.3, 0.1, 0.03, 0.01)
"""Ridges of the first stages, where above the ridge asked for."""
STAGE_STEPS = 40
"""Steps of each stage, at most: fewer where it converges before."""
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
    objective: float
    """J at the ridge asked for."""
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
    max_steps: int,
    warm: Sequence[bool] | None = None,
    on_step: OnStep | None = None,
) -> list[Outcome]:
    """Lower J for every member of `fit`, and return one outcome for each.

    A member has converged when the last `WINDOW` steps lowered sqrt(J) by less than `tolerance` each, on average, the
    ridge being the one asked for. `warm` members have it from their first step. `on_step` is called with each step's
    number and the lowest sqrt(J) of the members not yet converged, at the ridge of that step.
    """
    descent = _Descent(fit, factors, _schedule(ridge, warm or [False] * len(factors.core)))
    outcomes: dict[int, Outcome] = {}
    for step in range(1, max_steps + 1):
        descent.step()
        if on_step is not None:
            on_step(step, float(descent.objective.min().sqrt()))
        settled = descent.settled(tolerance)
        ended = settled & descent.at_last_ridge()
        descent.next_stage(early=bool(settled.all()))
        outcomes |= descent.outcomes(ended, BTDStatus.CONVERGED)
        if ended.all():
            break
        if ended.any():
            descent.keep(~ended)
    else:
        outcomes |= descent.outcomes(torch.ones_like(descent.at_last_ridge()), BTDStatus.MAX_STEPS)
    return [outcomes[number] for number in range(len(factors.core))]


class _Descent:
    """The state of the members that have not ended."""

    def __init__(self, fit: TermFit, factors: Factors, schedule: Tensor) -> None:
        self.fit = fit
        self.steps = 0
        self._numbers = torch.arange(len(factors.core))
        self._schedule = schedule.to(factors.core)
        self._stage, self._stage_began = 0, 0
        self._point = fit.evaluate(factors)
        self._gradient = fit.gradient(self._point, self._schedule[0])
        self._memory = _Memory(len(factors.core), fit.unknowns, factors.core)
        self.objective = self._point.objective(self._schedule[0])
        self._last = [self.objective]

    def step(self) -> None:
        """Move every member once."""
        fit, point, gradient, ridge = self.fit, self._point, self._gradient, self._schedule[self._stage]
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

    def settled(self, tolerance: float) -> Tensor:
        """Return which members' last steps, all at their present ridge, gained less than the tolerance each."""
        if len(self._last) <= WINDOW:
            return torch.zeros(len(self._numbers), dtype=torch.bool)
        return (self._last[0].sqrt() - self.objective.sqrt() < tolerance * WINDOW).cpu()

    def at_last_ridge(self) -> Tensor:
        """Return which members have the ridge asked for."""
        return (self._schedule[self._stage] == self._schedule[-1]).cpu()

    def next_stage(self, *, early: bool) -> None:
        """Go on to the next ridge if this stage's steps are taken, or early."""
        if self._stage + 1 == len(self._schedule) or not (early or self.steps - self._stage_began == STAGE_STEPS):
            return
        lowered = self._schedule[self._stage + 1] - self._schedule[self._stage]
        self._stage, self._stage_began = self._stage + 1, self.steps
        self._gradient = self._gradient + lowered[:, None] * self.fit.ridge_gradient(self._point)
        self.objective = self._point.objective(self._schedule[self._stage])
        self._last = [self.objective]

    def outcomes(self, chosen: Tensor, status: BTDStatus) -> dict[int, Outcome]:
        """Return the outcomes of some members, by their numbers."""
        objective = self._point.objective(self._schedule[-1]).tolist()
        return {
            int(self._numbers[place]): Outcome(
                Factors(*(part[place : place + 1].clone() for part in self._point.factors)),
                objective[place],
                self.steps,
                status,
            )
            for place in chosen.nonzero()[:, 0].tolist()
        }

    def keep(self, chosen: Tensor) -> None:
        """Leave only some members."""
        self._numbers = self._numbers[chosen]
        stay = chosen.nonzero()[:, 0].to(self.objective.device)
        self.fit.keep(stay)
        self._memory.keep(stay)
        self._point, self._gradient, self.objective = (
            self._point.select(stay),
            self._gradient[stay],
            self.objective[stay],
        )
        self._scaling = self._scaling.select(stay)
        self._schedule = self._schedule[:, stay]
        self._last = [value[stay] for value in self._last]


def _schedule(ridge: float, warm: Sequence[bool]) -> Tensor:
    """Return the ridge of each member in each stage, (stages, n); the last stage is the ridge asked for."""
    stages = [*(stage for stage in RIDGE_STAGES if stage > ridge), ridge]
    return torch.tensor([[ridge if hot else stage for hot in warm] for stage in stages], dtype=torch.float64)


def _search(
    fit: TermFit, point: Point, direction: Tensor, objective: Tensor, slope: Tensor, ridge: Tensor
) -> tuple[Point, Tensor, Tensor]:
    """Return the first point along each direction that lowers J enough, its J and its length: 0 where there is none."""
    length = torch.ones_like(slope)
    noise = 4 * torch.finfo(slope.dtype).eps * objective
    after = fit.move(point, direction)
    for _ in range(HALVINGS):
        reached = after.objective(ridge)
        enough = reached <= objective + 2 * SUFFICIENT * length * slope + noise
        if enough.all():
            return after, reached, length
        # The lowest point of the parabola through what is known, if it is a sensible shortening.
        promised = -slope * length.square() / (reached - objective - 2 * slope * length)
        shorter = torch.maximum(torch.minimum(promised.nan_to_num(0.0), 0.5 * length), 0.1 * length)
        length = torch.where(enough, length, shorter)
        after = fit.move(point, direction, length)
    length = torch.where(after.objective(ridge) <= objective, length, torch.zeros_like(length))
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
        with_gradient = torch.cat([self._vectors @ gradient[:, :, None], gradient.square().sum(1)[:, None, None]], 1)
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
