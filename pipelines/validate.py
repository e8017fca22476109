"""Stage `validate`: fixed and selected configurations decomposed and trained on their own (sections 4.5 and 5.1).

One trial of Ray Tune a configuration and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gross_ray.batch_norm import calibration_batches, calibration_images, recalibrate
from gross_ray.decomposition.surgery import build_supernet
from gross_ray.errors import MissingStageError
from gross_ray.results.store import RunStore
from gross_ray.search.cost import configuration_macs, count_parameters
from gross_ray.search.selection import Budget, uniform
from gross_ray.seeds import derive_seed
from gross_ray.space import Configuration
from gross_ray.training.loop import EpochRecord, accuracy
from gross_ray.training.stages import finetune, reconstruct
from pipelines import rounds, search
from pipelines.decompose import layer_terms
from pipelines.networks import history_rows, load_base, metrics, save_supernet
from pipelines.session import Session
from pipelines.tuning import Tuning
from pipelines.units import Context, EpochSlot, Unit

STAGE = "validate"


def fixed_configurations(store: RunStore) -> list[Configuration]:
    """Return the fixed configurations: those the experiment names and those that set the budgets."""
    space = load_base(store).space
    named = [uniform(space, size) for size in store.experiment.validation.fixed]
    return list(dict.fromkeys([*named, *search.budgets(store)]))


def selected_configurations(store: RunStore) -> list[Configuration]:
    """Return the selected configurations of every budget, and the best within every limit.

    Raises MissingStageError before `search` is done.
    """
    selections = store.read_sound("selections")
    budgets = {str(budget) for budget in search.budgets(store)}
    unfinished = not budgets and search.by_strategy(store) and not rounds.ended(store)
    if set(selections["budget"]) != budgets or unfinished:
        raise MissingStageError(f"nothing is selected yet in {store.storage}: run `gross search` on it first")
    options, chosen = store.experiment.search, selections["configuration"].tolist()
    for text in options.limits:
        chosen += search.best(store, Budget.parse_all(text), options.top)["configuration"].tolist()
    return list(dict.fromkeys(map(Configuration.parse, chosen)))


def units_of(store: RunStore, configurations: list[Configuration], kind: str) -> list[Unit]:
    """Return one unit for each configuration and seed."""
    seeds = range(store.experiment.validation.seeds)
    return [
        Unit(f"{configuration},seed={seed}", {"configuration": str(configuration), "kind": kind, "seed": seed})
        for configuration in configurations
        for seed in seeds
    ]


def plan(store: RunStore) -> list[Unit]:
    """Return the units of the fixed and the selected configurations."""
    fixed = fixed_configurations(store)
    selected = [one for one in selected_configurations(store) if one not in fixed]
    return units_of(store, fixed, "fixed") + units_of(store, selected, "selected")


def finished(store: RunStore) -> set[str]:
    """Return the units that are stored."""
    trained = store.finished_units("history")
    units = store.finished_units("validations") & store.finished_checkpoints(STAGE)
    return {unit for unit in units if f"{STAGE},{unit}" in trained}


def run(session: Session) -> None:
    """Validate the configurations that are missing."""
    session.run(STAGE, plan(session.store), work, lambda: finished(session.store), tuning=Tuning())


def run_fixed(session: Session) -> None:
    """Validate the fixed configurations that are missing: the sweep over alpha is compared with them."""
    store = session.store
    units = units_of(store, fixed_configurations(store), "fixed")
    session.run(f"{STAGE} fixed", units, work, lambda: finished(store), tuning=Tuning())


def run_named(session: Session, configurations: Sequence[Configuration]) -> None:
    """Validate these configurations, whichever the budgets select; raises InvalidValueError outside the space."""
    store = session.store
    space, fixed = load_base(store).space, fixed_configurations(store)
    chosen = list(dict.fromkeys(space.check(one) for one in configurations))
    units = units_of(store, [one for one in chosen if one in fixed], "fixed")
    units += units_of(store, [one for one in chosen if one not in fixed], "selected")
    session.run(f"{STAGE} by name", units, work, lambda: finished(store), tuning=Tuning())


def work(context: Context, unit: Unit) -> str:
    """Decompose, reconstruct and fine-tune one configuration, and measure it."""
    store, splits, seed = context.store, context.splits, unit.arguments["seed"]
    options, configuration = store.experiment.validation, Configuration.parse(unit.arguments["configuration"])
    base = load_base(store)
    unwatched = replace(context, report=lambda *_, **__: None)  # a decomposition's steps are no metrics of the trial
    bottlenecks = {
        layer: [layer_terms(unwatched, base, layer, size, seed=seed, nested=False).to_bottleneck()]
        for layer, size in zip(base.space.layers, configuration, strict=True)
    }
    network = build_supernet(base.network, bottlenecks).to(context.device)
    rows: list[dict[str, object]] = []
    epochs = options.reconstruction.epochs + options.finetuning.epochs

    def report(before: int, what: str, record: EpochRecord) -> None:
        context.report((before + record.epoch) / (epochs + 1), f"{what} epoch {record.epoch}", **metrics(record))

    slots = {name: EpochSlot(store, f"{STAGE}-{name}", unit.name) for name in ("reconstruct", "finetune")}
    history = reconstruct(
        network,
        base.network.to(context.device),
        splits,
        options.reconstruction,
        seed=derive_seed(context.seed, STAGE, "reconstruct", unit.name),
        engine=store.experiment.engine,
        checkpoint=slots["reconstruct"],
        on_epoch=lambda record: report(0, "reconstruct", record),
    )
    rows += history_rows(f"{STAGE}-reconstruct", unit.name, seed, history)
    history = finetune(
        network,
        splits,
        options.finetuning,
        seed=derive_seed(context.seed, STAGE, "finetune", unit.name),
        engine=store.experiment.engine,
        checkpoint=slots["finetune"],
        on_epoch=lambda record: report(options.reconstruction.epochs, "finetune", record),
    )
    rows += history_rows(f"{STAGE}-finetune", unit.name, seed, history)
    if store.experiment.engine.recalibrate:
        recalibrate(network, map(splits.train.as_inputs, calibration_batches(calibration_images(splits))))
    test_accuracy = accuracy(network, splits.test)
    val_accuracy = accuracy(network, splits.validation)
    save_supernet(store, STAGE, unit.name, network, dict(unit.arguments))
    store.write_table("history", f"{STAGE},{unit.name}", rows)
    row = {
        "configuration": str(configuration),
        "kind": unit.arguments["kind"],
        "seed": seed,
        "val_accuracy": val_accuracy,
        "test_accuracy": test_accuracy,
        "macs": configuration_macs(network, configuration, base.input_shape),
        "macs_paper": configuration_macs(network, configuration, base.input_shape, convention="paper"),
        "parameters": count_parameters(network),
    }
    store.write_table("validations", unit.name, [row])
    for slot in slots.values():
        slot.clear()
    return f"validation {val_accuracy:.4f}, test {test_accuracy:.4f}"
