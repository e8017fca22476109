"""The command `gross report`: the results of a run as text, and as a page."""

from __future__ import annotations

from pathlib import Path

import click

from gross_ray.report.page import check_target, write_page
from gross_ray.report.searched import Searched
from gross_ray.report.terminal import results
from gross_ray.run.store import RunStore


def report(run: str, *, markdown: bool, target: Path | None) -> None:
    """Print the results, and write the page to `target` or else into the run folder; as Markdown, no page."""
    check_target(target)
    store = RunStore.open(run)
    searched = Searched.of(store)  # once, for both: it is most of what is read
    click.echo(results(store, markdown=markdown, searched=searched))
    if not markdown:
        click.echo(f"page: {write_page(store, target, searched)}", err=True)
