"""The command `gross status`: print the finished and planned units of each stage."""

from __future__ import annotations

import click

from gross_ray.run.pins import fingerprint
from gross_ray.run.progress import progress, stored_plans
from gross_ray.run.store import RunStore


def status(run: str) -> None:
    """Print the finished and planned units of each stage; torch is imported only if no plans are stored."""
    store = RunStore.open(run)
    click.echo(f"{store.storage}: {store.experiment.name}, experiment {fingerprint(store)}")
    plans = stored_plans(store)
    if plans is None:
        from gross_ray.run.opened import Run
        from pipelines.stages.pipeline import plans as plans_of

        plans = plans_of(Run(store))
    for name, done, planned in progress(store, plans):
        count = "waits for an earlier stage" if planned is None else f"{done} of {planned} units"
        click.echo(f"  {name:<12} {count}")
