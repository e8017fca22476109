"""Stage `train`: train the base networks, one unit for each seed (section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gross_ray.data.image_set import Splits
from gross_ray.run.opened import Run
from gross_ray.run.pins import pin_weights, stored_weights
from gross_ray.run.progress import finished_units, history_unit
from gross_ray.run.store import RunStore
from gross_ray.search.cost import count_macs, count_parameters
from gross_ray.seeds import derive_seed, derived_generator
from gross_ray.training.loop import EpochRecord, count_correct
from gross_ray.training.stages import train_network
from gross_ray.weights import read_weights, set_weights
from pipelines.stages import rates
from pipelines.stages.base import Driver, history_rows, metrics
from pipelines.stages.rates import FindRates
from pipelines.units import Context, EpochSlot, Job, Unit

NAME = "train"
SCHEDULE = "training"
GIVEN = "given"
"""Name of the stage under which the run folder stores the user's weights."""


@dataclass(frozen=True, kw_only=True)
class BaseNetwork(Unit):
    """One base network."""

    seed: int

    @property
    def name(self) -> str:
        """Like seed=0."""
        return f"seed={self.seed}"


def plan(run: Run) -> Sequence[BaseNetwork]:
    """Return one unit for each seed of the base network."""
    return [BaseNetwork(seed=seed) for seed in range(run.experiment.training.seeds)]


def done(run: Run) -> set[str]:
    """Return the names of the units that are stored."""
    return finished_units(run.store, NAME)


def do(driver: Driver) -> None:
    """Train the missing base networks, or take the user's weights."""
    run = driver.run
    if run.experiment.weights:
        kept = done(run) or run.store.has_checkpoint(GIVEN, "weights")
        check_given(run.store) if kept else keep_given(run.store)
    units = plan(run)
    job = Job(stage=NAME, units=units, work=work, done=lambda: done(run), kind=NAME, num_equal=len(units))
    if run.experiment.trains_base:
        rates.settle(driver, job, [SCHEDULE], find)
    driver.do(job)


def keep_given(store: RunStore) -> None:
    """Copy the user's weights from their file into the run folder, so that all workers can read them.

    Raises InvalidValueError if the file's tensors differ from those with which the run was created.
    """
    tensors = read_weights(store.experiment.weights, store.experiment.weights_key)
    pin_weights(store, tensors)
    store.save_checkpoint(GIVEN, "weights", tensors, {})


def check_given(store: RunStore) -> None:
    """Raise InvalidValueError, naming both hashes, if the tensors of the user's weights file have changed.

    A deleted file is no error.
    """
    path = store.experiment.weights
    if not Path(path).is_file():
        return
    if stored_weights(store) is None and store.has_checkpoint(GIVEN, "weights"):
        pin_weights(store, store.load_checkpoint(GIVEN, "weights")[0])
    pin_weights(store, read_weights(path, store.experiment.weights_key))


def load_given(store: RunStore, network: nn.Module) -> None:
    """Load the stored copy of the user's weights into `network`, whose classifier may be new if it is trained on."""
    tensors, _ = store.load_checkpoint(GIVEN, "weights")
    set_weights(network, tensors, store.experiment.weights, new_classifier=store.experiment.trains_base)


def work(context: Context, unit: BaseNetwork) -> str:
    """Train one base network, or take the user's weights, and measure it."""
    run, splits, store = context.run, context.splits, context.store
    network = _untrained(context, unit)
    history = _train(context, unit, network) if run.experiment.trains_base else []
    correct, total = count_correct(network, splits.validation), len(splits.validation)
    row = {
        "seed": unit.seed,
        "val_correct": correct,
        "val_total": total,
        "val_accuracy": correct / total,
        "test_accuracy": count_correct(network, splits.test) / len(splits.test),
        "macs": count_macs(network, splits.train.images.shape[1:]),
        "parameters": count_parameters(network),
    }
    store.save_checkpoint(NAME, unit.name, network.state_dict(), _description(splits))
    if history:
        store.write_table("history", history_unit(NAME, unit.name), history_rows(NAME, unit.name, unit.seed, history))
    store.write_table("networks", unit.name, [row])
    EpochSlot(store, NAME, unit.name).clear()
    return f"validation accuracy {correct / total:.4f}"


def find(context: Context, unit: FindRates) -> str:
    """Find the learning rate on the network of one unit."""
    assert isinstance(unit.of, BaseNetwork)
    experiment, network = context.run.experiment, _untrained(context, unit.of)
    seed = derive_seed(context.seed, NAME, unit.name, "rate")
    training = partial(train_network, network, seed=seed, engine=experiment.engine)
    return f"learning rate {rates.find(context, SCHEDULE, network, training):g}"


def _untrained(context: Context, unit: BaseNetwork) -> nn.Module:
    """Return a unit's network before its training, on the context's device: new, or with the user's weights."""
    run, splits = context.run, context.splits
    generator = derived_generator(context.seed, NAME, unit.name, "weights")
    network = run.new_network(len(splits.classes), splits.train.images.shape[-1], generator).to(context.device)
    if run.experiment.weights:
        load_given(context.store, network)
    return network


def _train(context: Context, unit: BaseNetwork, network: nn.Module) -> list[EpochRecord]:
    experiment, schedule = context.run.experiment, rates.schedule(context.run, SCHEDULE)
    return train_network(
        network,
        context.splits,
        schedule,
        seed=derive_seed(context.seed, NAME, unit.name, "epochs"),
        engine=experiment.engine,
        checkpoint=EpochSlot(context.store, NAME, unit.name),
        on_epoch=lambda record: context.report(
            record.epoch / schedule.epochs, f"epoch {record.epoch}", **metrics(record)
        ),
    )


def _description(splits: Splits) -> dict[str, Any]:
    """Return the description from which `Run.base` builds the network again."""
    return {
        "num_classes": len(splits.classes),
        "image_size": splits.train.images.shape[-1],
        "input_shape": list(splits.train.images.shape[1:]),
        "classes": list(splits.classes),
        "preparation": "" if splits.sizes is None else splits.sizes.preparation,
    }
