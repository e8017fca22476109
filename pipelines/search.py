"""Stage `search`: every configuration of the supernets, in shards; then the selection (section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence

from gross_ray.results.store import RunStore
from gross_ray.search.cost import CostTable
from gross_ray.search.evaluator import evaluate_configurations
from gross_ray.search.selection import select, supernet_accuracies, uniform
from gross_ray.space import Configuration
from pipelines import supernet as supernets
from pipelines.networks import load_base, load_supernet
from pipelines.session import Session
from pipelines.units import Context, Unit, require

STAGE = "search"


def shards(store: RunStore, supernet_units: Sequence[Unit]) -> list[Unit]:
    """Return the units that evaluate the whole space in each supernet: neighbours, which share prefixes, together."""
    size, total = store.experiment.search.shard_size, len(load_base(store).space)
    units = []
    for unit in supernet_units:
        for place, start in enumerate(range(0, total, size)):
            arguments = {"supernet": unit.name, **unit.arguments, "start": start, "stop": min(start + size, total)}
            units.append(Unit(f"{unit.name},shard={place}", arguments, arguments["stop"] - start))
    return units


def plan(store: RunStore) -> list[Unit]:
    """Return the shards of the supernets that are searched."""
    return shards(store, supernets.plan(store))


def finished(store: RunStore) -> set[str]:
    """Return the shards that are stored."""
    return store.finished_units("configurations")


def run(session: Session) -> None:
    """Evaluate the shards that are missing, and select."""
    evaluate(session, STAGE, supernets.plan(session.store))
    choose(session.store)


def evaluate(session: Session, stage: str, supernet_units: Sequence[Unit]) -> None:
    """Evaluate the whole space in each of the supernets."""
    store, units = session.store, shards(session.store, supernet_units)
    done = finished(store)
    searched = {unit.arguments["supernet"] for unit in units if unit.name not in done}
    require(store, supernets.FINETUNE, searched, supernets.finished(store, supernets.FINETUNE))
    session.run(stage, units, work, lambda: finished(store))


def work(context: Context, unit: Unit) -> str:
    """Evaluate one shard of one supernet on the validation split."""
    arguments, store = unit.arguments, context.store
    base = load_base(store)
    supernet = load_supernet(store, supernets.FINETUNE, arguments["supernet"], base)
    actual = CostTable.of(supernet, base.input_shape)
    paper = CostTable.of(supernet, base.input_shape, convention="paper")
    configurations = base.space[arguments["start"] : arguments["stop"]]
    validation = context.splits.validation
    evaluated = evaluate_configurations(
        supernet.to(context.device), validation.images, validation.labels, configurations
    )
    rows = [
        {
            "supernet": arguments["supernet"],
            "alpha": arguments["alpha"],
            "scaling": arguments["scaling"],
            "seed": arguments["seed"],
            "configuration": str(configuration),
            **{f"layer {layer}": size for layer, size in zip(base.space.layers, configuration, strict=True)},
            "macs": actual.macs(configuration),
            "macs_paper": paper.macs(configuration),
            "parameters": actual.parameters(configuration),
            "val_correct": int(result.correct),
            "val_total": int(result.total),
            "val_accuracy": float(result.accuracy),
            "val_loss": float(result.loss),
            "latency_ms": None,
        }
        for configuration, result in zip(configurations, evaluated.itertuples(), strict=True)
    ]
    store.write_table("configurations", unit.name, rows, layers=base.space.layers)
    return f"{len(rows)} configurations, best {evaluated['accuracy'].max():.4f}"


def budgets(store: RunStore) -> list[Configuration]:
    """Return the fixed configurations whose MACs are the budgets."""
    sizes = list(load_base(store).space.group_sizes.values())
    return [uniform(sizes, budget) for budget in store.experiment.search.budgets]


def choose(store: RunStore) -> None:
    """Store the selected configurations of each budget that are not stored yet."""
    units = {f"budget={budget}": budget for budget in budgets(store)}
    missing = units.keys() - store.finished_units("selections")
    if not missing:
        return
    searched = {unit.name for unit in supernets.plan(store)}
    table = store.read_table("configurations")
    accuracies = supernet_accuracies(table[table["supernet"].isin(searched)])
    for unit in missing:
        chosen = select(accuracies, str(units[unit]), store.experiment.search.top)
        store.write_table("selections", unit, chosen.to_dict("records"))
