"""Stages `reconstruct` and `finetune`: the supernets, one unit an (alpha, scaling, seed) (sections 4.3 and 4.4)."""

from __future__ import annotations

from torch import nn

from gross_ray.decomposition.surgery import build_supernet
from gross_ray.experiment import Schedule
from gross_ray.results.store import RunStore
from gross_ray.seeds import derive_seed
from gross_ray.space import SearchSpace
from gross_ray.training.loop import EpochRecord
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import finetune, reconstruct
from pipelines import decompose
from pipelines.decompose import stored_terms
from pipelines.networks import history_rows, load_base, load_supernet, metrics, save_supernet
from pipelines.session import Session
from pipelines.units import Context, EpochSlot, Unit, require

RECONSTRUCT = "reconstruct"
FINETUNE = "finetune"


def supernet_unit(alpha: float, scaling: str, seed: int) -> Unit:
    """Return the unit of one supernet. Without temperature the two scalings are the same supernet."""
    scaling = scaling if alpha > 0 else "index"
    name = f"alpha={alpha:g},scaling={scaling},seed={seed}"
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


def reconstruct_work(context: Context, unit: Unit, share: tuple[float, float] = (0.0, 1.0)) -> str:
    """Build one supernet from its decompositions and reconstruct the responses; `share` is its part of the progress."""
    store, schedule = context.store, context.store.experiment.reconstruction
    base = load_base(store)
    terms = stored_terms(store, base.space.group_sizes, unit.arguments["seed"])
    supernet = build_supernet(base.network, {name: [one.to_bottleneck() for one in terms[name]] for name in terms})
    slot = EpochSlot(store, RECONSTRUCT, unit.name)
    history = reconstruct(
        supernet.to(context.device),
        base.network.to(context.device),
        context.splits,
        schedule,
        seed=derive_seed(context.seed, RECONSTRUCT, unit.name),
        sampler=_sampler(supernet, unit),
        checkpoint=slot,
        on_epoch=lambda record: _report(context, "reconstruct", record, schedule, share),
    )
    _store(store, RECONSTRUCT, unit, supernet, history, slot)
    return f"response error {history[-1].train_loss:.4f}"


def finetune_work(context: Context, unit: Unit, share: tuple[float, float] = (0.0, 1.0)) -> str:
    """Fine-tune one reconstructed supernet; `share` is its part of the progress."""
    store, schedule = context.store, context.store.experiment.finetuning
    supernet = load_supernet(store, RECONSTRUCT, unit.name).to(context.device)
    slot = EpochSlot(store, FINETUNE, unit.name)
    history = finetune(
        supernet,
        context.splits,
        schedule,
        seed=derive_seed(context.seed, FINETUNE, unit.name),
        sampler=_sampler(supernet, unit),
        checkpoint=slot,
        on_epoch=lambda record: _report(context, "finetune", record, schedule, share),
    )
    _store(store, FINETUNE, unit, supernet, history, slot)
    return f"loss {history[-1].train_loss:.4f}, largest configuration {history[-1].val_accuracy:.4f}"


def _sampler(supernet: nn.Module, unit: Unit) -> ConfigurationSampler:
    return ConfigurationSampler(SearchSpace.of(supernet), unit.arguments["alpha"], scaling=unit.arguments["scaling"])


def _store(
    store: RunStore, stage: str, unit: Unit, supernet: nn.Module, history: list[EpochRecord], slot: EpochSlot
) -> None:
    save_supernet(store, stage, unit.name, supernet, dict(unit.arguments))
    rows = history_rows(stage, unit.name, unit.arguments["seed"], history)
    store.write_table("history", f"{stage},{unit.name}", rows)
    slot.clear()


def _report(context: Context, what: str, record: EpochRecord, schedule: Schedule, share: tuple[float, float]) -> None:
    start, end = share
    done = start + (end - start) * record.epoch / schedule.epochs
    context.report(done, f"{what} epoch {record.epoch}, loss {record.train_loss:.4f}", **metrics(record))
