"""Stage `sweep-alpha`: supernets over sampling temperatures, against the fixed configurations (section 5.2, Figure 1).

One trial of Ray Tune a supernet: the experiment's grid, or as many as a search may propose. Of the grid's supernets the
whole space is evaluated in shards, like the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import count, islice

from torch import Tensor, nn

from gross_ray.data.image_set import ImageSet
from gross_ray.errors import InvalidValueError, UnitsFailedError
from gross_ray.nn.batch_norm import calibration_batches, calibration_images, recalibrated
from gross_ray.run.store import RunStore
from gross_ray.space import Configuration
from gross_ray.supernet.configure import set_configuration
from gross_ray.training.loop import EpochRecord, count_correct
from pipelines import search, supernet, validate
from pipelines.alpha_trials import (
    SCHEDULERS,
    OptunaOptions,
    grace_period,
    make_asha,
    num_epochs,
    store_end,
    stored_trials,
)
from pipelines.networks import load_supernet
from pipelines.session import Session
from pipelines.tuning import METRIC, TIME, Ended, Tuning
from pipelines.units import Context, Unit

STAGE = "sweep-alpha"
GRID = "grid"


def plan(store: RunStore) -> list[Unit]:
    """Return one unit for each alpha, scaling and seed; the supernets of the main stages are among them if they fit."""
    options = store.experiment.sweep
    units = [
        supernet.supernet_unit(alpha, scaling, seed)
        for alpha in options.alphas
        for scaling in options.scalings
        for seed in range(options.seeds)
    ]
    return list({unit.name: unit for unit in units}.values())


def finished(store: RunStore) -> set[str]:
    """Return the supernets that are compared with the fixed configurations already."""
    return store.finished_units("alpha_sweep")


def run(session: Session, *, scheduler: str = "none", optuna: OptunaOptions | None = None) -> None:
    """Train the grid's supernets that are missing and compare them, or those that Optuna proposes.

    `scheduler` is "none", or "asha" to stop the least promising trials early.
    """
    experiment = session.store.experiment
    if scheduler not in SCHEDULERS:
        raise InvalidValueError(f"scheduler {scheduler!r}: must be one of {', '.join(SCHEDULERS)}")
    if scheduler == "asha":
        grace_period(experiment)  # its rule is broken now, or never
    if optuna is not None:
        _search(session, scheduler, optuna)
    elif not plan(session.store):
        session.reporter.note(f"{STAGE}: the experiment sweeps over nothing (sweep.alphas and sweep.scalings)")
    else:
        _grid(session, scheduler)


def _grid(session: Session, scheduler: str) -> None:
    store, units = session.store, plan(session.store)
    if not {unit.name for unit in units} <= supernet.finished(store, supernet.RECONSTRUCT):
        supernet.require_decompositions(store)
    validate.run_fixed(session)
    if scheduler == "none" and supernet.in_groups(store):
        with suppress(UnitsFailedError):  # told by then; their trials meet the same, and account for it
            supernet.train_together(session, STAGE, units)  # the trials find them trained, and measure them
    numbers = {unit.name: number for number, unit in enumerate(units)}

    def accounted() -> set[str]:
        return completed(store) | (stopped(store) if scheduler == "asha" else set())

    failed: UnitsFailedError | None = None
    try:
        session.run(STAGE, units, work, accounted, tuning=_tuning(store, GRID, scheduler, numbers))
    except UnitsFailedError as error:  # the others are compared all the same
        failed = error
    done = completed(store)
    whole = [unit for unit in units if unit.name in done]
    if early := stopped(store) & numbers.keys():
        session.reporter.note(f"{STAGE}: {len(early)} of {len(units)} stopped early, and not compared")
    if whole:
        search.evaluate(session, f"{STAGE} search", whole)
        compare(store, whole)
    if failed is not None:
        raise failed


def _search(session: Session, scheduler: str, options: OptunaOptions) -> None:
    from pipelines.proposals import SEARCH, Proposals, within

    store = session.store
    if not store.experiment.sweep.scalings:
        raise InvalidValueError("sweep.scalings = (): a search chooses among them; name one or more in the experiment")
    if not validate.fixed_configurations(store):
        raise InvalidValueError(
            "validation.fixed = (): a search goes by the fixed configurations' accuracies; name some in the experiment"
        )
    rows = within(store, options)
    ended = rows[rows["status"] != "proposed"]
    missing = max(0, options.trials - len(ended))
    waiting = rows.loc[rows["status"] == "proposed", "trial"].tolist()[:missing]
    taken = set(stored_trials(store, SEARCH)["trial"])
    new = islice((number for number in count() if number not in taken), missing - len(waiting))
    numbers = {f"trial={number}": number for number in [*ended["trial"], *waiting, *new]}
    if missing:
        supernet.require_decompositions(store)

    def accounted() -> set[str]:
        rows = stored_trials(store, SEARCH)
        return {f"trial={number}" for number in rows.loc[rows["status"] != "proposed", "trial"]}

    tuning = replace(
        _tuning(store, SEARCH, scheduler, numbers),
        search=lambda names: Proposals(store, options, scheduler, names),
    )
    session.run(f"{STAGE} {SEARCH}", [Unit(name) for name in numbers], work, accounted, tuning=tuning)
    rows = within(store, options)
    if not (rows["status"] == "completed").any():
        raise UnitsFailedError(
            f"{STAGE}: none of {len(rows)} trials completed ({rows['unit'].iloc[0]}: {rows['reason'].iloc[0]}); "
            "choose another range of alpha, or an experiment of lower learning rates"
        )


def _tuning(store: RunStore, asked_by: str, scheduler: str, numbers: dict[str, int]) -> Tuning:
    def on_end(ended: Ended) -> None:
        store_end(store, asked_by, numbers[ended.name], ended, scheduler)

    return Tuning(
        scheduler=partial(make_asha, store.experiment) if scheduler == "asha" else None,
        on_end=on_end,
        first_metrics={METRIC: float("nan"), TIME: 0},
    )


def completed(store: RunStore) -> set[str]:
    """Return the grid's supernets whose trial is completed."""
    return _with_status(store, "completed") & supernet.finished(store, supernet.FINETUNE)


def stopped(store: RunStore) -> set[str]:
    """Return the grid's supernets whose trial was stopped early."""
    return _with_status(store, "stopped")


def _with_status(store: RunStore, status: str) -> set[str]:
    rows = stored_trials(store, GRID)
    return set(rows.loc[rows["status"] == status, "unit"])


def work(context: Context, unit: Unit) -> str:
    """Reconstruct and fine-tune one supernet, from wherever it stands; after each epoch measure it by `METRIC`."""
    store, validation = context.store, context.splits.validation
    before, total = store.experiment.reconstruction.epochs, num_epochs(store.experiment)
    configurations = validate.fixed_configurations(store)
    calibration = calibration_images(context.splits.train) if store.experiment.engine.recalibrate else None
    last: dict[str, float] = {}

    def report(share: float, text: str, **metrics: float) -> None:
        if metrics[TIME] == total:  # told when all is stored: a scheduler may stop the trial where it reports
            last.update(metrics)
        else:
            context.report(share, text, **metrics)

    def measure(network: nn.Module, record: EpochRecord, earlier: int) -> dict[str, float]:
        epoch = earlier + record.epoch
        measured = {METRIC: mean_accuracy(network, configurations, validation, calibration)} if epoch < total else {}
        return {TIME: epoch, **measured}

    watched = replace(context, report=report)
    if not supernet.is_finished(store, supernet.RECONSTRUCT, unit.name):
        supernet.reconstruct_work(watched, unit, (0.0, 0.2), partial(measure, earlier=0))
    if not supernet.is_finished(store, supernet.FINETUNE, unit.name):
        supernet.finetune_work(watched, unit, (0.2, 0.99), partial(measure, earlier=before))
    # As it is stored, so that a trial that was killed before its row was written gives the same number again.
    stored = load_supernet(store, supernet.FINETUNE, unit.name).to(context.device)
    reached = mean_accuracy(stored, configurations, validation, calibration)
    text = f"fixed configurations {reached:.4f}"
    context.report(1.0, text, **{**last, TIME: total, METRIC: reached})
    return text


def mean_accuracy(
    network: nn.Module, configurations: Sequence[Configuration], images: ImageSet, calibration: Tensor | None = None
) -> float:
    """Return the mean of the configurations' accuracies in a supernet, the last of which is left active.

    With `calibration`, uint8 images (N, 3, H, W), each has batch-norm statistics of its own, as in the search.
    Of the fixed configurations it is what Figure 1 compares between alphas: they span the space from the cheapest to
    the most accurate, and are few. The largest alone, which fine-tuning reports, gains from any alpha that favours it.
    """
    correct = 0
    for configuration in configurations:
        set_configuration(network, configuration)
        batches = () if calibration is None else map(images.as_inputs, calibration_batches(calibration))
        with nullcontext() if calibration is None else recalibrated(network, batches):
            correct += count_correct(network, images)
    return correct / (len(configurations) * len(images))


def compare(store: RunStore, units: Sequence[Unit]) -> None:
    """Store the difference of each supernet to the fixed configurations trained on their own (validation split)."""
    compared = finished(store)
    missing = [unit for unit in units if unit.name not in compared]
    if not missing:
        return
    validations = store.read_table("validations")
    fixed = validations[validations["kind"] == "fixed"].groupby("configuration")["val_accuracy"].mean()
    for unit in missing:
        shards = [shard.name for shard in search.shards(store, [unit])]
        rows = store.read_units("configurations", shards, ["configuration", "val_accuracy"])
        ours = rows.set_index("configuration")["val_accuracy"]
        table = [
            {
                **unit.arguments,
                "configuration": configuration,
                "supernet_accuracy": float(ours[configuration]),
                "fixed_accuracy": float(accuracy),
                "difference": float(ours[configuration] - accuracy),
            }
            for configuration, accuracy in fixed.items()
        ]
        store.write_table("alpha_sweep", unit.name, table)
