"""Stage `search`: configurations of the supernets; then the selection (section 5.1).

All of them, in shards, or as many rounds as a strategy is given (`pipelines.rounds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch

from gross_ray.errors import InvalidValueError, MissingStageError
from gross_ray.nn.batch_norm import calibration_images
from gross_ray.run.store import RunStore
from gross_ray.search.batch_plan import default_memory_budget
from gross_ray.search.cost import CostTable
from gross_ray.search.evaluator import Evaluator
from gross_ray.search.layer_forms import LayerForm
from gross_ray.search.options import EvaluationOptions
from gross_ray.search.selection import (
    COSTS,
    Budget,
    best_of_chunks,
    front_of_chunks,
    select,
    supernet_accuracies,
    uniform,
)
from gross_ray.search.sharding import PrefixCosts, segment_macs
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet
from pipelines import rounds
from pipelines import supernet as supernets
from pipelines.networks import Base, load_base
from pipelines.predictions import fill, stored_model
from pipelines.session import Session
from pipelines.units import Context, Unit, require, tensor_of

STAGE = "search"
PLAN = "search-plan"
SHARDS_A_WORKER = 4
"""Shards of one supernet for each worker there is when the search is planned: what a lost worker costs, and how even
the workers' shares are, against prefixes computed more than once."""
MOST_CONFIGURATIONS = 20_000
"""Configurations of one shard at most: what a worker holds in memory until they are stored."""
MOST_EXHAUSTIVE = 5_000_000
"""Configurations of a space that is searched whole at most."""
LEAST_BUDGET = 4 * 2**20
"""Bytes of live tensors that a worker's share of the cache is taken for at least: below, overhead decides."""


@dataclass(frozen=True)
class SearchPlan:
    """How the space is cut and how layers run, decided once for a run folder: a run that is resumed keeps to it."""

    shards: list[range]
    forms: dict[str, LayerForm]
    memory_budget: int
    """Bytes of live tensors on each worker."""


def load_plan(store: RunStore) -> SearchPlan:
    """Return the stored plan; raises MissingStageError before the search has begun."""
    _, about = store.load_checkpoint(PLAN, "plan")
    return SearchPlan(
        [range(start, stop) for start, stop in about["shards"]],
        {
            name: LayerForm({int(size): each for size, each in form["by_size"].items()}, form["stacked"])
            for name, form in about["forms"].items()
        },
        about["memory_budget"],
    )


def shards(store: RunStore, supernet_units: Sequence[Unit]) -> list[Unit]:
    """Return the units that evaluate the space in each supernet: neighbours, which share prefixes, together.

    Of a search by a strategy, the rounds so far; of supernets that are not the search's, the first one.
    """
    planned = load_plan(store).shards
    if by_strategy(store):
        searched, found = {unit.name for unit in supernets.plan(store)}, rounds.stored(store)
        return [
            unit
            for one in supernet_units
            for number, some in enumerate(found if one.name in searched else found[:1])
            for unit in rounds.units(one, number, some)
        ]
    return [
        Unit(
            f"{unit.name},start={shard.start},stop={shard.stop}",
            {"supernet": unit.name, **unit.arguments, "start": shard.start, "stop": shard.stop},
            len(shard),
            shared=unit.name,
        )
        for unit in supernet_units
        for shard in planned
    ]


def plan(store: RunStore) -> list[Unit]:
    """Return the shards of the supernets that are searched; raises MissingStageError before the search has begun."""
    return shards(store, supernets.plan(store))


def finished(store: RunStore) -> set[str]:
    """Return the shards that are stored."""
    return store.finished_units("configurations")


def run(session: Session) -> None:
    """Evaluate what is missing of the space, or of a strategy's rounds, and select."""
    store = session.store
    budgets(store)  # one that no configuration has is found now, not after the search
    if by_strategy(store):
        _propose(session, rounds.Proposals(store))
    else:
        check_size(load_base(store).space)
        evaluate(session, STAGE, supernets.plan(store))
    if model := stored_model(store):
        fill(store, model)
    choose(store)


def check_size(space: SearchSpace) -> None:
    """Raise InvalidValueError for a space that is too large to be searched whole."""
    if space.size > MOST_EXHAUSTIVE:
        raise InvalidValueError(
            f"search.strategy = 'exhaustive': the space has {space.size:,} configurations; let a strategy choose some "
            "of them, like search.strategy=surrogate with search.evaluations=2000"
        )


def by_strategy(store: RunStore) -> bool:
    """Return whether a strategy proposes what is evaluated; else it is the whole space."""
    return store.experiment.search.strategy != "exhaustive"


def _propose(session: Session, proposals: rounds.Proposals) -> None:
    """Evaluate round after round in the search's supernets."""
    store, supernet_units = session.store, supernets.plan(session.store)
    _prepare(session, supernet_units)
    number, (some, *_) = 0, rounds.stored(store)
    while some:
        units = [unit for one in supernet_units for unit in rounds.units(one, number, some)]
        _evaluate(session, f"{STAGE} round {number}", units)
        proposals.learn(some, [unit.name for unit in units])
        number, some = number + 1, proposals.next_round()
    rounds.end(store)


def evaluate(session: Session, stage: str, supernet_units: Sequence[Unit]) -> None:
    """Evaluate the whole space in each of the supernets; where a strategy searches, the rounds that `shards` tells."""
    _prepare(session, supernet_units)
    _evaluate(session, stage, shards(session.store, supernet_units))


def _prepare(session: Session, supernet_units: Sequence[Unit]) -> None:
    """Plan the search, unless it is planned."""
    store = session.store
    trained = supernets.finished(store, supernets.FINETUNE)
    if not store.has_checkpoint(PLAN, "plan"):
        require(store, supernets.FINETUNE, {supernet_units[0].name}, trained)
        _make_plan(session, supernet_units[0].name)
    if by_strategy(store):
        rounds.begin(store)


def _evaluate(session: Session, stage: str, units: Sequence[Unit]) -> None:
    store = session.store
    trained = supernets.finished(store, supernets.FINETUNE)
    done = finished(store)
    require(store, supernets.FINETUNE, {unit.shared for unit in units if unit.name not in done}, trained)
    session.run(stage, units, work, lambda: finished(store), shared=lambda name: load_shared(store, name))


def _make_plan(session: Session, supernet: str) -> None:
    """Cut the space for the workers there are, and have one of them time the forms of the layers."""
    store = session.store

    def planned() -> set[str]:
        return {"plan"} if store.has_checkpoint(PLAN, "plan") else set()

    for name in store.finished_units("configurations"):  # of a plan that is lost: its shards would overlap the new ones
        store.delete_unit("configurations", name)
    cluster = session.cluster()
    workers = cluster.slots()
    threads = cluster.threads(SHARDS_A_WORKER * workers)
    on_device = 1 / cluster.gpus_per_unit if cluster.device == "cuda" else cluster.cores_per_node / threads
    arguments = {"workers": workers, "threads": threads, "on_device": max(1, int(on_device))}
    session.run(
        f"{STAGE} plan",
        [Unit("plan", arguments, shared=supernet)],
        plan_work,
        planned,
        shared=lambda name: load_shared(store, name),
    )


def load_shared(store: RunStore, supernet: str) -> dict[str, Any]:
    """Return a supernet's weights as arrays, and its group-sizes."""
    tensors, about = store.load_checkpoint(supernets.FINETUNE, supernet)
    return {"group_sizes": about["group_sizes"], "weights": {name: t.numpy() for name, t in tensors.items()}}


@dataclass(frozen=True)
class _Searched:
    """A supernet on a worker, and what the rows of its configurations are made from."""

    base: Base
    evaluator: Evaluator
    actual: CostTable
    paper: CostTable

    @classmethod
    def of(cls, context: Context, forms: dict[str, LayerForm] | None, memory_budget: int) -> _Searched:
        base = load_base(context.store)
        supernet = empty_supernet(base.network, context.shared["group_sizes"])
        weights = {name: tensor_of(array) for name, array in context.shared["weights"].items()}
        supernet.load_state_dict(weights, assign=True)  # the node's one copy, not another one for each worker
        supernet.eval()
        actual, paper = (CostTable.of(supernet, base.input_shape, convention=one) for one in ("actual", "paper"))
        search = context.store.experiment.search
        options = EvaluationOptions(memory_budget=memory_budget, form=search.form, precision=search.precision)
        normalisation = context.splits.validation.normalisation
        evaluator = Evaluator(supernet.to(context.device), options, forms=forms, normalisation=normalisation)
        return cls(base, evaluator, actual, paper)


def plan_work(context: Context, unit: Unit) -> str:
    """Store the plan of the search."""
    workers, threads, on_device = (unit.arguments[name] for name in ("workers", "threads", "on_device"))
    torch.set_num_threads(threads)  # those that the shards will have, for the forms are timed here
    memory_budget = context.store.experiment.search.memory_budget
    if not memory_budget:  # workers share a node's cache, or a GPU
        memory_budget = max(default_memory_budget(torch.device(context.device)) // on_device, LEAST_BUDGET)
    searched = _Searched.of(context, None, memory_budget)
    base, validation = searched.base, context.splits.validation
    searched.evaluator.evaluate(validation.images[:1], validation.labels[:1], base.space[:1])
    forms = searched.evaluator.forms
    supernet = empty_supernet(base.network, context.shared["group_sizes"])
    num = max(SHARDS_A_WORKER * workers, -(-base.space.size // MOST_CONFIGURATIONS))
    whole = not by_strategy(context.store)
    cut = PrefixCosts(base.space, segment_macs(supernet, base.input_shape)).cut(num) if whole else []
    about = {
        "shards": [[shard.start, shard.stop] for shard in cut],
        "forms": {name: asdict(form) for name, form in forms.items()},
        "memory_budget": memory_budget,
    }
    context.store.save_checkpoint(PLAN, "plan", {}, about)
    found = f"{base.space.size} configurations" + (f" in {len(cut)} shards" if whole else "")
    if reason := searched.evaluator.not_traceable:
        return f"{found}, one by one: this network cannot be traced ({reason})"
    if reason := searched.evaluator.why_one_by_one(calibrated=context.store.experiment.engine.recalibrate):
        return f"{found}, one by one: {reason}, and takes the statistics of both (engine.recalibrate)"
    bottlenecks = sum(one == "bottleneck" for form in forms.values() for one in form.by_size.values())
    return f"{found}; {bottlenecks} of {sum(len(form.by_size) for form in forms.values())} layer forms as bottlenecks"


def work(context: Context, unit: Unit) -> str:
    """Evaluate one shard of one supernet on the validation split."""
    arguments, store = unit.arguments, context.store
    if arguments["supernet"] not in context.kept:
        context.kept.clear()  # one supernet at a time
        planned = load_plan(store)
        context.kept[arguments["supernet"]] = _Searched.of(context, planned.forms, planned.memory_budget)
    searched: _Searched = context.kept[arguments["supernet"]]
    base, validation = searched.base, context.splits.validation
    if "configurations" in arguments:
        configurations = [Configuration.parse(text) for text in arguments["configurations"]]
    else:
        configurations = base.space[arguments["start"] : arguments["stop"]]
    calibration = calibration_images(context.splits.train) if store.experiment.engine.recalibrate else None
    correct, loss = searched.evaluator.evaluate(validation.images, validation.labels, configurations, calibration)
    total = len(validation.labels)
    layers = [f"layer {layer}" for layer in base.space.layers]
    rows = [
        {
            "supernet": arguments["supernet"],
            "alpha": arguments["alpha"],
            "scaling": arguments["scaling"],
            "seed": arguments["seed"],
            "configuration": str(configuration),
            **dict(zip(layers, configuration, strict=True)),
            "macs": macs,
            "macs_paper": macs_paper,
            "parameters": parameters,
            "val_correct": count,
            "val_total": total,
            "val_accuracy": count / total,
            "val_loss": loss_sum / total,
            "latency_ms": None,
        }
        for configuration, count, loss_sum, macs, macs_paper, parameters in zip(
            configurations,
            correct.tolist(),
            loss.tolist(),
            searched.actual.macs_of_all(configurations),
            searched.paper.macs_of_all(configurations),
            searched.actual.parameters_of_all(configurations),
            strict=True,
        )
    ]
    store.write_table("configurations", unit.name, rows, layers=base.space.layers)
    return f"{len(rows)} configurations, best {int(correct.max()) / total:.4f}"


def budgets(store: RunStore) -> list[Configuration]:
    """Return the fixed configurations whose MACs are the budgets."""
    if not store.experiment.search.budgets:
        return []
    space = load_base(store).space
    return [uniform(space, budget) for budget in store.experiment.search.budgets]


def accuracies(store: RunStore) -> Iterator[pd.DataFrame]:
    """Return what `supernet_accuracies` gives for the supernets that are searched, one shard's configurations a time.

    Raises MissingStageError unless all are evaluated.
    """
    units = plan(store)
    missing = [unit.name for unit in units if not store.has_unit("configurations", unit.name)]
    if missing:
        raise MissingStageError(
            f"{len(missing)} of {len(units)} shards are not stored in {store.storage}: run `gross search` on it first"
        )
    by_part: dict[str, list[str]] = {}
    for unit in units:
        by_part.setdefault(unit.name.removeprefix(unit.shared), []).append(unit.name)
    columns = ["configuration", *COSTS, "val_accuracy"]
    for names in by_part.values():
        yield supernet_accuracies(store.read_units("configurations", names, columns))


def best(store: RunStore, budgets: Sequence[Budget], top: int) -> pd.DataFrame:
    """Return the `top` most accurate configurations within all budgets (`best_under`)."""
    return best_of_chunks(accuracies(store), budgets, top)


def front(store: RunStore, costs: Sequence[str]) -> pd.DataFrame:
    """Return the Pareto front of accuracy and one or more costs (`pareto_front`)."""
    return front_of_chunks(accuracies(store), cost=costs)


def choose(store: RunStore) -> None:
    """Store the selected configurations of each budget that are not stored yet."""
    units = {f"budget={budget}": str(budget) for budget in budgets(store)}
    missing = units.keys() - store.finished_units("selections")
    if not missing:
        return
    names = list(units.values())
    fixed = pd.concat([part[part["configuration"].isin(names)] for part in accuracies(store)])
    for unit in missing:
        limit = fixed.loc[fixed["configuration"] == units[unit], "macs"]
        top = store.experiment.search.top
        within = best(store, [Budget("macs", float(limit.iloc[0]))], top + 1)  # the fixed one may be among them
        candidates = pd.concat([within, fixed]).drop_duplicates("configuration")
        store.write_table("selections", unit, select(candidates, units[unit], top).to_dict("records"))
