"""Stage `sweep-alpha`: compare supernets of several sampling temperatures with fixed configurations (Figure 1).

See section 5.2. Each supernet of the grid is a trial that reports metrics after each epoch; then the space is evaluated
in it, as in the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from gross_ray.data.image_set import ImageSet
from gross_ray.errors import UnitsFailedError
from gross_ray.nn.batch_norm import calibration_batches, calibration_images, recalibrated
from gross_ray.run.opened import Run
from gross_ray.run.progress import finished_units
from gross_ray.space import Configuration
from gross_ray.supernet.configure import set_configuration
from gross_ray.training.loop import EpochRecord, count_correct, in_format_of
from pipelines.stages import decompose, finetune, reconstruct, search, supernets, validate
from pipelines.stages.base import Driver
from pipelines.stages.supernets import Supernet
from pipelines.units import Context, Job

NAME = "sweep-alpha"
METRIC = "supernet_accuracy"
"""Metric of a trial: the mean accuracy of the fixed configurations in the supernet, on the validation split."""
TIME = "trial_epoch"
"""Metric of a trial: the finished epochs of reconstruction and fine-tuning together."""


def plan(run: Run) -> Sequence[Supernet]:
    """Return one unit for each alpha, scaling and seed; it may include supernets of the main stages."""
    return supernets.swept(run)


def done(run: Run) -> set[str]:
    """Return the names of the supernets that have been compared with the fixed configurations."""
    return finished_units(run.store, NAME)


def do(driver: Driver) -> None:
    """Train the grid's missing supernets, and compare all of them with the fixed configurations."""
    run, units = driver.run, plan(driver.run)
    if not units:
        driver.note(f"{NAME}: the experiment sweeps over nothing (sweep.alphas and sweep.scalings)")
        return
    if not {unit.name for unit in units} <= reconstruct.done(run):
        decompose.require_all(run)
    validate.do_fixed(driver)
    failed: UnitsFailedError | None = None
    try:
        _train(driver, units)
    except UnitsFailedError as error:  # the other supernets are still compared
        failed = error
    trained = finetune.done(run)
    whole = [unit for unit in units if unit.name in trained]
    if whole:
        search.evaluate(driver, f"{NAME} search", whole)
        compare(run, whole)
    if failed is not None:
        raise failed


def _train(driver: Driver, units: Sequence[Supernet]) -> None:
    run = driver.run
    if supernets.in_groups(run):
        with suppress(UnitsFailedError):  # each failure was reported, and the last job names the missing units
            driver.do(reconstruct.job(run, units, shown=f"{NAME} {reconstruct.NAME}"))
        ready = reconstruct.done(run)
        with suppress(UnitsFailedError):
            driver.do(
                finetune.job(run, [unit for unit in units if unit.name in ready], shown=f"{NAME} {finetune.NAME}")
            )
    driver.do(
        Job(
            stage=NAME,
            units=units,
            work=work,
            done=lambda: finetune.done(run),
            kind=supernets.KIND,
            num_equal=supernets.num_supernets(run),
            trials=True,
        )
    )


def work(context: Context, unit: Supernet) -> str:
    """Reconstruct and fine-tune one supernet as far as it is not done, and report `METRIC` after each epoch."""
    run, validation = context.run, context.splits.validation
    configurations = validate.fixed_configurations(run)
    calibration = calibration_images(context.splits.train) if run.experiment.engine.recalibrate else None
    last: dict[str, float] = {}

    def report(share: float, text: str, **metrics: float) -> None:
        last.update(metrics)
        context.report(share, text, **metrics)

    def measure(network: nn.Module, record: EpochRecord, earlier: int) -> dict[str, float]:
        if not configurations:
            return {TIME: earlier + record.epoch}
        measured = mean_accuracy(network, configurations, validation, calibration)
        return {TIME: earlier + record.epoch, METRIC: measured}

    watched, before = replace(context, report=report), run.experiment.reconstruction.epochs
    if not supernets.is_trained(run, reconstruct.NAME, unit):
        reconstruct.work(watched, unit, (0.0, 0.2), partial(measure, earlier=0))
    if not supernets.is_trained(run, finetune.NAME, unit):
        finetune.work(watched, unit, (0.2, 0.99), partial(measure, earlier=before))
    return f"fixed configurations {last[METRIC]:.4f}" if METRIC in last else "trained"


def mean_accuracy(
    network: nn.Module, configurations: Sequence[Configuration], images: ImageSet, calibration: Tensor | None = None
) -> float:
    """Return the mean accuracy of these configurations in a supernet; the last one is left active.

    With `calibration`, uint8 images (N, 3, H, W), each has batch-norm statistics of its own, as in the search.
    Figure 1 compares the mean over the fixed configurations: they are few and span the space from the cheapest to the
    most accurate. The largest one alone, which fine-tuning reports, gains from any alpha that favours it.
    """
    images = in_format_of(network, images)
    correct = 0
    for configuration in configurations:
        set_configuration(network, configuration)
        batches = () if calibration is None else map(images.as_inputs, calibration_batches(calibration))
        with nullcontext() if calibration is None else recalibrated(network, batches):
            correct += count_correct(network, images)
    return correct / (len(configurations) * len(images))


def compare(run: Run, units: Sequence[Supernet]) -> None:
    """Store each supernet's difference from the fixed configurations trained on their own (validation split)."""
    compared = done(run)
    missing = [unit for unit in units if unit.name not in compared]
    if not missing:
        return
    validations = run.store.read_table("validations")
    fixed = validations[validations["kind"] == "fixed"].groupby("configuration")["val_accuracy"].mean()
    for unit in missing:
        parts = [part.name for part in search.parts(run, [unit])]
        rows = run.store.read_units("configurations", parts, ["configuration", "val_accuracy"])
        ours = rows.set_index("configuration")["val_accuracy"]
        table = [
            {
                **unit.values(),
                "configuration": configuration,
                "supernet_accuracy": float(ours[configuration]),
                "fixed_accuracy": float(accuracy),
                "difference": float(ours[configuration] - accuracy),
            }
            for configuration, accuracy in fixed.items()
        ]
        run.store.write_table("alpha_sweep", unit.name, table)
