"""All stages in order, and how far each is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gross_ray.errors import MissingStageError, UnitsFailedError
from gross_ray.run.store import RunStore
from pipelines import decompose, rounds, search, supernet, sweep, train, validate
from pipelines.session import Session
from pipelines.units import Unit


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline."""

    run: Callable[[Session], None]
    plan: Callable[[RunStore], list[Unit]]
    finished: Callable[[RunStore], set[str]]
    description: str


STAGES: dict[str, Stage] = {
    "train": Stage(train.run, train.plan, train.finished, "Train the base networks."),
    "decompose": Stage(
        decompose.run, decompose.plan, decompose.finished, "Decompose every layer at every group-size (BTD)."
    ),
    "reconstruct": Stage(
        supernet.run_reconstruct,
        supernet.plan,
        lambda store: supernet.finished(store, supernet.RECONSTRUCT),
        "Reconstruct the responses of the full network in the supernet (Eq. 9).",
    ),
    "finetune": Stage(
        supernet.run_finetune,
        supernet.plan,
        lambda store: supernet.finished(store, supernet.FINETUNE),
        "Fine-tune the supernet, group-sizes sampled per step (Eq. 8).",
    ),
    "search": Stage(search.run, search.plan, search.finished, "Evaluate every configuration and select under budgets."),
    "validate": Stage(
        validate.run, validate.plan, validate.finished, "Train fixed and selected configurations on their own."
    ),
    "sweep-alpha": Stage(sweep.run, sweep.plan, sweep.finished, "Sweep the sampling temperature alpha (Figure 1)."),
}
"""The stages in the order in which `gross run` does them."""


def run_all(session: Session) -> None:
    """Do every stage; what is stored is not done again.

    Where units fail, the stages that do not need them still run. Raises UnitsFailedError, naming them, at the end. A
    limit on a latency that is not measured, or below the fastest configuration, is told once the networks are trained.
    """
    failures: list[str] = []
    for name, stage in STAGES.items():
        try:
            stage.run(session)
            if name == train.STAGE:
                rounds.check_limits(session.store)
        except UnitsFailedError as error:
            failures.append(str(error))
        except MissingStageError:
            if not failures:
                raise
            break  # it needs what failed
    if failures:
        raise UnitsFailedError("\n".join(failures))


def status(store: RunStore) -> list[tuple[str, int, int | None]]:
    """Return (stage, units finished, units planned) for each; None where an earlier stage has to say how many."""
    rows: list[tuple[str, int, int | None]] = []
    for name, stage in STAGES.items():
        try:
            planned = {unit.name for unit in stage.plan(store)}
            rows.append((name, len(stage.finished(store) & planned), len(planned)))
        except MissingStageError:
            rows.append((name, 0, None))
    return rows
