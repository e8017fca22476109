"""Upper limits on the costs of a configuration, as users write them: ``macs=2.66M`` or ``macs=40%``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal

from gross_ray.errors import InvalidValueError

COSTS = ("macs", "macs_paper", "parameters", "latency_ms")
"""The costs of a configuration: columns of the `configurations` table."""
RELATIVE = ("macs", "parameters", "latency_ms")
"""The costs that may be limited in percent of the full network's."""
_SUFFIXES = {"": 0, "k": 3, "M": 6, "G": 9}


@dataclass(frozen=True)
class Budget:
    """An upper limit on one cost of a configuration, written ``macs=2.66M``."""

    cost: str
    """What is limited: one of `COSTS`."""
    limit: float
    """The most that a configuration may cost, in the unit of that column."""
    percent: float | None = field(default=None, compare=False)
    """The limit in percent of the full network's cost, if it was written so."""

    def __post_init__(self) -> None:
        _check_cost(self.cost)
        if not 0 < self.limit < math.inf:
            raise InvalidValueError(
                f"budget {self.cost}={self.limit}: a limit is a finite number above 0, like {self.cost}=2.66M"
            )

    def percent_of_full(self, amount: float) -> str:
        """Return ", 39 % of the full network's," for an amount, if the limit was written in percent; else nothing."""
        return "" if self.percent is None else f", {amount / self.limit * self.percent:.3g} % of the full network's,"

    def __str__(self) -> str:
        if self.percent is None:
            return f"{self.cost}={format_amount(self.limit)}"
        return f"{self.cost}={readable_amount(self.cost, self.limit)}, {self.percent:g} % of the full network's"


@dataclass(frozen=True)
class RelativeBudget:
    """An upper limit on one cost in percent of the full network's, written ``macs=40%``."""

    cost: str
    """What is limited: one of `RELATIVE`."""
    percent: float
    """The most that a configuration may cost, in percent of the full network's cost."""

    def __post_init__(self) -> None:
        _check_cost(self.cost)
        if self.cost not in RELATIVE:
            raise InvalidValueError(
                f"budget {self}: only {', '.join(RELATIVE)} may be limited in percent of the full network's; give "
                f"{self.cost} as a number"
            )
        if not 0 < self.percent < math.inf:
            raise InvalidValueError(f"budget {self}: a limit is a finite number above 0, like {self.cost}=40%")

    def of(self, full: Mapping[str, float]) -> Budget:
        """Return the budget for a full network of these costs, by their names."""
        exact = Decimal(repr(float(full[self.cost]))) * Decimal(repr(float(self.percent))) / 100
        return Budget(self.cost, float(exact), self.percent)

    def __str__(self) -> str:
        return f"{self.cost}={self.percent:g}%"


def _check_cost(cost: str) -> None:
    if cost not in COSTS:
        raise InvalidValueError(f"budget on {cost!r}: the costs are {', '.join(COSTS)}; write macs=2.66M")


def parse_budget(text: str) -> Budget | RelativeBudget:
    """Read ``macs=2.66M`` or ``macs=40%``: a cost and a limit, plain or with k (or K), M, G or %.

    Raises InvalidValueError for any other text.
    """
    found = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kKMG%]?)\s*", text, re.ASCII)
    if not found:
        raise InvalidValueError(
            f"budget {text!r}: write COST=LIMIT, the limit a number above 0, plain or with k, M, G or %: "
            "macs=2.66M, macs=40% or latency_ms=1.5"
        )
    cost, number, suffix = found.groups()
    if suffix == "%":
        return RelativeBudget(cost, float(number))
    exponent = _SUFFIXES[suffix.replace("K", "k")]
    return Budget(cost, float(Decimal(number).scaleb(exponent)))  # 0.57 * 1e6 would fall short of 570000


def parse_budgets(text: str) -> list[Budget | RelativeBudget]:
    """Read budgets separated by commas, each on another cost, like ``macs=40%,latency_ms=1.5``."""
    budgets = [parse_budget(part) for part in text.split(",")]
    costs = [budget.cost for budget in budgets]
    if len(set(costs)) < len(costs):
        raise InvalidValueError(f"budget {text!r}: limits a cost twice; name each once")
    return budgets


def amounts(budgets: Iterable[Budget | RelativeBudget], full: Mapping[str, float]) -> list[Budget]:
    """Return the budgets as amounts, for a full network of these costs, by their names."""
    return [budget.of(full) if isinstance(budget, RelativeBudget) else budget for budget in budgets]


def format_amount(amount: float) -> str:
    """Return a number as budgets are written, like 2.66M: with k, M or G from a thousand on, and every digit."""
    exact = Decimal(repr(float(amount)))
    suffix = next((letter for letter in "GMk" if exact >= 10 ** _SUFFIXES[letter]), "")
    digits = f"{exact.scaleb(-_SUFFIXES[suffix]):f}"
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + suffix


def readable_amount(cost: str, amount: float) -> str:
    """Return `format_amount`; of a measured time only four digits, rounded up, so that the amount itself fits."""
    if cost != "latency_ms":
        return format_amount(amount)
    exact = Decimal(repr(float(amount)))
    step = Decimal(1).scaleb(exact.adjusted() - 3)
    return format_amount(float(exact.quantize(step, ROUND_CEILING)))
