"""Limited-memory BFGS over block terms, for many descents at once.

The memory is kept in scaled coordinates (`TermFit.scaled`), in which the Hessian is near the identity, and is carried
from point to point unchanged. The ridge starts high and sinks in stages: with a high ridge the terms stay nearly
orthogonal and the objective has fewer poor local minima (docs/method.md has the figures). The last stage's ridge is
relative to the remaining squared error, so that it weighs equally on weights that fit well and on weights that fit
badly.
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
"""Most steps of a stage; a stage that converges is shorter."""
LEAST_SQUARED_ERROR = 1e-12
"""Lower bound of the squared error to which the last ridge is relative: a ridge must act on an exact fit too."""
WINDOW = 10
"""Steps over which the decrease is averaged, so that one slow step does not stop a descent."""
MEMORY = 6
"""Number of past steps that estimate the Hessian."""
SCALING_STEPS = 5
"""Steps between two updates of the scaling."""
HALVINGS = 20
"""How often a step is shortened before the line search gives up."""
SUFFICIENT = 1e-4
"""Fraction of the predicted decrease that a step must reach (Armijo)."""

OnStep = Callable[[int, float], object]


@dataclass(frozen=True)
class Outcome:
    """The result of one descent."""

    factors: Factors
    """The unknowns of one member."""
    squared_error: float
    """||W - sum_r T_r||^2"""
    ridge: float
    """The ridge in J during the last stage."""
    steps: int
    """Number of steps."""
    status: BTDStatus
    """Why the descent stopped."""


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

    The ridge of the last stage is `ridge` times the squared error at its start. A member has converged when its last
    `WINDOW` steps lowered sqrt(J) by less than `tolerance` each, on average. `max_steps` is one limit (1 or more) for
    every member, or a limit for each. `warm` members start in the last stage. `on_step` is called after each step with
    its number and the lowest sqrt(J) so far, each at the ridge of its step, so the value never rises.
    """
    members = len(factors.core)
    limits = torch.tensor([max_steps] * members if isinstance(max_steps, int) else list(max_steps))
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
        stopped = converged | (limits <= descent.steps)
        outcomes |= descent.outcomes(converged, BTDStatus.CONVERGED)
        outcomes |= descent.outcomes(stopped & ~converged, BTDStatus.MAX_STEPS)
        if stopped.any() and not stopped.all():
            descent.keep(~stopped)
            limits = limits[~stopped]
    return [outcomes[number] for number in range(members)]


class _Descent:
    """The state of the members that are still descending."""

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
        """Return each member's ridge for a stage that starts now; a member's ridge never rises."""
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
        """Return which members gained less than the tolerance per step in the last steps of their present stage."""
        gained = self._last[0].sqrt() - self.objective.sqrt()
        return (gained < tolerance * WINDOW).cpu() & (self._stage_steps >= WINDOW)

    def in_last_stage(self) -> Tensor:
        """Return which members are in their last stage."""
        return self._stage == len(RIDGE_STAGES)

    def next_stage(self, settled: Tensor) -> None:
        """Lower the ridge of the members that have settled or used up the steps of their stage."""
        going = (settled | (self._stage_steps == STAGE_STEPS)) & ~self.in_last_stage()
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
        """Return the outcomes of the chosen members by member number."""
        if not chosen.any():  # true at nearly every step: do not wait for the device
            return {}
        squared_error, ridge = self._point.squared_error.tolist(), self._ridge.tolist()
        return {
            int(self._numbers[i]): Outcome(
                Factors(*(part[i : i + 1].clone() for part in self._point.factors)),
                squared_error[i],
                ridge[i],
                self.steps,
                status,
            )
            for i in chosen.nonzero()[:, 0].tolist()
        }

    def keep(self, chosen: Tensor) -> None:
        """Drop all members but the chosen ones."""
        self._numbers = self._numbers[chosen]
        self._stage, self._stage_steps = self._stage[chosen], self._stage_steps[chosen]
        stay = chosen.nonzero()[:, 0].to(self.objective.device)
        self.fit.keep(stay)
        self._memory.keep(stay)
        self._point, self._scaling = self._point.select(stay), self._scaling.select(stay)
        self._gradient, self.objective, self._ridge = self._gradient[stay], self.objective[stay], self._ridge[stay]
        self._last = [value[stay] for value in self._last]


def _search(
    fit: TermFit, point: Point, direction: Tensor, objective: Tensor, slope: Tensor, ridge: Tensor
) -> tuple[Point, Tensor, Tensor]:
    """Return the first point along each direction that lowers J enough, its J and its length (0 if there is none)."""
    length = torch.ones_like(slope)
    enough = torch.zeros_like(slope, dtype=torch.bool)
    noise = 4 * torch.finfo(slope.dtype).eps * objective
    after = fit.move(point, direction)
    for _ in range(HALVINGS):
        reached = after.objective(ridge)
        enough |= reached <= objective + 2 * SUFFICIENT * length * slope + noise
        if enough.all():
            return after, reached, length
        # The minimum of the parabola through the known values, if it shortens the step by a sensible factor.
        minimum = -slope * length.square() / (reached - objective - 2 * slope * length)
        shorter = torch.maximum(torch.minimum(minimum.nan_to_num(0.0), 0.5 * length), 0.1 * length)
        length = torch.where(enough, length, shorter)
        after = fit.move(point, direction, length)
    length = torch.where(enough | (after.objective(ridge) <= objective), length, torch.zeros_like(length))
    after = fit.move(point, direction, length)
    return after, after.objective(ridge), length


class _Memory:
    """The last steps and gradient changes of each member, and their inner products.

    The direction is a combination of these vectors and the gradient, so the recursion needs only their inner products
    (small arrays on the host), whatever the number of unknowns.
    """

    def __init__(self, members: int, unknowns: int, like: Tensor) -> None:
        self._vectors = like.new_zeros(members, 2 * MEMORY, unknowns)  # steps, then changes
        self._products = np.zeros((members, 2 * MEMORY + 1, 2 * MEMORY + 1))  # the gradient comes last
        self._weights = np.zeros((members, MEMORY))  # 1 / (step . change); 0 for an unused pair
        self._count = 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Return minus the estimated inverse Hessian times the gradient."""
        if not self._count:
            return -gradient
        products = member_product(self._vectors, gradient[:, :, None])
        with_gradient = torch.cat([products, gradient.square().sum(1)[:, None, None]], 1)
        self._products[:, -1] = self._products[:, :, -1] = with_gradient[..., 0].cpu().numpy()
        coefficients = np.zeros(self._products.shape[:2])
        coefficients[:, -1] = 1
        pairs = [number % MEMORY for number in range(max(0, self._count - MEMORY), self._count)]  # oldest first
        factors = {}
        for k in reversed(pairs):
            factors[k] = (self._products[:, k] * coefficients).sum(1) * self._weights[:, k]
            coefficients[:, MEMORY + k] -= factors[k]
        for k in pairs:
            back = (self._products[:, MEMORY + k] * coefficients).sum(1) * self._weights[:, k]
            coefficients[:, k] += factors[k] - back
        combination = torch.from_numpy(-coefficients).to(gradient)
        return torch.baddbmm(
            combination[:, -1:, None] * gradient[:, :, None], self._vectors.mT, combination[:, :-1, None]
        )[..., 0]

    def remember(self, step: Tensor, change: Tensor) -> None:
        k = self._count % MEMORY
        self._count += 1
        self._vectors[:, k], self._vectors[:, MEMORY + k] = step, change
        products = (self._vectors @ torch.stack([step, change], dim=1).mT).cpu().double().numpy()
        for column, index in enumerate((k, MEMORY + k)):
            self._products[:, :-1, index] = self._products[:, index, :-1] = products[..., column]
        curvature, size = products[:, k, 1], products[:, MEMORY + k, 1]
        usable = (curvature > 1e-10 * size) & (size > 1e-100)
        self._weights[:, k] = np.divide(1, curvature, out=np.zeros_like(curvature), where=usable)

    def forget(self, members: Tensor) -> None:
        self._weights[members.cpu().numpy()] = 0

    def keep(self, members: Tensor) -> None:
        self._vectors = self._vectors[members]
        host = members.cpu().numpy()
        self._products, self._weights = self._products[host], self._weights[host]
