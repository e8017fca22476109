"""The commands that print what a run has stored: `gross show` and `gross report`."""

from __future__ import annotations

from pathlib import Path

import click

from gross_ray.report.page import check_target, write_page
from gross_ray.report.searched import Searched
from gross_ray.report.terminal import results
from gross_ray.run.store import RunStore, read_table


def show(run: str, table: str, *, rows: int, csv: bool) -> None:
    """Print the first `rows` of a table (0: all of them), or the whole table as CSV."""
    frame = read_table(run, table)
    if csv:
        click.echo(frame.to_csv(index=False), nl=False)
        return
    shown = frame.head(rows) if rows else frame
    click.echo(shown.to_string(index=False) if len(frame) else f"{table}: no rows yet")
    if len(shown) < len(frame):
        click.echo(f"... {len(frame) - len(shown)} more rows (--rows 0 for all)")


def report(run: str, *, markdown: bool, target: Path | None) -> None:
    """Print the results, and write the page to `target` or else into the run folder; as Markdown, no page."""
    check_target(target)
    store = RunStore.open(run)
    searched = Searched.of(store)  # once, for both: it is most of what is read
    click.echo(results(store, markdown=markdown, searched=searched))
    if not markdown:
        click.echo(f"page: {write_page(store, target, searched)}", err=True)
