"""Stage `train`: the base networks, one unit a seed (section 4.2)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.results.store import RunStore
from gross_ray.search.cost import count_macs, count_parameters
from gross_ray.seeds import derive_seed, derived_generator
from gross_ray.training.loop import count_correct
from gross_ray.training.stages import train_network
from gross_ray.weights import fitted, read_weights, set_weights
from pipelines.networks import history_rows, metrics, new_network
from pipelines.session import Session
from pipelines.units import Context, EpochSlot, Unit

STAGE = "train"
GIVEN = "given"
"""Where the run folder keeps weights that are given."""


def plan(store: RunStore) -> list[Unit]:
    """Return one unit for each seed of the base network."""
    return [Unit(f"seed={seed}", {"seed": seed}) for seed in range(store.experiment.training.seeds)]


def finished(store: RunStore) -> set[str]:
    """Return the units that are stored."""
    units = store.finished_units("networks") & store.finished_checkpoints(STAGE)
    if store.experiment.weights:  # given, not trained
        return units
    trained = store.finished_units("history")
    return {unit for unit in units if f"{STAGE},{unit}" in trained}


def run(session: Session) -> None:
    """Train the base networks that are missing, or take the weights that are given."""
    if session.store.experiment.weights:
        check_given(session.store) if finished(session.store) else keep_given(session.store)
    session.run(STAGE, plan(session.store), work, lambda: finished(session.store))


def keep_given(store: RunStore) -> None:
    """Put the weights that are given into the run folder, from this machine, so that all workers have them."""
    store.save_checkpoint(GIVEN, "weights", read_weights(store.experiment.weights), {})


def check_given(store: RunStore) -> None:
    """Raise InvalidValueError where the file of the weights holds others now than the run folder's network has.

    A file that is gone is not missed, nor a tensor.
    """
    path = store.experiment.weights
    if not Path(path).is_file():
        return
    kept, _ = store.load_checkpoint(STAGE, plan(store)[0].name)
    now = fitted(kept, read_weights(path))
    same = {name for name, one in now.items() if name in kept and one.to(kept[name].dtype).equal(kept[name])}
    if other := sorted(now.keys() - same):
        raise InvalidValueError(
            f"weights {path}: {len(other)} of the tensors differ from those that {store.storage} was begun with "
            f"({other[0]}); begin another run folder (--out) for them, or put the first ones back"
        )


def load_given(store: RunStore, network: nn.Module) -> None:
    """Put the weights that are given into `network`."""
    tensors, _ = store.load_checkpoint(GIVEN, "weights")
    set_weights(network, tensors, store.experiment.weights)


def work(context: Context, unit: Unit) -> str:
    """Train one base network, or take the weights that are given."""
    store, splits, seed = context.store, context.splits, unit.arguments["seed"]
    schedule = store.experiment.training
    image_size = splits.train.images.shape[-1]
    about = {
        "num_classes": len(splits.classes),
        "image_size": image_size,
        "input_shape": list(splits.train.images.shape[1:]),
        "classes": list(splits.classes),
    }
    generator = derived_generator(context.seed, STAGE, unit.name, "weights")
    network = new_network(store, len(splits.classes), image_size, generator).to(context.device)
    slot = EpochSlot(store, STAGE, unit.name)
    given = store.experiment.weights
    if given:
        load_given(store, network)
    history = (
        []
        if given
        else train_network(
            network,
            splits,
            schedule,
            seed=derive_seed(context.seed, STAGE, unit.name, "epochs"),
            engine=store.experiment.engine,
            checkpoint=slot,
            on_epoch=lambda record: context.report(
                record.epoch / schedule.epochs, f"epoch {record.epoch}", **metrics(record)
            ),
        )
    )
    correct, total = count_correct(network, splits.validation), len(splits.validation)
    test_accuracy = count_correct(network, splits.test) / len(splits.test)
    store.save_checkpoint(STAGE, unit.name, network.state_dict(), about)
    if history:
        store.write_table("history", f"{STAGE},{unit.name}", history_rows(STAGE, unit.name, seed, history))
    row = {
        "seed": seed,
        "val_correct": correct,
        "val_total": total,
        "val_accuracy": correct / total,
        "test_accuracy": test_accuracy,
        "macs": count_macs(network, splits.train.images.shape[1:]),
        "parameters": count_parameters(network),
    }
    store.write_table("networks", unit.name, [row])
    slot.clear()
    return f"validation accuracy {correct / total:.4f}"
