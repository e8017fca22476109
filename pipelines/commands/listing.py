"""The command `gross presets`."""

from __future__ import annotations

import json

import click

from gross_ray.presets import PRESETS, preset


def presets(name: str | None) -> None:
    """Print the named experiments and their cost, or the fields of the one called `name`, as --set takes them."""
    if name is not None:
        for field, value in preset(name).fields().items():
            click.echo(f"{field}={value if isinstance(value, str) else json.dumps(value)}")
        return
    for each, entry in PRESETS.items():
        click.echo(f"{each:<12} {entry.description}\n{'':<12} Cost: {entry.cost}.")
