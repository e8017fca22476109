"""The command `gross report`: print the results of a run, and write its HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from gross_ray.report.page import check_target, write_page
from gross_ray.report.searched import Searched
from gross_ray.report.terminal import results
from gross_ray.run.store import RunStore


def report(run: str, *, markdown: bool, target: Path | None) -> None:
    """Print the results; unless as Markdown, also write the page to `target`, by default into the run folder."""
    check_target(target)
    store = RunStore.open(run)
    searched = Searched.of(store)  # read once for both, because it is most of the data
    click.echo(results(store, markdown=markdown, searched=searched))
    if not markdown:
        click.echo(f"page: {write_page(store, target, searched)}", err=True)
