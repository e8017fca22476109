"""The command `gross latency`: time the layers on this machine, or read another machine's times from a file."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch

from gross_ray.report.page import check_target
from gross_ray.report.terminal import latency_table
from gross_ray.run.opened import Run
from gross_ray.run.progress import store_plans
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel, LatencyOptions
from pipelines.commands.terminal import Reporter
from pipelines.driver import locked
from pipelines.stages import latencies
from pipelines.stages.pipeline import plans


def latency(
    run: str, device: str | None, asked: dict[str, int | None], *, target: Path | None, source: Path | None
) -> None:
    """Store the times of the layers, measured here or read from `source`, and also write them to `target`.

    `asked` are fields of LatencyOptions; None keeps the default.
    """
    options = {name: value for name, value in asked.items() if value is not None}
    if source is not None and (options or device or target):
        raise click.UsageError(f"--from {source} times nothing: leave the other options out")
    check_target(target)
    opened = Run(RunStore.open(run))
    with locked(opened.store, Reporter()):
        model = _measured(opened, device, LatencyOptions(**options)) if source is None else LatencyModel.load(source)
        latencies.put(opened, model)
        store_plans(opened.store, plans(opened))
    if target is not None:
        model.save(target)
    click.echo(latency_table(opened.store))


def _measured(run: Run, device: str | None, options: LatencyOptions) -> LatencyModel:
    """Time the layers on `device`, by default a GPU if there is one, with a progress bar on stderr."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with click.progressbar(length=1000, label=f"latency on {device}", file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.update(1000 * done // total - bar.pos)

        return latencies.measure(run, device, options, advance)
