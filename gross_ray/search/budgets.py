"""Upper limits on the costs of a configuration, as users write them: ``macs=2.66M``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from gross_ray.errors import InvalidValueError

COSTS = ("macs", "macs_paper", "parameters", "latency_ms")
"""The costs of a configuration: columns of the `configurations` table."""
_SUFFIXES = {"": 0, "k": 3, "M": 6, "G": 9}


@dataclass(frozen=True)
class Budget:
    """An upper limit on one cost of a configuration, written ``macs=2.66M``."""

    cost: str
    """What is limited: one of `COSTS`."""
    limit: float
    """The most that a configuration may cost, in the unit of that column."""

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise InvalidValueError(f"budget on {self.cost!r}: the costs are {', '.join(COSTS)}; write macs=2.66M")
        if not 0 < self.limit < math.inf:
            raise InvalidValueError(
                f"budget {self.cost}={self.limit}: a limit is a finite number above 0, like {self.cost}=2.66M"
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``macs=2.66M``: a cost and a limit, plain or with k (or K), M or G; else raise InvalidValueError."""
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9]+\.?[0-9]*|\.[0-9]+)([kKMG]?)\s*", text, re.ASCII)
        if not found:
            raise InvalidValueError(
                f"budget {text!r}: write COST=LIMIT, the limit a number above 0, plain or with k, M or G: "
                "macs=2.66M or latency_ms=1.5"
            )
        cost, number, suffix = found.groups()
        exponent = _SUFFIXES[suffix.replace("K", "k")]
        return cls(cost, float(Decimal(number).scaleb(exponent)))  # 0.57 * 1e6 would fall short of 570000

    @classmethod
    def parse_all(cls, text: str) -> list[Budget]:
        """Read budgets separated by commas, each on another cost, like ``macs=2.66M,latency_ms=1.5``."""
        budgets = [cls.parse(part) for part in text.split(",")]
        costs = [budget.cost for budget in budgets]
        if len(set(costs)) < len(costs):
            raise InvalidValueError(f"budget {text!r}: limits a cost twice; name each once")
        return budgets

    def __str__(self) -> str:
        return f"{self.cost}={format_amount(self.limit)}"


def format_amount(amount: float) -> str:
    """Return a number as budgets are written, like 2.66M: with k, M or G from a thousand on, and every digit."""
    exact = Decimal(repr(float(amount)))
    suffix = next((letter for letter in "GMk" if exact >= 10 ** _SUFFIXES[letter]), "")
    digits = f"{exact.scaleb(-_SUFFIXES[suffix]):f}"
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + suffix
