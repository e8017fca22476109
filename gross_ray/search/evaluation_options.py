"""How configurations are evaluated: batches, forms and precision."""

from __future__ import annotations

from dataclasses import dataclass

from gross_ray.errors import InvalidValueError, is_whole
from gross_ray.precision import PRECISIONS
from gross_ray.search.layer_forms import FORMS

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
