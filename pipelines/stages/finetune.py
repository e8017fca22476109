"""Stage `finetune`: train the reconstructed supernets on the classification task (Eq. 8, section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from gross_ray.run.opened import Run
from gross_ray.run.progress import finished_units
from gross_ray.training.stages import finetune
from gross_ray.training.together import finetune_together
from pipelines.stages import rates, reconstruct, supernets
from pipelines.stages.base import Driver
from pipelines.stages.rates import FindRates
from pipelines.stages.supernets import Measure, Supernet, Training
from pipelines.units import Context, Group, Job, require

NAME = "finetune"
SCHEDULE = "finetuning"


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
    missing = job(run, plan(run))
    rates.settle(driver, missing, [SCHEDULE], find)
    driver.do(missing)


def job(run: Run, units: Sequence[Supernet], *, shown: str | None = None) -> Job:
    """Return the job of fine-tuning these supernets."""
    return supernets.job(run, NAME, units, work, work_on_group, shown=shown)


def work(
    context: Context, unit: Supernet, share: tuple[float, float] = (0.0, 1.0), measure: Measure | None = None
) -> str:
    """Fine-tune one reconstructed supernet; `share` and `measure` as in `supernets.train`."""
    supernet = context.run.supernet(reconstruct.NAME, unit.name).to(context.device)
    schedule = rates.schedule(context.run, SCHEDULE)
    last = supernets.train(context, unit, NAME, supernet, schedule, _training(context, supernet), share, measure)
    return f"loss {last.train_loss:.4f}, largest configuration {last.val_accuracy:.4f}"


def find(context: Context, unit: FindRates) -> str:
    """Find the learning rate on one reconstructed supernet."""
    supernet = context.run.supernet(reconstruct.NAME, unit.of.name).to(context.device)
    return supernets.find(context, unit, NAME, supernet, _training(context, supernet))


def _training(context: Context, supernet: nn.Module) -> Training:
    if supernets.as_one_graph(context.run.experiment.engine, context.device):
        return supernets.as_stack(supernet, finetune_together)
    return partial(finetune, supernet)


def work_on_group(context: Context, group: Group) -> str:
    """Fine-tune several reconstructed supernets in one pass."""
    loaded = {
        unit: context.run.supernet(reconstruct.NAME, unit.name).to(context.device)
        for unit in group.members
        if isinstance(unit, Supernet)
    }
    return supernets.train_group(context, group, NAME, loaded, rates.schedule(context.run, SCHEDULE), finetune_together)
