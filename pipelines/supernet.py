"""Stages `reconstruct` and `finetune`: the supernets, one unit an (alpha, scaling, seed) (sections 4.3 and 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from gross_ray.data.image_set import Splits
from gross_ray.decomposition.surgery import build_supernet
from gross_ray.errors import DivergedError, UnitsFailedError
from gross_ray.experiment import EngineOptions, Schedule
from gross_ray.results.store import RunStore
from gross_ray.seeds import derive_seed
from gross_ray.space import SearchSpace
from gross_ray.training.capture import captures
from gross_ray.training.loop import EpochRecord
from gross_ray.training.sampling import ConfigurationSampler, settled_scaling
from gross_ray.training.stages import finetune, reconstruct
from gross_ray.training.together import Member, Outcome, finetune_together, reconstruct_together
from pipelines import decompose
from pipelines.decompose import stored_terms
from pipelines.networks import Base, history_rows, load_base, load_supernet, metrics, save_supernet
from pipelines.session import Session
from pipelines.units import Context, EpochSlot, Unit, members_of, require

RECONSTRUCT = "reconstruct"
FINETUNE = "finetune"

_Training = Callable[..., list[EpochRecord]]
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
    return units & store.finished_checkpoints(stage)


def is_finished(store: RunStore, stage: str, unit: str) -> bool:
    """Return whether `stage` has stored one supernet; what is stored is not looked at."""
    return store.has_checkpoint(stage, unit) and store.has_unit("history", f"{stage},{unit}")


def run_reconstruct(session: Session) -> None:
    """Reconstruct the responses of the supernets that are missing."""
    store = session.store
    if not {unit.name for unit in plan(store)} <= finished(store, RECONSTRUCT):
        require_decompositions(store)
    _run(session, RECONSTRUCT, RECONSTRUCT, plan(store))


def run_finetune(session: Session) -> None:
    """Fine-tune the supernets that are missing."""
    store = session.store
    todo = {unit.name for unit in plan(store)} - finished(store, FINETUNE)
    require(store, RECONSTRUCT, todo, finished(store, RECONSTRUCT))
    _run(session, FINETUNE, FINETUNE, plan(store))


def in_groups(store: RunStore) -> bool:
    """Return whether supernets are trained in groups; where not, a unit may still be a stack of one (as_one_graph)."""
    engine = store.experiment.engine
    return engine.parallel_seeds > 1 or engine.compile


def as_one_graph(engine: EngineOptions, device: str) -> bool:
    """Return whether a supernet by itself is trained as a stack of one, which cannot be done in bfloat16."""
    return engine.compile or (captures(engine, torch.device(device)) and engine.precision != "bfloat16")


def train_together(session: Session, name: str, units: list[Unit]) -> None:
    """Reconstruct and fine-tune supernets as stacks, as stages of `name`; what fails holds up no other supernet.

    Raises UnitsFailedError in the end, if any did.
    """
    failed: UnitsFailedError | None = None
    try:
        _run(session, f"{name} {RECONSTRUCT}", RECONSTRUCT, units)
    except UnitsFailedError as error:
        failed = error
    ready = finished(session.store, RECONSTRUCT)
    _run(session, f"{name} {FINETUNE}", FINETUNE, [unit for unit in units if unit.name in ready])
    if failed is not None:
        raise failed


def _run(session: Session, name: str, stage: str, units: list[Unit]) -> None:
    store = session.store
    one, several = {
        RECONSTRUCT: (reconstruct_work, reconstruct_group),
        FINETUNE: (finetune_work, finetune_group),
    }[stage]
    together = store.experiment.engine.parallel_seeds if in_groups(store) else None
    work = one if together is None else several
    session.run(name, units, work, lambda: finished(store, stage), together=together)


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
    base = load_base(context.store)
    supernet = _decomposed(context, base, unit)
    original, schedule = base.network.to(context.device), context.store.experiment.reconstruction
    training: _Training = partial(reconstruct, supernet, original)
    if as_one_graph(context.store.experiment.engine, context.device):
        training = _as_stack(supernet, partial(reconstruct_together, original=original))
    last = _train(context, unit, RECONSTRUCT, supernet, schedule, training, share, measure)
    return f"response error {last.train_loss:.4f}"


def reconstruct_group(context: Context, group: Unit) -> str:
    """Build several supernets and reconstruct their responses in one pass."""
    base = load_base(context.store)
    schedule, engine = context.store.experiment.reconstruction, context.store.experiment.engine
    supernets = [_decomposed(context, base, unit) for unit in members_of(group)]
    members = _members(context, group, RECONSTRUCT, supernets, schedule)
    original = base.network.to(context.device)
    outcomes = reconstruct_together(members, original, context.splits, schedule, engine=engine)
    return _store_together(context, group, RECONSTRUCT, supernets, outcomes)


def finetune_work(
    context: Context, unit: Unit, share: tuple[float, float] = (0.0, 1.0), measure: Measure | None = None
) -> str:
    """Fine-tune one reconstructed supernet; `share` and `measure` as in `reconstruct_work`."""
    supernet = load_supernet(context.store, RECONSTRUCT, unit.name).to(context.device)
    training: _Training = partial(finetune, supernet)
    if as_one_graph(context.store.experiment.engine, context.device):
        training = _as_stack(supernet, finetune_together)
    schedule = context.store.experiment.finetuning
    last = _train(context, unit, FINETUNE, supernet, schedule, training, share, measure)
    return f"loss {last.train_loss:.4f}, largest configuration {last.val_accuracy:.4f}"


def finetune_group(context: Context, group: Unit) -> str:
    """Fine-tune several reconstructed supernets in one pass."""
    schedule, engine = context.store.experiment.finetuning, context.store.experiment.engine
    supernets = [load_supernet(context.store, RECONSTRUCT, unit.name).to(context.device) for unit in members_of(group)]
    members = _members(context, group, FINETUNE, supernets, schedule)
    outcomes = finetune_together(members, context.splits, schedule, engine=engine)
    return _store_together(context, group, FINETUNE, supernets, outcomes)


def _as_stack(supernet: nn.Module, together: Callable[..., list[Outcome]]) -> _Training:
    """Return the training of one supernet as a stack of one: it is one graph for all configurations."""

    def training(
        splits: Splits,
        schedule: Schedule,
        *,
        seed: int,
        sampler: ConfigurationSampler,
        engine: EngineOptions,
        checkpoint: EpochSlot,
        on_epoch: Callable[[EpochRecord], object],
    ) -> list[EpochRecord]:
        members = [Member(supernet, seed, sampler, checkpoint, on_epoch)]
        (outcome,) = together(members, splits=splits, schedule=schedule, engine=engine)
        if isinstance(outcome, DivergedError):
            raise outcome
        return outcome

    return training


def _decomposed(context: Context, base: Base, unit: Unit) -> nn.Module:
    """Return the supernet of a unit's decompositions, on the context's device."""
    terms = stored_terms(context.store, base.space.group_sizes, unit.arguments["seed"])
    bottlenecks = {name: [one.to_bottleneck() for one in terms[name]] for name in terms}
    return build_supernet(base.network, bottlenecks).to(context.device)


def _members(
    context: Context, group: Unit, stage: str, supernets: Sequence[nn.Module], schedule: Schedule
) -> list[Member]:
    def report(record: EpochRecord) -> None:
        text = f"{stage} epoch {record.epoch}, loss {record.train_loss:.4f}"
        context.report(record.epoch / schedule.epochs, text, **metrics(record))

    return [
        Member(
            supernet,
            derive_seed(context.seed, stage, unit.name),
            _sampler(supernet, unit),
            EpochSlot(context.store, stage, unit.name),
            report,
        )
        for unit, supernet in zip(members_of(group), supernets, strict=True)
    ]


def _sampler(supernet: nn.Module, unit: Unit) -> ConfigurationSampler:
    return ConfigurationSampler(SearchSpace.of(supernet), unit.arguments["alpha"], scaling=unit.arguments["scaling"])


def _store_together(
    context: Context, group: Unit, stage: str, supernets: Sequence[nn.Module], outcomes: Sequence[Outcome]
) -> str:
    """Store the supernets that did not diverge; raises DivergedError naming those that did."""
    diverged = []
    for unit, supernet, outcome in zip(members_of(group), supernets, outcomes, strict=True):
        if isinstance(outcome, DivergedError):
            diverged.append(f"{unit.name}: {outcome}")
        else:
            _store(context.store, unit, stage, supernet, outcome)
    if diverged:
        raise DivergedError("; ".join(diverged))
    losses = [outcome[-1].train_loss for outcome in outcomes if not isinstance(outcome, DivergedError)]
    return f"loss {min(losses):.4f} to {max(losses):.4f}"


def _train(
    context: Context,
    unit: Unit,
    stage: str,
    supernet: nn.Module,
    schedule: Schedule,
    training: _Training,
    share: tuple[float, float],
    measure: Measure | None,
) -> EpochRecord:
    """Do one training of a supernet from its last epoch, store the result, and return the last epoch's record."""
    store = context.store

    def report(record: EpochRecord) -> None:
        done = share[0] + (share[1] - share[0]) * record.epoch / schedule.epochs
        measured = {} if measure is None else measure(supernet, record)
        text = f"{stage} epoch {record.epoch}, loss {record.train_loss:.4f}"
        context.report(done, text, **metrics(record), **measured)

    history = training(
        context.splits,
        schedule,
        seed=derive_seed(context.seed, stage, unit.name),
        sampler=_sampler(supernet, unit),
        engine=store.experiment.engine,
        checkpoint=EpochSlot(store, stage, unit.name),
        on_epoch=report,
    )
    _store(store, unit, stage, supernet, history)
    return history[-1]


def _store(store: RunStore, unit: Unit, stage: str, supernet: nn.Module, history: list[EpochRecord]) -> None:
    """Store a supernet that is trained, in place of its state between epochs."""
    save_supernet(store, stage, unit.name, supernet, dict(unit.arguments))
    rows = history_rows(stage, unit.name, unit.arguments["seed"], history)
    store.write_table("history", f"{stage},{unit.name}", rows)
    EpochSlot(store, stage, unit.name).clear()
