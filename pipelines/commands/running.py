"""The commands that run stages: they open a session on a run folder, do one stage or all, and print the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from gross_ray.report.page import write_page
from gross_ray.report.searched import Searched
from gross_ray.report.terminal import results, stage_results
from gross_ray.run.store import RunStore
from gross_ray.space import Configuration
from pipelines.commands.options import Place
from pipelines.commands.run_folders import run_folder
from pipelines.commands.terminal import Reporter
from pipelines.driver import Session, redone_after_damage
from pipelines.stages import validate
from pipelines.stages.pipeline import STAGES, do_all
from pipelines.stages.reuse import take_evaluations, take_over

Settings = tuple[str, ...]
Shown = TypeVar("Shown")


def run(
    out: str,
    preset_name: str,
    settings: Settings,
    place: Place,
    callbacks: Sequence[Any],
    *,
    reuse: str | None,
    reuse_evaluations: bool,
) -> None:
    """Take over units from the run folder `reuse`, do every stage, print the results and write the page."""
    other = None if reuse is None else RunStore.open(reuse)
    store = run_folder(out, preset_name, settings, place.source(), other)

    def do(session: Session) -> None:
        if other is not None:
            taken = ", ".join(f"{stage} {num}" for stage, num in take_over(store, other).items())
            session.note(f"taken over from {other.storage}, units by stage: {taken}")
            if reuse_evaluations:
                num = take_evaluations(session.run, other)
                session.note(f"taken over from {other.storage}: {num} evaluated configurations")
        do_all(session)

    def show() -> tuple[str, str]:
        searched = Searched.of(store)
        return results(store, searched=searched), write_page(store, searched=searched)

    text, page = work(store, place, do, show, callbacks)
    click.echo(text)
    click.echo(f"page: {page}", err=True)


def run_stage(
    name: str, run: str, preset_name: str | None, settings: Settings, place: Place, callbacks: Sequence[Any] = ()
) -> None:
    """Do one stage's missing units, and print the stage's results."""
    store = run_folder(run, preset_name, settings, place.source())
    click.echo(work(store, place, STAGES[name].do, lambda: stage_results(store, name), callbacks))


def validate_named(
    run: str,
    configurations: Sequence[Configuration],
    preset_name: str | None,
    settings: Settings,
    place: Place,
    callbacks: Sequence[Any],
) -> None:
    """Train these configurations on their own, and print the results of all validated ones."""
    store = run_folder(run, preset_name, settings, place.source())

    def do(session: Session) -> None:
        validate.do_named(session, configurations)

    click.echo(work(store, place, do, lambda: stage_results(store, validate.NAME), callbacks))


def work(
    store: RunStore,
    place: Place,
    do: Callable[[Session], None],
    show: Callable[[], Shown],
    callbacks: Sequence[Any] = (),
) -> Shown:
    """Call `do` with a session on a run folder, which reports progress on stderr, and return `show()`.

    Both are called under the folder's lock, and called again if a damaged file was found and deleted.
    """
    opened = Session.opened(
        store, place.resources, place.source(), Reporter(), callbacks=callbacks, in_process=place.in_process
    )
    with opened as session:

        def do_and_show() -> Shown:
            do(session)
            return show()

        return redone_after_damage(session, do_and_show)
