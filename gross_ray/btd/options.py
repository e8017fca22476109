"""The options of a block term decomposition."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gross_ray.errors import InvalidValueError, is_whole

PRECISIONS = ("auto", "float64", "float32")


@dataclass(frozen=True, kw_only=True)
class BTDOptions:
    """How a block term decomposition is computed."""

    tolerance: float = 1e-6
    """Stop when ten steps lower sqrt(J) / ||W|| by less each, on average (with ridge 0: the relative error)."""
    max_steps: int = 500_000
    """Stop after this number of steps."""
    restarts: int = 0
    """Number of starts, all in one pass; the lowest error wins. 0: four for a small weight, one for a large one.

    The larger a weight, the closer together are its local minima (`default_restarts`). With 0 and a `start`, that start
    is the only one.
    """
    ridge: float = 0.01
    """Weight of the terms' squared norms in J, relative to the squared error; 0.0: unconstrained, often degenerate.

    Any other value is raised as needed to keep the cancellation at 1.5 or below.
    """
    init: str = "greedy"
    """"greedy": each term fits the residual of the earlier ones; "random": the terms share a random basis."""
    precision: str = "auto"
    """"float64"; "float32": most steps, but the last ones and all figures in float64; "auto": by the weight's size."""

    def __post_init__(self) -> None:
        rules = (
            (0 <= self.tolerance < math.inf, "tolerance", "must be 0 or more, and finite"),
            (is_whole(self.max_steps, 1), "max_steps", "must be 1 or more, a whole number"),
            (is_whole(self.restarts, 0), "restarts", "must be 0 (chosen by the weight's size) or more"),
            (0 <= self.ridge < math.inf, "ridge", "must be 0.0 (none) or more, and finite"),
            (self.init in ("greedy", "random"), "init", "must be 'greedy' or 'random'"),
            (self.precision in PRECISIONS, "precision", f"must be one of {', '.join(PRECISIONS)}"),
        )
        for satisfied, name, rule in rules:
            if not satisfied:
                raise InvalidValueError(f"{name} = {getattr(self, name)!r}: {rule}")
