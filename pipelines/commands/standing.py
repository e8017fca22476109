"""The command `gross status`: print the finished and planned units of each stage."""

from __future__ import annotations

import click

from gross_ray.run.opened import Run
from gross_ray.run.pins import fingerprint
from gross_ray.run.store import RunStore
from pipelines.stages.pipeline import status as stages


def status(run: str) -> None:
    """Print the finished and planned units of each stage."""
    store = RunStore.open(run)
    click.echo(f"{store.storage}: {store.experiment.name}, experiment {fingerprint(store)}")
    for name, done, planned in stages(Run(store)):
        count = "waits for an earlier stage" if planned is None else f"{done} of {planned} units"
        click.echo(f"  {name:<12} {count}")
