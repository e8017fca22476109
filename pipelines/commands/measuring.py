"""The command `gross latency`: time networks on this machine, or read another machine's times from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from gross_ray.report.latency import dominated_sentences, extremes_table, latency_table
from gross_ray.report.page import check_target
from gross_ray.report.terminal import as_text
from gross_ray.run.opened import Run
from gross_ray.run.progress import store_plans
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel
from gross_ray.search.options import LatencyOptions
from pipelines.commands.terminal import Reporter, measuring_bar
from pipelines.driver import locked
from pipelines.stages import latencies
from pipelines.stages.pipeline import plans


def latency(run: str, device: str | None, asked: dict[str, Any], *, target: Path | None, source: Path | None) -> None:
    """Store what the layers cost, measured here or read from `source`, and also write it to `target`.

    `asked` are fields of LatencyOptions; None keeps the default.
    """
    options = {name: value for name, value in asked.items() if value is not None}
    if source is not None and (options or device or target):
        raise click.UsageError(f"--from {source} times nothing: leave the other options out")
    check_target(target)
    opened = Run(RunStore.open(run))
    with locked(opened.store, Reporter()):
        model = LatencyModel.load(source) if source is not None else _measured(opened, *asked_for(device, options))
        latencies.put(opened, model)
        store_plans(opened.store, plans(opened))
    if target is not None:
        model.save(target)
    tables = [latency_table(opened.store), extremes_table(model, opened.space.group_sizes)]
    click.echo("\n\n".join([*map(as_text, tables), *dominated_sentences(model)]))


def asked_for(device: str | None, options: dict[str, Any]) -> tuple[str, LatencyOptions]:
    """Return the device and the options; by default torch on a GPU if there is one, else ONNX Runtime."""
    on_gpu = torch.cuda.is_available() and options.get("runtime", "torch") in ("torch", "compiled")
    device = device or ("cuda" if on_gpu else "cpu")
    by_default = "torch" if device == "cuda" else "onnxruntime"
    return device, LatencyOptions(**{"runtime": by_default} | options)


def _measured(run: Run, device: str, options: LatencyOptions) -> LatencyModel:
    """Time networks on `device`, with a progress bar on stderr."""
    with measuring_bar(options.runtime, device) as advance:
        return latencies.measure(run, device, options, advance)
