"""Stage `search`: evaluate configurations in the supernets, and select under the budgets (section 5.1).

The whole space is evaluated in shards, or a strategy chooses configurations in rounds (`pipelines.stages.rounds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from gross_ray.data.image_set import tensor_of
from gross_ray.errors import InvalidValueError, MissingStageError
from gross_ray.nn.batch_norm import calibration_images
from gross_ray.run.opened import Run
from gross_ray.run.progress import finished_units
from gross_ray.run.searched import evaluated_accuracies, evaluated_units, score_units
from gross_ray.run.store import RunStore
from gross_ray.search.batch_plan import default_memory_budget
from gross_ray.search.budgets import Budget
from gross_ray.search.cost import LayerCosts, counted_costs
from gross_ray.search.evaluator import Evaluator
from gross_ray.search.layer_forms import LayerForm
from gross_ray.search.options import EvaluationOptions
from gross_ray.search.selection import NearBest, best_of_chunks, front_of_chunks, near_best, select, uniform
from gross_ray.search.sharding import PrefixCosts, segment_macs
from gross_ray.space import DENSE, Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet
from pipelines.stages import finetune, latencies, rounds, supernets
from pipelines.stages.base import Driver
from pipelines.stages.rounds import RoundPart
from pipelines.stages.supernets import InSupernet, Supernet
from pipelines.units import Context, Job, Unit, require

NAME = rounds.SEARCH
PLAN = "search-plan"
SHARDS_A_WORKER = 4
"""Shards of one supernet for each worker. More shards lose less work with a worker and share the work more evenly, but
compute more prefixes repeatedly."""
MOST_CONFIGURATIONS = 20_000
"""Maximum number of configurations in a shard: a worker keeps their results in memory until they are stored."""
MOST_EXHAUSTIVE = 5_000_000
"""Maximum number of configurations in a space that is searched whole."""
LEAST_BUDGET = 4 * 2**20
"""Minimum bytes of live tensors for a worker, even if its share of the cache is smaller: then overhead dominates."""


@dataclass(frozen=True, kw_only=True)
class Shard(InSupernet):
    """Neighbouring configurations of the space, which share prefixes, in one supernet."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        """Like alpha=0,scaling=index,seed=0,start=0,stop=63."""
        return f"{self.supernet.name},start={self.start},stop={self.stop}"

    def configurations_of(self, space: SearchSpace) -> list[Configuration]:
        """Return the configurations to evaluate."""
        return space[self.start : self.stop]


Part = Shard | RoundPart
"""A unit of the search."""


@dataclass(frozen=True, kw_only=True)
class Planning(InSupernet):
    """The planning of the search: a worker times the layers, with the same threads as the shards."""

    workers: int
    threads: int
    units_on_a_device: int

    @property
    def name(self) -> str:
        """Always plan."""
        return "plan"


@dataclass(frozen=True)
class SearchPlan:
    """The shards of the space and the forms of the layers, decided once for a run folder, also for a resumed run."""

    shards: list[range]
    forms: dict[str, LayerForm]
    memory_budget: int
    """Bytes of live tensors on each worker."""


def load_plan(run: Run) -> SearchPlan:
    """Return the stored plan; raises MissingStageError if the search has not begun."""
    return run.once(PLAN, lambda: _read_plan(run.store), depends=[NAME])


def _read_plan(store: RunStore) -> SearchPlan:
    _, about = store.load_checkpoint(PLAN, "plan")
    return SearchPlan(
        [range(start, stop) for start, stop in about["shards"]],
        {
            name: LayerForm({int(size): each for size, each in form["by_size"].items()}, form["stacked"])
            for name, form in about["forms"].items()
        },
        about["memory_budget"],
    )


def parts(run: Run, units: Sequence[Supernet]) -> list[Part]:
    """Return the units that evaluate the space in each supernet.

    For a search by a strategy, these are the stored rounds; for supernets of the sweep alone, round 0. Raises
    MissingStageError if the plan or round 0 is not stored.
    """
    planned = load_plan(run).shards
    if not by_strategy(run):
        return [
            Shard(supernet=unit, start=shard.start, stop=shard.stop, cost=len(shard))
            for unit in units
            for shard in planned
        ]
    searched, found = set(supernets.searched(run)), rounds.stored(run)
    if not found:
        raise MissingStageError(f"the search in {run.store.storage} has no first round: run `gross search` on it first")
    return [
        part
        for unit in units
        for number, configurations in enumerate(found if unit in searched else found[:1])
        for part in rounds.units(unit, number, configurations)
    ]


def plan(run: Run) -> Sequence[Part]:
    """Return the units of the searched supernets; raises MissingStageError if the search has not begun."""
    return run.once(f"{NAME} plan", lambda: parts(run, supernets.searched(run)), depends=[NAME])


def done(run: Run) -> set[str]:
    """Return the names of the units that are stored."""
    return finished_units(run.store, NAME)


def do(driver: Driver) -> None:
    """Evaluate the missing configurations of the space or of a strategy's rounds, and select."""
    run = driver.run
    budgets(run)  # raises for a budget that no configuration has, before the search
    if by_strategy(run):
        _propose(driver, rounds.Proposals(run))
    else:
        check_size(run.space)
        evaluate(driver, NAME, supernets.searched(run))
    if model := latencies.in_force(run):
        latencies.fill(run, model)
    choose(run)


def check_size(space: SearchSpace) -> None:
    """Raise InvalidValueError for a space that is too large for a search of all configurations."""
    if space.size > MOST_EXHAUSTIVE:
        raise InvalidValueError(
            f"search.strategy = 'exhaustive': the space has {space.size:,} configurations; let a strategy choose some "
            "of them, like search.strategy=surrogate with search.evaluations=2000"
        )


def by_strategy(run: Run) -> bool:
    """Return whether a strategy chooses the configurations to evaluate; if not, all are evaluated."""
    return run.experiment.search.strategy != "exhaustive"


def _propose(driver: Driver, proposals: rounds.Proposals) -> None:
    """Evaluate round after round in the searched supernets."""
    run, searched = driver.run, supernets.searched(driver.run)
    _prepare(driver, searched)
    number, (configurations, *_) = 0, rounds.stored(run)
    while configurations:
        units = [part for unit in searched for part in rounds.units(unit, number, configurations)]
        _evaluate(driver, f"{NAME} round {number}", units)
        proposals.learn(configurations, [unit.name for unit in units])
        number, configurations = number + 1, proposals.next_round()
    rounds.end(run)


def evaluate(driver: Driver, shown: str, units: Sequence[Supernet]) -> None:
    """Evaluate the space in each of the supernets: the units that `parts` returns."""
    _prepare(driver, units)
    _evaluate(driver, shown, parts(driver.run, units))


def _prepare(driver: Driver, units: Sequence[Supernet]) -> None:
    """Store the plan of the search and the first round of a strategy, unless they are stored.

    If a lost plan was made again, evaluations of shards that the new plan also has are kept. Other shards of an
    exhaustive search overlap the new ones and are deleted, also if the driver that made the plan was killed.
    """
    run = driver.run
    if not run.store.has_checkpoint(PLAN, "plan"):
        require(run.store, finetune.NAME, {units[0].name}, finetune.done(run))
        _make_plan(driver, units[0])
    if by_strategy(run):
        rounds.begin(run)
        return
    planned = {part.name for part in parts(run, [*supernets.searched(run), *supernets.swept(run)])}
    for name in done(run) - planned:
        run.store.delete_unit("configurations", name)


def _evaluate(driver: Driver, shown: str, units: Sequence[Part]) -> None:
    run, stored = driver.run, done(driver.run)
    searched = supernets.searched(run)
    if any(unit.supernet in searched and unit.name not in stored for unit in units):
        for name in run.store.units("scores"):  # each score depends on all evaluations
            run.store.delete_unit("scores", name)
    require(run.store, finetune.NAME, {unit.shared for unit in units if unit.name not in stored}, finetune.done(run))
    driver.do(_job(driver, shown, units, work))


def _job(driver: Driver, shown: str, units: Sequence[Unit], work: Any) -> Job:
    run = driver.run
    return Job(
        stage=shown,
        units=units,
        work=work,
        done=lambda: {"plan"} & run.store.finished_checkpoints(PLAN) if work is plan_work else done(run),
        kind=NAME,
        num_equal=None,  # the capacity is unknown here: Ray is started only when a unit is missing
        shared=lambda name: load_shared(run.store, name),
    )


def _make_plan(driver: Driver, supernet: Supernet) -> None:
    """Plan the search on a worker: shards for the present workers, and the fastest forms of the layers."""
    workers = driver.capacity.slots()
    threads = driver.threads(NAME, None)
    unit = Planning(
        supernet=supernet,
        workers=workers,
        threads=threads,
        units_on_a_device=driver.capacity.units_on_a_device(threads),
    )
    driver.do(_job(driver, f"{NAME} plan", [unit], plan_work))


def load_shared(store: RunStore, supernet: str) -> dict[str, Any]:
    """Return a supernet's weights as arrays, and its group-sizes."""
    tensors, about = store.load_checkpoint(finetune.NAME, supernet)
    return {"group_sizes": about["group_sizes"], "weights": {name: t.numpy() for name, t in tensors.items()}}


@dataclass(frozen=True)
class _Searched:
    """A supernet on a worker: its evaluator and the costs of its layers."""

    evaluator: Evaluator
    costs: dict[str, LayerCosts | None]

    @classmethod
    def of(
        cls, context: Context, forms: dict[str, LayerForm] | None, memory_budget: int, automatic: int | None = None
    ) -> _Searched:
        """Build the supernet from the shared weights; a `memory_budget` of 0 is `automatic`."""
        run = context.run
        supernet = _empty(context)
        weights = {name: tensor_of(array) for name, array in context.shared["weights"].items()}
        supernet.load_state_dict(weights, assign=True)  # workers of a node share one copy of the weights
        supernet.eval()
        costs = counted_costs(supernet, run.base.input_shape)
        search = run.experiment.search
        options = EvaluationOptions(memory_budget=memory_budget or None, form=search.form, precision=search.precision)
        normalisation = context.splits.validation.normalisation
        evaluator = Evaluator(
            supernet.to(context.device), options, forms=forms, normalisation=normalisation, automatic_budget=automatic
        )
        return cls(evaluator, costs)


def _empty(context: Context) -> nn.Module:
    return empty_supernet(context.run.base.network, context.shared["group_sizes"])


def plan_work(context: Context, unit: Planning) -> str:
    """Compute and store the plan of the search."""
    run = context.run
    whole = default_memory_budget(torch.device(context.device))  # workers share a node's cache or a GPU
    automatic = max(whole // unit.units_on_a_device, LEAST_BUDGET)
    evaluator = _Searched.of(context, None, run.experiment.search.memory_budget, automatic).evaluator
    space, validation = run.space, context.splits.validation
    evaluator.evaluate(validation.images[:1], validation.labels[:1], space[:1])
    num = max(SHARDS_A_WORKER * unit.workers, -(-space.size // MOST_CONFIGURATIONS))
    cut = [] if by_strategy(run) else PrefixCosts(space, segment_macs(_empty(context), run.base.input_shape)).cut(num)
    about = {
        "shards": [[shard.start, shard.stop] for shard in cut],
        "forms": {name: asdict(form) for name, form in evaluator.forms.items()},
        "memory_budget": evaluator.memory_budget,
    }
    context.store.save_checkpoint(PLAN, "plan", {}, about)
    found = f"{space.size} configurations" + (f" in {len(cut)} shards" if cut else "")
    if reason := evaluator.not_traceable:
        return f"{found}, one by one: this network cannot be traced ({reason})"
    if reason := evaluator.why_one_by_one(calibrated=run.experiment.engine.recalibrate):
        return f"{found}, one by one: {reason}, and takes the statistics of both (engine.recalibrate)"
    forms = [form for each in evaluator.forms.values() for size, form in each.by_size.items() if size != DENSE]
    return f"{found}; {forms.count('bottleneck')} of {len(forms)} layer forms as bottlenecks"


def work(context: Context, unit: Part) -> str:
    """Evaluate one part of the space in one supernet on the validation split."""
    run, validation = context.run, context.splits.validation
    if unit.shared not in context.kept:
        context.kept.clear()  # keep only one supernet
        planned = load_plan(run)
        context.kept[unit.shared] = _Searched.of(context, planned.forms, planned.memory_budget)
    searched: _Searched = context.kept[unit.shared]
    configurations = unit.configurations_of(run.space)
    calibration = calibration_images(context.splits.train) if run.experiment.engine.recalibrate else None
    correct, loss = searched.evaluator.evaluate(validation.images, validation.labels, configurations, calibration)
    total = len(validation.labels)
    layers = [f"layer {layer}" for layer in run.space.layers]
    costs_of = [
        [None] * len(configurations) if cost is None else cost.of(configurations).tolist()
        for cost in searched.costs.values()
    ]
    rows = [
        {
            "supernet": unit.supernet.name,
            **unit.supernet.values(),
            "configuration": str(configuration),
            **dict(zip(layers, configuration, strict=True)),
            **dict(zip(searched.costs, costs, strict=True)),
            "val_correct": count,
            "val_total": total,
            "val_accuracy": count / total,
            "val_loss": loss_sum / total,
            "latency_ms": None,
        }
        for configuration, count, loss_sum, *costs in zip(
            configurations,
            correct.tolist(),
            loss.tolist(),
            *costs_of,
            strict=True,
        )
    ]
    context.store.write_table("configurations", unit.name, rows, layers=run.space.layers)
    return f"{len(rows)} configurations, best {int(correct.max()) / total:.4f}"


def budgets(run: Run) -> list[Configuration]:
    """Return the fixed configurations whose MACs are the budgets."""
    return [uniform(run.space, size) for size in run.experiment.search.budgets]


def accuracies(run: Run) -> Iterator[pd.DataFrame]:
    """Yield `scores.scored` of the searched supernets, one part of the space at a time.

    Raises MissingStageError if an evaluation is missing.
    """
    return evaluated_accuracies(run.store, _evaluated(run))


def _evaluated(run: Run) -> pd.DataFrame:
    """Return `evaluated_units` of the searched supernets; raises MissingStageError if an evaluation is missing."""
    units, stored = plan(run), done(run)
    missing = [unit.name for unit in units if unit.name not in stored]
    if missing:
        raise MissingStageError(
            f"{len(missing)} of {len(units)} shards are not stored in {run.store.storage}: run `gross search "
            f"{run.store.storage}` first"
        )
    return evaluated_units(run.store, [unit.name for unit in units])


def best(run: Run, budgets: Sequence[Budget], top: int) -> pd.DataFrame:
    """Return the `top` configurations of the highest score within all budgets (`best_under`)."""
    return best_of_chunks(accuracies(run), budgets, top)


def near(run: Run, budgets: Sequence[Budget], best: pd.Series, *, without: str = "") -> NearBest:
    """Return the configurations within one standard error of `best` (`near_best`), leaving out `without`."""
    chunks = (part[part["configuration"] != without] for part in accuracies(run))
    return near_best(chunks, budgets, best)


def front(run: Run, costs: Sequence[str]) -> pd.DataFrame:
    """Return the Pareto front of the score and one or more costs (`pareto_front`)."""
    return front_of_chunks(accuracies(run), cost=costs)


def choose(run: Run) -> None:
    """Store the scores of all evaluated configurations, and a selection for each budget, unless they are stored."""
    _store_scores(run)
    units = {f"budget={budget}": str(budget) for budget in budgets(run)}
    missing = units.keys() - run.store.finished_units("selections")
    if not missing:
        return
    names = list(units.values())
    fixed = pd.concat([part[part["configuration"].isin(names)] for part in accuracies(run)])
    for unit in missing:
        name, top = units[unit], run.experiment.search.top
        limit = [Budget("macs", float(fixed.loc[fixed["configuration"] == name, "macs"].iloc[0]))]
        candidates = best(run, limit, top + 1)  # it may include the fixed configuration
        others = candidates[candidates["configuration"] != name]
        if others["standard_error"].notna().any():
            candidates = pd.concat([candidates, near(run, limit, others.iloc[0], without=name).cheapest])
        candidates = pd.concat([candidates, fixed]).drop_duplicates("configuration", ignore_index=True)
        run.store.write_table("selections", unit, select(candidates, name, top).to_dict("records"))
    run.changed(NAME)


def _store_scores(run: Run) -> None:
    units = _evaluated(run)
    names, stored = score_units(run.store, units), run.store.finished_units("scores")
    if set(names) <= stored:
        return
    for name in stored:
        run.store.delete_unit("scores", name)
    for name, part in zip(names, evaluated_accuracies(run.store, units), strict=True):
        rows = part[["configuration", "score", "standard_error"]]
        run.store.write_table("scores", name, rows.astype(object).where(rows.notna(), None).to_dict("records"))
