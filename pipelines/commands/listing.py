"""The command `gross presets`: list the named experiments."""

from __future__ import annotations

import json

import click

from gross_ray.presets import PRESETS, preset


def presets(name: str | None) -> None:
    """Print the presets and their cost, or the fields of the preset `name` in the form that --set takes."""
    if name is not None:
        for field, value in preset(name).fields().items():
            click.echo(f"{field}={value if isinstance(value, str) else json.dumps(value)}")
        return
    for known, entry in PRESETS.items():
        click.echo(f"{known:<12} {entry.description}\n{'':<12} Cost: {entry.cost}.")
