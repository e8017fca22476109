"""Decide what to cut from a network, so that it is within a budget, for each method of `benchmarks/peers.py`.

A decision is one row: it has all that builds the same network again from the weights of the base network.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from peer_networks import Cut, decomposed, narrower, pruned, tucker, uniform_configurations, with_gradients
from peer_table import MORE, OURS
from torch import nn

from gross_ray.data.image_set import Splits
from gross_ray.defaults import compression_experiment
from gross_ray.experiment import Experiment
from gross_ray.export import export_onnx
from gross_ray.run.limits import budget_amounts
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.budgets import RelativeBudget, parse_budget
from gross_ray.search.cost import count_macs, count_parameters, layer_costs
from gross_ray.search.folding import fold_within
from gross_ray.search.forms import group_sizes_of
from gross_ray.search.latency import LatencyOptions, measure_relative, time_networks
from gross_ray.space import DENSE, Configuration
from gross_ray.supernet.build import empty_supernet, made_up
from gross_ray.supernet.configure import extract
from gross_ray.supernet.layers import LayerChoice, choice_of
from gross_ray.training.options import Schedule
from pipelines.stages import latencies, search

CLI = Path(__file__).parents[1] / "cli.py"
UNIFORM, NARROWER = "ours-uniform", "narrower"
MAGNITUDE, TAYLOR, TUCKER = "pruning-magnitude", "pruning-taylor", "tucker"
METHODS = (OURS, UNIFORM, MAGNITUDE, TAYLOR, TUCKER, NARROWER)
MACS, TIME = "macs", "ort_ms"
TOLERANCES = {MACS: 0.02, TIME: 0.05}
"""How far from the budget a cost may be, relative to the budget."""
ROUNDINGS = {MACS: (1,), TIME: (1, 4, 8)}
"""Multiples of channels or ranks that are tried: ONNX Runtime is slower at other numbers of channels."""
STEPS = {MACS: 16, TIME: 7}
"""Halvings of the interval of the ratio."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a method cuts for a budget, and what the network then costs: a row of the table `peer_networks`."""

    network: str
    method: str
    budget: str
    """Like macs=40% or ort_ms=60% of the full network's."""
    ratio: float = math.nan
    """The ratio of a `Cut`; NaN for the methods with a configuration."""
    round_to: int = 1
    """The multiple of a `Cut`."""
    configuration: str = ""
    """Group-sizes, for ours and ours-uniform."""
    forms: str = ""
    """The same with d for each layer that is folded into the dense convolution that it equals."""
    macs: int
    parameters: int
    ort_ms_1: float
    """Milliseconds for one image in ONNX Runtime on one thread, timed beside the full network."""
    ort_ms_64: float
    """The same for a batch of 64."""
    full_ort_ms_1: float
    """Milliseconds of the full network, timed in the same rounds as ort_ms_1."""
    decision_images: int = 0
    """Images that the decision was trained with: for ours the supernet and the candidates, else 0."""


def cost_of(budget: str) -> tuple[str, float]:
    """Return the cost that a budget like macs=40% limits, and the share of the full network's that it allows."""
    parsed = parse_budget(_as_gross_writes(budget))
    if not isinstance(parsed, RelativeBudget) or budget.partition("=")[0] not in TOLERANCES:
        raise SystemExit(f"budget {budget}: write one in percent of the full network, like macs=40% or ort_ms=60%")
    return budget.partition("=")[0], parsed.percent / 100


def _as_gross_writes(budget: str) -> str:
    return budget.replace(f"{TIME}=", "latency_ms=")


def nearest_within(cut: Cut, round_to: int, cost: Callable[[nn.Module], float], limit: float, steps: int) -> float:
    """Return the ratio of the most expensive network within `limit` that halving the interval 0 to 1 finds, or NaN."""
    low, high, best = 0.0, 1.0, (0.0, math.nan)
    for _ in range(steps):
        ratio = (low + high) / 2
        found = cost(cut(ratio, round_to))
        if found <= limit:
            high, best = ratio, max(best, (found, ratio))
        else:
            low = ratio
    return best[1]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One trained network with its images, and the folder in which the command compresses it."""

    name: str
    base: nn.Module
    splits: Splits
    data: str
    """The images, as `gross` names them."""
    weights: Path
    """The weights of `base`, as a file."""
    budgets: Sequence[str]
    out: Path
    """The run folder of the command."""
    effort: str
    """Of the command."""
    settings: Sequence[str] = ()
    """Further settings of the command."""
    repeats: int = 15
    """Rounds of a timing."""
    roundings: Mapping[str, Sequence[int]] = field(default_factory=lambda: ROUNDINGS)
    """By cost: the multiples of channels or ranks that are tried."""
    steps: Mapping[str, int] = field(default_factory=lambda: STEPS)
    """By cost: the halvings of the ratio's interval."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return tuple(self.splits.train.images.shape[1:])

    @cached_property
    def choice(self) -> LayerChoice:
        """The layers of the base network with all group-sizes that pay."""
        return choice_of(self.base, keep_dense=True, input_shape=self.shape)

    def times(self, network: nn.Module | Path, batch_size: int = 1) -> tuple[float, float]:
        """Return the milliseconds of a network and of the base network, timed in the same rounds."""
        options = LatencyOptions(batch_size=batch_size, repeats=self.repeats)
        timed = time_networks({"cut": network, "full": self._full_file}, self.shape, options)
        return timed["cut"].latency_ms, timed["full"].latency_ms

    @cached_property
    def _full_file(self) -> Path:
        """The base network as ONNX: exporting takes longer than timing."""
        path = self.weights.with_suffix(".onnx")
        export_onnx(self.base, path, self.shape)
        return path

    def relative(self, cost: str) -> Callable[[nn.Module], float]:
        """Return the function that returns a network's cost, relative to the base network's."""
        if cost == MACS:
            full = count_macs(self.base, self.shape)
            return lambda network: count_macs(network, self.shape) / full

        def time(network: nn.Module) -> float:
            cut, full = self.times(network)
            return cut / full

        return time

    def cut(self, method: str, seed: int = 0) -> Cut:
        """Return the `Cut` of a method; `seed` draws the weights of a narrower network."""
        if method == MAGNITUDE:
            return pruned(self.base, self.shape, tp.importance.GroupMagnitudeImportance(p=2))
        if method == TAYLOR:
            return pruned(self._with_gradients, self.shape, tp.importance.GroupTaylorImportance())
        return self._tucker if method == TUCKER else narrower(self.base, self.shape, seed)

    @cached_property
    def _with_gradients(self) -> nn.Module:
        return with_gradients(self.base, self.splits.train)

    @cached_property
    def _tucker(self) -> Cut:
        return tucker(self.base)

    def full(self) -> Decision:
        """Return the row of the base network itself."""
        return self._measured(self.base, method="full", budget="")

    def decide(self, method: str, budget: str) -> Decision | None:
        """Return the most expensive network within a budget that a method finds; None if it finds no network."""
        if method == OURS:
            return self._ours(budget)
        cost, limit = cost_of(budget)
        if method == UNIFORM:
            return self._uniform(budget, cost, limit)
        cut, relative, steps = self.cut(method), self.relative(cost), self.steps[cost]
        found = {each: nearest_within(cut, each, relative, limit, steps) for each in self.roundings[cost]}
        networks = {each: cut(ratio, each) for each, ratio in found.items() if not math.isnan(ratio)}
        if not networks:
            return None
        macs = {each: count_macs(network, self.shape) for each, network in networks.items()}
        best = max(macs, key=macs.__getitem__)
        return self._measured(networks[best], method=method, budget=budget, ratio=found[best], round_to=best)

    def _uniform(self, budget: str, cost: str, limit: float) -> Decision | None:
        """Return the largest group-size within the limit, though a smaller one may be slower."""
        supernet = made_up(empty_supernet(self.base, self.choice.group_sizes), torch.Generator().manual_seed(0))
        sizes = uniform_configurations(self.choice)
        if cost == MACS:
            full = count_macs(self.base, self.shape)
            shares = layer_costs(supernet, self.shape, MACS).of(sizes) / full
        else:
            shares = measure_relative(supernet, self.shape, LatencyOptions(repeats=self.repeats), sizes)
        for one, share in zip(sizes, shares.tolist(), strict=True):
            if share <= limit:
                text = str(one)
                return self._measured(
                    extract(supernet, one), method=UNIFORM, budget=budget, configuration=text, forms=text
                )
        return None

    def _ours(self, budget: str) -> Decision:
        """Return the configuration that `gross compress` selects, in the form that it writes."""
        run = self._run
        (limit,) = budget_amounts(run.store, [parse_budget(_as_gross_writes(budget))])
        names = search.best(run, [limit], run.experiment.search.top)["configuration"]
        trained = run.store.read_table("validations").groupby("configuration")["val_accuracy"].mean()
        chosen = Configuration.parse(trained[names].idxmax())
        configuration, model = dict(zip(run.space.layers, chosen, strict=True)), latencies.in_force(run)
        assert model is not None  # the command measures it
        assert list(configuration) == list(self.choice.group_sizes)  # `build` reads configurations in this order
        network, *_ = fold_within(self._decomposed(configuration, []), model, self.shape, [[limit]])
        sizes = group_sizes_of(network)
        return self._measured(
            network,
            method=OURS,
            budget=budget,
            configuration=str(chosen),
            forms=str(Configuration([sizes.get(layer, DENSE) for layer in configuration])),
            decision_images=self._images(run.experiment, len(names)),
        )

    @cached_property
    def _run(self) -> Run:
        """The finished run of `gross compress`, with all budgets in one supernet."""
        limits = list(map(_as_gross_writes, self.budgets))
        planned = self._planned(limits)
        words = ["--model", self.name, "--weights", str(self.weights), "--data", self.data]
        words += ["--budget", limits[0], "--effort", self.effort, "--out", str(self.out), "--in-process"]
        settings = [*self.settings, f"search.limits={json.dumps(limits)}"]
        if planned.search.evaluations:  # the limits take turns: each gets as many as it would have alone
            settings.append(f"search.evaluations={planned.search.evaluations * len(limits)}")
        words += [word for setting in settings for word in ("--set", setting)]
        words += ["--num-cpus", str(torch.get_num_threads())]
        if subprocess.run([sys.executable, str(CLI), "compress", *words], check=False).returncode:
            raise SystemExit(f"gross compress failed (its line is above): {' '.join(words)}")
        return Run(RunStore.open(self.out))

    def _planned(self, limits: Sequence[str]) -> Experiment:
        return compression_experiment(
            self.base, self.shape, budgets=limits[:1], num_images=len(self.splits.train), effort=self.effort
        ).override([setting for setting in self.settings if not setting.startswith("data.")])

    def _images(self, experiment: Experiment, candidates: int) -> int:
        """Return the images of the supernet's and the candidates' trainings, without those of range tests."""
        own = experiment.validation
        return sum(map(self._of, (experiment.reconstruction, experiment.finetuning))) + candidates * sum(
            map(self._of, (own.reconstruction, own.finetuning))
        )

    def _of(self, schedule: Schedule) -> int:
        return schedule.epochs * schedule.images_of(len(self.splits.train))

    def _decomposed(self, configuration: Mapping[str, int], folded: Sequence[str]) -> nn.Module:
        options = self._planned(["macs=50%"]).decomposition
        return decomposed(self.base, configuration, folded, options, seed=0)

    def build(self, decision: Decision, seed: int) -> nn.Module:
        """Return the network of a decision before its training; `seed` draws the weights of a narrower network."""
        method = decision.method.removesuffix(MORE)
        if method not in (OURS, UNIFORM):
            return self.cut(method, seed)(decision.ratio, decision.round_to)
        sizes, forms = map(Configuration.parse, (decision.configuration, decision.forms))
        configuration = dict(zip(self.choice.group_sizes, sizes, strict=True))
        written = zip(configuration.items(), forms, strict=True)
        folded = [layer for (layer, size), form in written if form == DENSE != size]
        return self._decomposed(configuration, folded)

    def _measured(self, network: nn.Module, **what: Any) -> Decision:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "cut.onnx"
            export_onnx(network, file, self.shape)
            (one, full), (many, _) = self.times(file), self.times(file, 64)
        return Decision(
            network=self.name,
            macs=count_macs(network, self.shape),
            parameters=count_parameters(network),
            ort_ms_1=one,
            ort_ms_64=many,
            full_ort_ms_1=full,
            **what,
        )

    def off_budget(self, decision: Decision) -> str:
        """Return a line about a network whose cost is farther from its budget than TOLERANCES, or nothing."""
        cost, limit = cost_of(decision.budget)
        full = count_macs(self.base, self.shape) if cost == MACS else decision.full_ort_ms_1
        share = asdict(decision)["macs" if cost == MACS else "ort_ms_1"] / full
        if abs(share / limit - 1) <= TOLERANCES[cost]:
            return ""
        return f"{decision.budget} {decision.method}: the nearest network found has {share:.1%} of the full network's"
