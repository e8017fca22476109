"""Options of the search: what is evaluated and selected, and in which batches, forms and precision."""

from __future__ import annotations

from dataclasses import dataclass

from gross_ray.errors import InvalidValueError, is_whole
from gross_ray.fields import require, require_group_sizes, settle
from gross_ray.nn.precision import PRECISIONS
from gross_ray.search.budgets import parse_budgets

FORMS = ("dense", "bottleneck")
"""The forms in which a decomposed layer can run."""
FORM_CHOICES = ("auto", *FORMS)
RUNTIMES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "torch",
    "compiled": "compiled torch",
}
"""The names of the runtimes as they are written in sentences, by name; `gross_ray.search.runtimes` has the runtimes."""
STRATEGY_NAMES = ("exhaustive", "surrogate", "breadth-first", "evolution", "random")
"""The names in `gross_ray.search.strategies`, which is slower to import than options may be."""

SCORES = ("smoothed-mean", "smoothed-median", "smoothed-loss", "mean", "median", "loss")
"""Allowed values of `search.score`, which `gross_ray.search.scores` computes."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How configurations are evaluated. Apart from `precision`, no option changes results by more than rounding."""

    batch_size: int | None = None
    """Images in a batch; None: as many as fit the memory budget."""
    memory_budget: int | None = None
    """Bytes that a batch's live tensors may take; None: the CPU's largest cache, or half of the GPU's free memory, and
    at least what one image needs."""
    form: str = "auto"
    """How decomposed layers run: dense, bottleneck, or auto (the faster of the two for each layer and group-size)."""
    precision: str = "float32"
    """float32 (the network's own dtype), tf32 (CUDA's faster products) or bfloat16 (autocast)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "memory_budget"):
            value = getattr(self, name)
            require(value is None or is_whole(value, 1), name, value, "must be 1 or more, a whole number")
        for name, choices in (("form", FORM_CHOICES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            require(value in choices, name, value, f"must be one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """Where latency is measured, and how often."""

    runtime: str = "onnxruntime"
    """onnxruntime, openvino, torch (eager mode) or compiled (torch.compile)."""
    batch_size: int = 1
    """Images in a batch."""
    threads: int = 1
    """CPU threads. One is timed by its CPU time; several by wall time, which needs an otherwise idle machine."""
    repeats: int = 5
    """Rounds; each takes one sample of all networks of a group that is timed together."""
    num_sampled: int = 0
    """How many whole networks are timed, at least as many as a layer has forms; 0: two and a half for each form of each
    layer, and 20 at least; up to three times as many while the median error is above 1.5 %."""

    def __post_init__(self) -> None:
        rule = f"must be one of {', '.join(RUNTIMES)}"
        require(self.runtime in RUNTIMES, "latency.runtime", self.runtime, rule)
        for name, least in (("batch_size", 1), ("threads", 1), ("repeats", 2)):
            value = getattr(self, name)
            require(is_whole(value, least), f"latency.{name}", value, f"must be a whole number, {least} or more")
        valid = is_whole(self.num_sampled, 2) or (is_whole(self.num_sampled, 0) and self.num_sampled == 0)
        rule = "must be a whole number, 2 or more, or 0: as many as the layers need"
        require(valid, "latency.num_sampled", self.num_sampled, rule)


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The search, exhaustive (section 5.1) or by a strategy, and the selection."""

    budgets: tuple[int, ...] = (16, 4)
    """Group-sizes: the MACs of the configuration with this group-size in every layer are a budget. May be empty if
    `limits` is not."""
    limits: tuple[str, ...] = ()
    """Further budgets, like "latency_ms=1.5", "macs=40%" or "macs=2.66M,parameters=60k" (both limits hold). A strategy
    searches within each, and the best configurations within each are retrained."""
    top: int = 2
    """How many configurations are selected under each budget."""
    score: str = "smoothed-mean"
    """By what configurations are ranked: their mean or median accuracy over the supernets (the paper: the median), or
    their mean loss, smoothed over the space or not (docs/method.md)."""
    strategy: str = "exhaustive"
    """exhaustive evaluates the whole space; surrogate, breadth-first, evolution and random propose a part of it."""
    evaluations: int = 0
    """How many configurations a strategy may evaluate, not counting the fixed ones; 0 with exhaustive."""
    form: str = "auto"
    """How decomposed layers run: dense, bottleneck, or auto (timed once, at the start; equal up to float rounding)."""
    precision: str = "float32"
    """float32, tf32 (CUDA only) or bfloat16: the latter two are faster on devices that support them, but change
    results."""
    memory_budget: int = 0
    """Bytes of live tensors on each worker; 0: its share of the CPU's largest cache, or of half of a GPU's memory, and
    at least what one image needs."""

    def __post_init__(self) -> None:
        settle(self, "search.")
        require(self.top >= 1, "search.top", self.top, "must be 1 or more")
        for name, choices in (
            ("form", FORM_CHOICES),
            ("precision", PRECISIONS),
            ("strategy", STRATEGY_NAMES),
            ("score", SCORES),
        ):
            value = getattr(self, name)
            require(value in choices, f"search.{name}", value, f"must be one of {', '.join(choices)}")
        require(self.evaluations >= 0, "search.evaluations", self.evaluations, "must be 0 or more")
        whole = self.strategy == "exhaustive"
        rule = (
            "must be 0 with search.strategy=exhaustive, which evaluates all: leave it out"
            if whole
            else f"must be 1 or more with {self.strategy}"
        )
        require(whole == (self.evaluations == 0), "search.evaluations", self.evaluations, rule)
        require(self.memory_budget >= 0, "search.memory_budget", self.memory_budget, "must be 0 (automatic) or more")
        rule = "must name a group-size or more, like [16, 4], if search.limits is empty"
        require(bool(self.budgets or self.limits), "search.budgets", self.budgets, rule)
        require_group_sizes("search.budgets", self.budgets)
        for text in self.limits:
            try:
                parse_budgets(text)
            except InvalidValueError as error:
                raise InvalidValueError(f"search.limits: {error}") from None
        require(len(set(self.limits)) == len(self.limits), "search.limits", self.limits, "must name each once")
