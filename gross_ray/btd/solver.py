"""Block term decomposition of a convolution's weight (Eq. 1 to 3), by a joint descent over all terms.

The paper uses an off-the-shelf framework, which fits one term at a time. Here a limited-memory BFGS method (`descent`)
moves all factors and cores at once to minimise

    J = ||W - sum_r T_r||^2 + ridge * error^2 * sum_r ||T_r||^2,    error: the relative error shortly before the end.

The ridge keeps the terms from growing against each other (docs/method.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, count

import torch
from torch import Tensor

from gross_ray.btd.block_terms import BlockTerms, BTDStatus, zero_terms
from gross_ray.btd.descent import OnStep, Outcome, descend
from gross_ray.btd.options import BTDOptions
from gross_ray.btd.term_fit import Factors, TermFit, orthonormalised
from gross_ray.errors import InvalidValueError

SMALL_WEIGHT = 64 * 32 * 9
"""Largest number of elements with which a weight gets all restarts by default."""
MOST_RESTARTS = 4
"""Restarts of a small weight by default."""
LARGE_WEIGHT = 256 * 256 * 9
"""Elements from which most steps are in float32 by default; below, arithmetic is not what a step costs."""
MAX_CANCELLATION = 1.5
"""Cancellation above which terms count as degenerate and their ridge is raised."""
RIDGE_RAISE = 1.5
"""Factor by which the ridge is raised, as often as needed."""


def default_restarts(weight: Tensor) -> int:
    """Return the default number of starts: 4 up to 64 x 32 x 3 x 3 elements, 1 from 128 x 64 x 3 x 3.

    A pass over this many starts costs little more than a pass over one weight that fills the processor on its own.
    """
    return min(max(MOST_RESTARTS * SMALL_WEIGHT // weight.numel(), 1), MOST_RESTARTS)


def default_precision(weight: Tensor) -> str:
    """Return the default precision of most steps: float32 from 256 x 256 x 3 x 3 elements, else float64."""
    return "float32" if weight.numel() >= LARGE_WEIGHT else "float64"


def block_term_decomposition(
    weight: Tensor,
    group_size: int,
    *,
    options: BTDOptions = BTDOptions(),  # noqa: B008 (frozen)
    start: BlockTerms | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> BlockTerms:
    """Decompose a convolution's weight into C_in / g block terms of rank (g, g) (Eq. 3, section 4.2).

    `weight` is (C_out, C_in, kH, kW), of a convolution with groups=1; the computation runs on its device. `start`
    replaces the first start; its group-size must divide `group_size`, and the result's error is never above its own.
    `on_step` is called after each step with its number and sqrt(J) / ||W|| at the step's ridge (`descent`). Raises
    InvalidValueError for a group-size that does not divide C_in, a weight of another rank or one that is not finite.
    """
    return block_term_decompositions(
        [weight], group_size, options=options, starts=[start], seeds=[seed], on_step=on_step
    )[0]


def block_term_decompositions(
    weights: Sequence[Tensor],
    group_size: int,
    *,
    options: BTDOptions = BTDOptions(),  # noqa: B008 (frozen)
    starts: Sequence[BlockTerms | None] | None = None,
    seeds: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> list[BlockTerms]:
    """Decompose several weights of one shape in one pass, like `block_term_decomposition` for each, up to rounding.

    `starts` and `seeds` have one entry for each weight (default: no start, seed 0). One pass is faster if the weights
    are small or the device is a GPU. The result for a weight does not depend on the other weights: `max_steps` limits
    each start of each weight on its own. `on_step` counts the steps of the whole pass. Raises InvalidValueError also
    if the weights' shapes differ.
    """
    starts = starts or [None] * len(weights)
    seeds = seeds or [0] * len(weights)
    for weight, start in zip(weights, starts, strict=True):
        _check(weight, group_size, start)
        if weight.shape != weights[0].shape:
            raise InvalidValueError(
                f"weights of shapes {tuple(weights[0].shape)} and {tuple(weight.shape)}: must be the same in one pass"
            )
    targets = [weight.detach().to(torch.float64) for weight in weights]
    norms = [float(target.norm()) for target in targets]
    results = {i: zero_terms(targets[i], group_size) for i, norm in enumerate(norms) if norm == 0}
    nonzero = [i for i, norm in enumerate(norms) if norm > 0]
    if nonzero:
        solved = _solve(
            torch.stack([targets[i] / norms[i] for i in nonzero]),
            group_size,
            [norms[i] for i in nonzero],
            [starts[i] for i in nonzero],
            [seeds[i] for i in nonzero],
            options,
            on_step,
        )
        results |= dict(zip(nonzero, solved, strict=True))
    return [results[i] for i in range(len(weights))]


def _check(weight: Tensor, group_size: int, start: BlockTerms | None) -> None:
    if weight.ndim != 4:
        raise InvalidValueError(f"weight of shape {tuple(weight.shape)}: must be (C_out, C_in, kH, kW)")
    out_channels, in_channels, *kernel = weight.shape
    if group_size < 1 or in_channels % group_size:
        raise InvalidValueError(f"group_size (={group_size}) must divide in_channels (={in_channels})")
    if not torch.isfinite(weight).all():
        raise InvalidValueError(f"weight of shape {tuple(weight.shape)} has NaN or infinity; train the network again")
    if start is None:
        return
    shape = (start.factor_out.shape[1], start.factor_in.shape[1], *start.core.shape[3:])
    if group_size % start.group_size or shape != tuple(weight.shape):
        raise InvalidValueError(
            f"start of group-size {start.group_size} for a weight of shape {shape}: must be for {tuple(weight.shape)} "
            f"and of a group-size that divides {group_size}"
        )


def _solve(
    weights: Tensor,
    group_size: int,
    norms: Sequence[float],
    starts: Sequence[BlockTerms | None],
    seeds: Sequence[int],
    options: BTDOptions,
    on_step: OnStep | None,
) -> list[BlockTerms]:
    """Decompose weights (L, C_out, C_in, kH, kW) of norm 1."""
    kernel = weights.shape[3:]
    singles = [TermFit(weight[None], group_size, [0]) for weight in weights]
    if weights.shape[2] == group_size:
        return [
            single.terms(single.single_term(), norm, 0, BTDStatus.CONVERGED, kernel)
            for single, norm in zip(singles, norms, strict=True)
        ]
    restarts = [options.restarts or (default_restarts(weights[0]) if start is None else 1) for start in starts]
    first = [0, *accumulate(restarts)]  # index of each weight's first start among all starts, and the number of starts
    weight_of = [i for i, count in enumerate(restarts) for _ in range(count)]
    generator_of = [torch.Generator().manual_seed(seed) for seed in seeds]
    generators = [generator_of[i] for i in weight_of]
    fit = TermFit(weights, group_size, weight_of)
    factors = fit.greedy_start(generators) if options.init == "greedy" else fit.random_start(generators)
    expanded = [None if start is None else start.expand(group_size) for start in starts]
    warm = [False] * len(weight_of)
    for i, terms in enumerate(expanded):
        if terms is not None:
            warm[first[i]] = True
            for part, of_start in zip(factors, singles[i].from_terms(terms, norms[i]), strict=True):
                part[first[i]] = of_start[0]
    outcomes = _descend(weights, group_size, weight_of, factors, warm, options, on_step)
    results = []
    for i, (single, norm) in enumerate(zip(singles, norms, strict=True)):
        best = min(outcomes[first[i] : first[i + 1]], key=lambda outcome: outcome.squared_error)
        terms = single.terms(best.factors, norm, best.steps, best.status, kernel)
        before = expanded[i]
        if before is not None:
            at_start = single.terms(single.from_terms(before, norm), norm, best.steps, best.status, kernel)
            # A lower J can have a slightly higher error; a nested series must not get worse.
            terms = min(terms, at_start, key=lambda candidate: candidate.relative_error)
        results.append(terms)
    return results


def _descend(
    weights: Tensor,
    group_size: int,
    weight_of: Sequence[int],
    factors: Factors,
    warm: Sequence[bool],
    options: BTDOptions,
    on_step: OnStep | None,
) -> list[Outcome]:
    """Run all descents in the chosen precision, then continue the degenerate ones with a higher ridge.

    Each descent may take `max_steps` in all, whatever the other descents take.
    """
    outcomes = [
        Outcome(factors.select(slice(i, i + 1)), float("inf"), options.ridge, 0, BTDStatus.MAX_STEPS)
        for i in range(len(weight_of))
    ]
    on_step = None if on_step is None else _numbered(on_step)
    precision = default_precision(weights[0]) if options.precision == "auto" else options.precision
    if precision == "float32":
        rough = [replace(start, factors=Factors(*(part.float() for part in start.factors))) for start in outcomes]
        rough = _continue(weights.float(), group_size, weight_of, rough, warm, options, on_step)
        outcomes = [
            replace(end, factors=orthonormalised(Factors(*(part.double() for part in end.factors)))) for end in rough
        ]
        warm = [True] * len(weight_of)
    chosen: Sequence[int] = range(len(weight_of))
    ridge = options.ridge
    while chosen := [i for i in chosen if outcomes[i].steps < options.max_steps]:
        again = _continue(
            weights,
            group_size,
            [weight_of[i] for i in chosen],
            [outcomes[i] for i in chosen],
            [warm[i] for i in chosen],
            replace(options, ridge=ridge),
            on_step,
        )
        for i, outcome in zip(chosen, again, strict=True):
            outcomes[i] = outcome
        ridge, warm = ridge * RIDGE_RAISE, [True] * len(weight_of)
        chosen = [i for i in chosen if ridge > 0 and float(outcomes[i].factors.core.norm()) > MAX_CANCELLATION]
    return outcomes


def _numbered(on_step: OnStep) -> OnStep:
    """Return a callback that numbers the steps of successive descents from 1 without a gap."""
    numbers = count(1)
    return lambda _, value: on_step(next(numbers), value)


def _continue(
    weights: Tensor,
    group_size: int,
    weight_of: Sequence[int],
    outcomes: Sequence[Outcome],
    warm: Sequence[bool],
    options: BTDOptions,
    on_step: OnStep | None,
) -> list[Outcome]:
    """Continue each outcome's descent with its remaining steps; a new outcome's `steps` count the earlier ones too."""
    again = descend(
        TermFit(weights, group_size, weight_of),
        Factors(*(torch.cat(parts) for parts in zip(*(outcome.factors for outcome in outcomes), strict=True))),
        ridge=options.ridge,
        tolerance=options.tolerance,
        max_steps=[options.max_steps - outcome.steps for outcome in outcomes],
        warm=warm,
        on_step=on_step,
    )
    return [replace(new, steps=old.steps + new.steps) for old, new in zip(outcomes, again, strict=True)]
