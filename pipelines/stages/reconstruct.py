"""Stage `reconstruct`: train the supernets to reproduce the responses of the full network (Eq. 9, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from gross_ray.run.opened import Run
from gross_ray.run.progress import finished_units
from gross_ray.space import DENSE
from gross_ray.supernet.build import build_supernet
from gross_ray.training.stages import reconstruct
from gross_ray.training.together import reconstruct_together
from pipelines.stages import decompose, rates, supernets
from pipelines.stages.base import Driver
from pipelines.stages.rates import FindRates
from pipelines.stages.supernets import Measure, Supernet, Training
from pipelines.units import Context, Group, Job

NAME = "reconstruct"
SCHEDULE = "reconstruction"


def plan(run: Run) -> Sequence[Supernet]:
    """Return one unit for each seed of the supernet that is searched."""
    return supernets.searched(run)


def done(run: Run) -> set[str]:
    """Return the names of the supernets that are reconstructed."""
    return finished_units(run.store, NAME)


def do(driver: Driver) -> None:
    """Reconstruct the responses of the supernets that are missing."""
    run = driver.run
    if not {unit.name for unit in plan(run)} <= done(run):
        decompose.require_all(run)
    todo = job(run, plan(run))
    rates.settle(driver, todo, [SCHEDULE], find)
    driver.do(todo)


def job(run: Run, units: Sequence[Supernet], *, shown: str | None = None) -> Job:
    """Return the job of reconstructing these supernets."""
    return supernets.job(run, NAME, units, work, work_on_group, shown=shown)


def work(
    context: Context, unit: Supernet, share: tuple[float, float] = (0.0, 1.0), measure: Measure | None = None
) -> str:
    """Build one supernet from its decompositions and reconstruct the responses; `share` and `measure` as in `train`."""
    supernet, schedule = _decomposed(context, unit), rates.schedule(context.run, SCHEDULE)
    last = supernets.train(context, unit, NAME, supernet, schedule, _training(context, supernet), share, measure)
    return f"response error {last.train_loss:.4f}"


def find(context: Context, unit: FindRates) -> str:
    """Find the learning rate on one supernet."""
    assert isinstance(unit.of, Supernet)
    supernet = _decomposed(context, unit.of)
    return supernets.find(context, unit, NAME, supernet, _training(context, supernet))


def _training(context: Context, supernet: nn.Module) -> Training:
    original = context.run.base.on(context.device)
    if supernets.as_one_graph(context.run.experiment.engine, context.device):
        return supernets.as_stack(supernet, partial(reconstruct_together, original=original))
    return partial(reconstruct, supernet, original)


def work_on_group(context: Context, group: Group) -> str:
    """Build several supernets and reconstruct their responses in one pass."""
    built = {unit: _decomposed(context, unit) for unit in group.members if isinstance(unit, Supernet)}
    together = partial(reconstruct_together, original=context.run.base.on(context.device))
    return supernets.train_group(context, group, NAME, built, rates.schedule(context.run, SCHEDULE), together)


def _decomposed(context: Context, unit: Supernet) -> nn.Module:
    """Return the supernet built from a unit's decompositions, on the context's device."""
    run = context.run
    terms = decompose.supernet_terms(run, unit.seed)
    bottlenecks = {name: [term.to_bottleneck() for term in terms[name]] for name in terms}
    dense = [name for name, sizes in run.space.group_sizes.items() if DENSE in sizes]
    return build_supernet(run.base.network, bottlenecks, dense).to(context.device)
