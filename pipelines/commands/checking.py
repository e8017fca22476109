"""The command `gross check`: read every stored file, and delete damaged ones."""

from __future__ import annotations

import click

from gross_ray.run.store import RunStore
from pipelines.commands.terminal import Reporter
from pipelines.driver import locked, report_damage


def check(run: str) -> None:
    """Read every table and checkpoint of a run, delete the damaged ones, and print their number."""
    store, reporter = RunStore.open(run), Reporter()
    with locked(store, reporter):
        store.check()
        num_damaged = len(store.damaged)
        report_damage(store, reporter)
    click.echo(f"{store.storage}: {num_damaged or 'no'} damaged file{'s' * (num_damaged != 1)}")
