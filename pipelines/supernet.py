"""Stages `reconstruct` and `finetune`: the supernets, one unit an (alpha, scaling, seed) (sections 4.3 and 4.4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from gross_ray.decomposition.surgery import build_supernet
from gross_ray.experiment import Schedule
from gross_ray.results.store import RunStore
from gross_ray.seeds import derive_seed
from gross_ray.space import SearchSpace
from gross_ray.training.loop import EpochRecord
from gross_ray.training.sampling import ConfigurationSampler, settled_scaling
from gross_ray.training.stages import finetune, reconstruct
from pipelines import decompose
from pipelines.decompose import stored_terms
from pipelines.networks import history_rows, load_base, load_supernet, metrics, save_supernet
from pipelines.session import Session
from pipelines.units import Context, EpochSlot, Unit, require

RECONSTRUCT = "reconstruct"
FINETUNE = "finetune"

Measure = Callable[[nn.Module, EpochRecord], dict[str, float]]
"""Measures a supernet after an epoch, by name; it may leave any configuration active."""


def supernet_unit(alpha: float, scaling: str, seed: int) -> Unit:
    """Return the unit of one supernet. Its name gives alpha exactly; without temperature both scalings are one."""
    scaling = settled_scaling(alpha, scaling)
    written = f"{alpha:g}"
    name = f"alpha={written if float(written) == alpha else repr(alpha)},scaling={scaling},seed={seed}"
    return Unit(name, {"alpha": alpha, "scaling": scaling, "seed": seed})


def plan(store: RunStore) -> list[Unit]:
    """Return one unit for each seed of the supernet that is searched."""
    options = store.experiment.supernet
    return [supernet_unit(options.alpha, options.scaling, seed) for seed in range(options.seeds)]


def finished(store: RunStore, stage: str) -> set[str]:
    """Return the supernets that `stage` has stored."""
    prefix = f"{stage},"
    units = {unit.removeprefix(prefix) for unit in store.finished_units("history") if unit.startswith(prefix)}
    return {unit for unit in units if store.has_checkpoint(stage, unit)}


def is_finished(store: RunStore, stage: str, unit: str) -> bool:
    """Return whether `stage` has stored one supernet; what is stored is not looked at."""
    return store.has_checkpoint(stage, unit) and store.has_unit("history", f"{stage},{unit}")


def run_reconstruct(session: Session) -> None:
    """Reconstruct the responses of the supernets that are missing."""
    store = session.store
    if not {unit.name for unit in plan(store)} <= finished(store, RECONSTRUCT):
        require_decompositions(store)
    session.run(RECONSTRUCT, plan(store), reconstruct_work, lambda: finished(store, RECONSTRUCT))


def run_finetune(session: Session) -> None:
    """Fine-tune the supernets that are missing."""
    store = session.store
    todo = {unit.name for unit in plan(store)} - finished(store, FINETUNE)
    require(store, RECONSTRUCT, todo, finished(store, RECONSTRUCT))
    session.run(FINETUNE, plan(store), finetune_work, lambda: finished(store, FINETUNE))


def require_decompositions(store: RunStore) -> None:
    """Raise MissingStageError unless every decomposition is stored."""
    wanted = [unit.name for unit in decompose.plan(store)]
    require(store, decompose.STAGE, wanted, decompose.finished(store))


def reconstruct_work(
    context: Context, unit: Unit, share: tuple[float, float] = (0.0, 1.0), measure: Measure | None = None
) -> str:
    """Build one supernet from its decompositions and reconstruct the responses.

    `share` is its part of the unit's progress; what `measure` returns is reported beside each epoch's metrics.
    """
    store, schedule = context.store, context.store.experiment.reconstruction
    base = load_base(store)
    terms = stored_terms(store, base.space.group_sizes, unit.arguments["seed"])
    supernet = build_supernet(base.network, {name: [one.to_bottleneck() for one in terms[name]] for name in terms})
    training = partial(reconstruct, supernet.to(context.device), base.network.to(context.device))
    last = _train(context, unit, RECONSTRUCT, supernet, schedule, training, share, measure)
    return f"response error {last.train_loss:.4f}"


def finetune_work(
    context: Context, unit: Unit, share: tuple[float, float] = (0.0, 1.0), measure: Measure | None = None
) -> str:
    """Fine-tune one reconstructed supernet; `share` and `measure` as in `reconstruct_work`."""
    supernet = load_supernet(context.store, RECONSTRUCT, unit.name).to(context.device)
    schedule = context.store.experiment.finetuning
    last = _train(context, unit, FINETUNE, supernet, schedule, partial(finetune, supernet), share, measure)
    return f"loss {last.train_loss:.4f}, largest configuration {last.val_accuracy:.4f}"


def _train(
    context: Context,
    unit: Unit,
    stage: str,
    supernet: nn.Module,
    schedule: Schedule,
    training: Callable[..., list[EpochRecord]],
    share: tuple[float, float],
    measure: Measure | None,
) -> EpochRecord:
    """Do one training of a supernet from its last epoch, store the result, and return the last epoch's record."""
    store, alpha, scaling = context.store, unit.arguments["alpha"], unit.arguments["scaling"]
    slot = EpochSlot(store, stage, unit.name)

    def report(record: EpochRecord) -> None:
        done = share[0] + (share[1] - share[0]) * record.epoch / schedule.epochs
        measured = {} if measure is None else measure(supernet, record)
        text = f"{stage} epoch {record.epoch}, loss {record.train_loss:.4f}"
        context.report(done, text, **metrics(record), **measured)

    history = training(
        context.splits,
        schedule,
        seed=derive_seed(context.seed, stage, unit.name),
        sampler=ConfigurationSampler(SearchSpace.of(supernet), alpha, scaling=scaling),
        engine=store.experiment.engine,
        checkpoint=slot,
        on_epoch=report,
    )
    save_supernet(store, stage, unit.name, supernet, dict(unit.arguments))
    rows = history_rows(stage, unit.name, unit.arguments["seed"], history)
    store.write_table("history", f"{stage},{unit.name}", rows)
    slot.clear()
    return history[-1]
