"""The options of the search: what is evaluated and selected, and in which batches, forms and precision."""

from __future__ import annotations

from dataclasses import dataclass

from gross_ray.errors import InvalidValueError, is_whole
from gross_ray.fields import require, require_group_sizes, settle
from gross_ray.nn.precision import PRECISIONS
from gross_ray.search.budgets import Budget

FORMS = ("dense", "bottleneck")
"""How a decomposed layer may run."""
FORM_CHOICES = ("auto", *FORMS)
STRATEGY_NAMES = ("exhaustive", "surrogate", "breadth-first", "evolution", "random")
"""The strategies of `gross_ray.search.strategies`, whose import takes what an experiment does not need."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How configurations are evaluated; the counts are the same up to float rounding whatever is chosen."""

    batch_size: int | None = None
    """Images of a batch; None: as many as fit the memory budget."""
    memory_budget: int | None = None
    """Bytes that a batch's live tensors may take; None: the CPU's largest cache, or half of the GPU's free memory."""
    form: str = "auto"
    """How decomposed layers run: dense, bottleneck, or auto: whichever each layer and group-size is faster in."""
    precision: str = "float32"
    """float32 (the network's own dtype), tf32 (CUDA's faster products) or bfloat16 (autocast): both change counts."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and not is_whole(self.batch_size, 1):
            raise InvalidValueError(f"batch_size = {self.batch_size}: must be 1 or more, a whole number")
        if self.memory_budget is not None and not is_whole(self.memory_budget, 1):
            raise InvalidValueError(f"memory_budget = {self.memory_budget} bytes: must be 1 or more, a whole number")
        if self.form not in FORM_CHOICES:
            raise InvalidValueError(f"form = {self.form!r}: must be one of {', '.join(FORM_CHOICES)}")
        if self.precision not in PRECISIONS:
            raise InvalidValueError(f"precision = {self.precision!r}: must be one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The search, exhaustive (section 5.1) or by a strategy, and the selection."""

    budgets: tuple[int, ...] = (16, 4)
    """Each names a fixed configuration (this group-size in every layer) whose MACs are a budget; may be empty where
    there are limits."""
    limits: tuple[str, ...] = ()
    """Budgets besides, like "latency_ms=1.5" or "macs=2.66M,parameters=60k" (all of them hold): the best within each
    are retrained too, and a strategy searches within each."""
    top: int = 2
    """How many configurations are selected under each budget."""
    strategy: str = "exhaustive"
    """What is evaluated: the whole space, or what surrogate, breadth-first, evolution or random propose."""
    evaluations: int = 0
    """Configurations that a strategy may evaluate, the fixed ones besides; 0 with the whole space."""
    form: str = "auto"
    """How decomposed layers run: dense, bottleneck, or auto (timed once, at the start; equal up to float rounding)."""
    precision: str = "float32"
    """float32, tf32 (CUDA only) or bfloat16: the latter two are faster where the device has them, and change counts."""
    memory_budget: int = 0
    """Bytes of live tensors on each worker; 0: its share of the CPU's largest cache, or of half of a GPU's memory."""

    def __post_init__(self) -> None:
        settle(self, "search.")
        require(self.top >= 1, "search.top", self.top, "must be 1 or more")
        for name, choices in (("form", FORM_CHOICES), ("precision", PRECISIONS), ("strategy", STRATEGY_NAMES)):
            value = getattr(self, name)
            require(value in choices, f"search.{name}", value, f"must be one of {', '.join(choices)}")
        require(self.evaluations >= 0, "search.evaluations", self.evaluations, "must be 0 or more")
        whole = self.strategy == "exhaustive"
        rule = "must be 0 with search.strategy=exhaustive" if whole else f"must be 1 or more with {self.strategy}"
        require(whole == (self.evaluations == 0), "search.evaluations", self.evaluations, rule)
        require(self.memory_budget >= 0, "search.memory_budget", self.memory_budget, "must be 0 (automatic) or more")
        rule = "must name a group-size or more, like [16, 4], where search.limits is empty"
        require(bool(self.budgets or self.limits), "search.budgets", self.budgets, rule)
        require_group_sizes("search.budgets", self.budgets)
        for text in self.limits:
            try:
                Budget.parse_all(text)
            except InvalidValueError as error:
                raise InvalidValueError(f"search.limits: {error}") from None
        require(len(set(self.limits)) == len(self.limits), "search.limits", self.limits, "must name each once")
