"""Stage `validate`: decompose and train fixed and selected configurations on their own (sections 4.5 and 5.1)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.errors import MissingStageError
from gross_ray.nn.batch_norm import calibration_batches, calibration_images, recalibrate
from gross_ray.run import latencies
from gross_ray.run.limits import limits
from gross_ray.run.opened import Run, save_supernet, validation_unit
from gross_ray.run.progress import finished_units, history_unit
from gross_ray.search.budgeted import BudgetedSpace
from gross_ray.search.budgets import Budget
from gross_ray.search.cost import LayerCosts, counted_costs
from gross_ray.search.selection import uniform
from gross_ray.seeds import derive_seed
from gross_ray.space import DENSE, Configuration, SearchSpace
from gross_ray.supernet.build import build_supernet
from gross_ray.training.loop import EpochRecord, accuracy, in_format_of
from gross_ray.training.rates import STEPS
from gross_ray.training.stages import all_parameters, finetune, reconstruct
from pipelines.stages import decompose, rates, rounds, search
from pipelines.stages.base import Driver, history_rows, metrics
from pipelines.stages.rates import FindRates
from pipelines.units import Context, EpochSlot, Job, Unit

NAME = "validate"
DRAWS = 1000
"""Configurations among which one with MACs in a range is looked for."""
SCHEDULES = ("validation.reconstruction", "validation.finetuning")


@dataclass(frozen=True, kw_only=True)
class Validation(Unit):
    """One configuration trained on its own, with one seed."""

    configuration: Configuration
    kind: str
    """fixed, selected or drawn."""
    seed: int

    @property
    def name(self) -> str:
        """Like 4-8-64,seed=0."""
        return validation_unit(self.configuration, self.seed)

    def values(self) -> dict[str, Any]:
        """Return the fields that define the work, with the configuration as text."""
        return {**super().values(), "configuration": str(self.configuration)}


def fixed_configurations(run: Run) -> list[Configuration]:
    """Return the fixed configurations: those that the experiment names, and those that define the budgets."""
    named = [uniform(run.space, size) for size in run.experiment.validation.fixed]
    return list(dict.fromkeys([*named, *search.budgets(run)]))


def selected_configurations(run: Run) -> list[Configuration]:
    """Return the selected configurations of every budget, and the best ones within every limit.

    Raises MissingStageError if `search` is not finished.
    """
    selections = run.store.read_sound("selections")
    budgets = {str(budget) for budget in search.budgets(run)}
    unfinished = not budgets and search.by_strategy(run) and not rounds.ended(run)
    if set(selections["budget"]) != budgets or unfinished:
        raise MissingStageError(f"nothing is selected yet in {run.store.storage}: run `gross search` on it first")
    options, chosen = run.experiment.search, selections["configuration"].tolist()
    for budgets_of_limit in limits(run.store):
        chosen += search.best(run, budgets_of_limit, options.top)["configuration"].tolist()
    return list(dict.fromkeys(map(Configuration.parse, chosen)))


def drawn_configurations(run: Run, num: int, others: Collection[Configuration]) -> list[Configuration]:
    """Return `num` configurations that are not among `others`, one from each of equal ranges of MACs.

    A range without any other configuration has none. The draws depend on the experiment's seed and on `others`.
    """
    if not num:
        return []
    macs = rounds.additive_cost(run, "macs")
    generator = np.random.default_rng(derive_seed(run.experiment.seed, NAME, "drawn") % 2**32)
    edges = np.linspace(macs.minimum, macs.maximum, num + 1)
    found: list[Configuration] = []
    for least, most in pairwise(edges):
        drawn = _between(run.space, macs, float(least), float(most), generator)
        found += itertools.islice((one for one in drawn if one not in others and one not in found), 1)
    return found


def _between(
    space: SearchSpace, macs: LayerCosts, least: float, most: float, generator: np.random.Generator
) -> list[Configuration]:
    """Return configurations with `least` to `most` MACs: those of DRAWS draws from all below, or from all above."""
    saved = {
        layer: {size: max(each.values()) - cost for size, cost in each.items()} for layer, each in macs.by_layer.items()
    }
    below = BudgetedSpace(space, [macs], [Budget("macs", most)])
    above = BudgetedSpace(space, [LayerCosts("macs", 0, saved)], [Budget("macs", macs.maximum - least)])
    fewer = min(below, above, key=lambda each: each.size_bound)
    drawn = fewer.draw(DRAWS, generator)
    costs = macs.of_indices(drawn)
    return fewer.configurations(drawn[(costs >= least) & (costs <= most)])


def units_of(run: Run, configurations: Iterable[Configuration]) -> list[Validation]:
    """Return one unit for each configuration and seed."""
    fixed = set(fixed_configurations(run))
    return [
        Validation(configuration=configuration, kind="fixed" if configuration in fixed else "selected", seed=seed)
        for configuration in dict.fromkeys(configurations)
        for seed in range(run.experiment.validation.seeds)
    ]


def plan(run: Run) -> Sequence[Validation]:
    """Return the units of the fixed, the selected and the drawn configurations."""

    def units() -> Sequence[Validation]:
        others = [*fixed_configurations(run), *selected_configurations(run)]
        drawn = [
            Validation(configuration=configuration, kind="drawn", seed=seed)
            for configuration in drawn_configurations(run, run.experiment.validation.drawn, others)
            for seed in range(run.experiment.validation.drawn_seeds)
        ]
        return [*units_of(run, others), *drawn]

    return run.once(f"{NAME} plan", units, depends=[search.NAME, latencies.STAGE])


def done(run: Run) -> set[str]:
    """Return the names of the units that are stored."""
    return finished_units(run.store, NAME)


def do(driver: Driver) -> None:
    """Validate the missing fixed, selected and drawn configurations."""
    run, wanted = driver.run, driver.run.experiment.validation.drawn
    num = len({unit.configuration for unit in plan(run) if unit.kind == "drawn"})
    if num < wanted:
        driver.note(f"validation.drawn = {wanted}: only {num} of so many ranges of MACs have a further configuration")
    _do(driver, NAME, plan(driver.run))


def do_fixed(driver: Driver) -> None:
    """Validate the missing fixed configurations, with which the sweep over alpha is compared."""
    _do(driver, f"{NAME} fixed", units_of(driver.run, fixed_configurations(driver.run)))


def do_named(driver: Driver, configurations: Sequence[Configuration]) -> None:
    """Validate these configurations; raises InvalidValueError for one outside the space."""
    space = driver.run.space
    _do(
        driver,
        f"{NAME} by name",
        units_of(driver.run, [space.check(configuration) for configuration in configurations]),
    )


def _do(driver: Driver, shown: str, units: Sequence[Validation]) -> None:
    """Do the decompositions that the missing units need, then the units."""
    run, options = driver.run, driver.run.experiment
    stored, decomposed = done(run), decompose.done(run)
    terms = [term for unit in units if unit.name not in stored for term in _decompositions(run, unit)]
    missing = {term: None for term in terms if term.name not in decomposed}
    if missing:
        driver.do(decompose.job(run, list(missing)))
    num_selected = (len(options.search.budgets) + len(options.search.limits)) * options.search.top
    num_selected += len(options.search.budgets)  # the cheapest within one standard error of the best
    job = Job(
        stage=shown,
        units=units,
        work=work,
        done=lambda: done(run),
        kind=NAME,
        num_equal=(len(fixed_configurations(run)) + num_selected) * options.validation.seeds
        + options.validation.drawn * options.validation.drawn_seeds,
        trials=True,
    )
    trained = [unit for unit in units if _decompositions(run, unit)]  # the original network has nothing to train
    rates.settle(driver, replace(job, units=trained), SCHEDULES, find)
    driver.do(job)


def _decompositions(run: Run, unit: Validation) -> list[decompose.Decomposition]:
    """Return the decompositions of a unit's configuration, in the order of the layers; DENSE needs none."""
    pairs = zip(run.space.layers, unit.configuration, strict=True)
    return [decompose.unit(run, layer, size, unit.seed) for layer, size in pairs if size != DENSE]


def work(context: Context, unit: Validation) -> str:
    """Reconstruct and fine-tune one configuration from its decompositions, and measure it."""
    run, store, splits = context.run, context.store, context.splits
    network, terms = _decomposed(context, unit), _decompositions(run, unit)
    slots = {name: EpochSlot(store, f"{NAME}-{name}", unit.name) for name in ("reconstruct", "finetune")}
    rows = _train(context, unit, network, slots) if terms else []  # the original network has no series to train
    if run.experiment.engine.recalibrate:
        images = in_format_of(network, splits.train)
        recalibrate(network, map(images.as_inputs, calibration_batches(calibration_images(images))))
    test_accuracy = accuracy(network, splits.test)
    val_accuracy = accuracy(network, splits.validation)
    save_supernet(store, NAME, unit.name, network, unit.values())
    store.write_table("history", history_unit(NAME, unit.name), rows)
    row = {
        **unit.values(),
        "val_accuracy": val_accuracy,
        "test_accuracy": test_accuracy,
        **{
            name: None if cost is None else int(cost.of_one(unit.configuration))
            for name, cost in counted_costs(network, run.base.input_shape).items()
        },
    }
    store.write_table("validations", unit.name, [row])
    for slot in slots.values():
        slot.clear()
    return f"validation {val_accuracy:.4f}, test {test_accuracy:.4f}"


def find(context: Context, unit: FindRates) -> str:
    """Find the learning rates on one configuration: that of fine-tuning after a few steps of reconstruction."""
    assert isinstance(unit.of, Validation)
    network, found = _decomposed(context, unit.of), []
    for name, training in zip(SCHEDULES, _trainings(context, network), strict=True):
        seeded = partial(training, seed=derive_seed(context.seed, NAME, unit.of.name, "rate", name))
        if name in unit.schedules:
            rate = rates.find(context, name, network, seeded)
            found.append(f"{name.rpartition('.')[2]} {rate:g}")
        settled = rates.schedule(context.run, name)
        few = replace(settled, epochs=1, milestones=(), images=STEPS * settled.batch_size)
        seeded(replace(context.splits, validation=context.splits.validation.first(1)), few)
    return f"learning rates: {', '.join(found)}"


def _decomposed(context: Context, unit: Validation) -> nn.Module:
    """Return the supernet of one configuration, built from its decompositions, on the context's device."""
    run = context.run
    bottlenecks: dict[str, list[Bottleneck]] = {layer: [] for layer in run.space.layers}
    for term in _decompositions(run, unit):
        bottlenecks[term.layer].append(decompose.load_terms(context.store, term).to_bottleneck())
    dense = [layer for layer, found in bottlenecks.items() if not found]
    network = build_supernet(run.base.network, bottlenecks, dense).to(context.device)
    if run.experiment.validation.trainable == "all":
        all_parameters(network)
    return network


def _trainings(context: Context, network: nn.Module) -> list[Callable[..., list[EpochRecord]]]:
    """Return the trainings of the two SCHEDULES, which take the images and a schedule."""
    run = context.run
    original, engine = run.base.on(context.device), run.experiment.engine
    trainable = run.experiment.validation.trainable
    finetuning = partial(finetune, network, trainable=trainable, engine=engine)
    return [partial(reconstruct, network, original, engine=engine), finetuning]


def _train(context: Context, unit: Validation, network: nn.Module, slots: dict[str, EpochSlot]) -> list[dict[str, Any]]:
    """Reconstruct and fine-tune a supernet of one configuration in place, and return the rows of its history."""
    schedules = [rates.schedule(context.run, name) for name in SCHEDULES]
    reconstruction, finetuning = _trainings(context, network)
    epochs = sum(schedule.epochs for schedule in schedules)

    def report(before: int, what: str, record: EpochRecord) -> None:
        context.report((before + record.epoch) / (epochs + 1), f"{what} epoch {record.epoch}", **metrics(record))

    reconstructed = reconstruction(
        context.splits,
        schedules[0],
        seed=derive_seed(context.seed, NAME, "reconstruct", unit.name),
        checkpoint=slots["reconstruct"],
        on_epoch=lambda record: report(0, "reconstruct", record),
    )
    finetuned = finetuning(
        context.splits,
        schedules[1],
        seed=derive_seed(context.seed, NAME, "finetune", unit.name),
        checkpoint=slots["finetune"],
        on_epoch=lambda record: report(schedules[0].epochs, "finetune", record),
    )
    return [
        *history_rows(f"{NAME}-reconstruct", unit.name, unit.seed, reconstructed),
        *history_rows(f"{NAME}-finetune", unit.name, unit.seed, finetuned),
    ]
