"""The command `gross show`: print a stored table as text or CSV."""

from __future__ import annotations

import click

from gross_ray.report.strips import frame_text
from gross_ray.run.store import read_table


def show(run: str, table: str, *, rows: int, csv: bool) -> None:
    """Print the first `rows` of a table (0: all), or the whole table as CSV."""
    frame = read_table(run, table)
    if csv:
        click.echo(frame.to_csv(index=False), nl=False)
        return
    shown = frame.head(rows) if rows else frame
    click.echo(frame_text(shown) if len(frame) else f"{table}: no rows yet")
    if len(shown) < len(frame):
        click.echo(f"... {len(frame) - len(shown)} more rows (--rows 0 for all)")
