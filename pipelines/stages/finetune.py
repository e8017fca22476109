"""Stage `finetune`: train the reconstructed supernets on the classification task (Eq. 8, section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gross_ray.run.opened import Run
from gross_ray.run.progress import finished_units
from gross_ray.training.stages import finetune
from gross_ray.training.together import finetune_together
from pipelines.stages import reconstruct, supernets
from pipelines.stages.base import Driver
from pipelines.stages.supernets import Measure, Supernet, Training
from pipelines.units import Context, Group, Job, require

NAME = "finetune"


def plan(run: Run) -> Sequence[Supernet]:
    """Return one unit for each seed of the supernet that is searched."""
    return supernets.searched(run)


def done(run: Run) -> set[str]:
    """Return the names of the supernets that are fine-tuned."""
    return finished_units(run.store, NAME)


def do(driver: Driver) -> None:
    """Fine-tune the supernets that are missing."""
    run = driver.run
    todo = {unit.name for unit in plan(run)} - done(run)
    require(run.store, reconstruct.NAME, todo, reconstruct.done(run))
    driver.do(job(run, plan(run)))


def job(run: Run, units: Sequence[Supernet], *, shown: str | None = None) -> Job:
    """Return the job of fine-tuning these supernets."""
    return supernets.job(run, NAME, units, work, work_on_group, shown=shown)


def work(
    context: Context, unit: Supernet, share: tuple[float, float] = (0.0, 1.0), measure: Measure | None = None
) -> str:
    """Fine-tune one reconstructed supernet; `share` and `measure` as in `supernets.train`."""
    supernet = context.run.supernet(reconstruct.NAME, unit.name).to(context.device)
    training: Training = partial(finetune, supernet)
    if supernets.as_one_graph(context.run.experiment.engine, context.device):
        training = supernets.as_stack(supernet, finetune_together)
    schedule = context.run.experiment.finetuning
    last = supernets.train(context, unit, NAME, supernet, schedule, training, share, measure)
    return f"loss {last.train_loss:.4f}, largest configuration {last.val_accuracy:.4f}"


def work_on_group(context: Context, group: Group) -> str:
    """Fine-tune several reconstructed supernets in one pass."""
    loaded = {
        unit: context.run.supernet(reconstruct.NAME, unit.name).to(context.device)
        for unit in group.members
        if isinstance(unit, Supernet)
    }
    return supernets.train_group(context, group, NAME, loaded, context.run.experiment.finetuning, finetune_together)
