"""The command `gross status`: how far each stage of a run is."""

from __future__ import annotations

import click

from gross_ray.run.store import RunStore
from pipelines.run import status as stages


def status(run: str) -> None:
    """Print how far each stage is."""
    store = RunStore.open(run)
    click.echo(f"{store.storage}: {store.experiment.name}, experiment {store.experiment.fingerprint()}")
    for name, done, planned in stages(store):
        count = "waits for an earlier stage" if planned is None else f"{done} of {planned} units"
        click.echo(f"  {name:<12} {count}")
