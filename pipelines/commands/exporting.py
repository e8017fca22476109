"""A validated configuration of a run, out to production: its network in a file, and its model card beside it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.export import card_path, check_format, export_network
from gross_ray.report.model_card import foldings_text, model_card, most_accurate_seed
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.folding import fold
from gross_ray.search.latency import LatencyModel, LatencyOptions, Timing, time_networks
from gross_ray.space import Configuration
from pipelines.stages import latencies


def export(
    run: str,
    configuration: str,
    target: Path,
    *,
    seed: int | None,
    objective: str | None,
    batch_size: int,
    device: str | None,
) -> None:
    """Write a configuration of a run to `target`, and print what was written (`export_validated`)."""
    lines = export_validated(
        RunStore.open(run),
        configuration,
        target,
        seed=seed,
        objective=objective,
        latency=LatencyOptions(batch_size=batch_size),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    click.echo("\n".join(lines))


def export_validated(
    store: RunStore,
    configuration: str,
    target: Path,
    *,
    seed: int | None = None,
    objective: str | None = None,
    latency: LatencyOptions = LatencyOptions(),  # noqa: B008 (frozen)
    device: torch.device | str = "cpu",
) -> list[str]:
    """Write a configuration's own training as a plain network, and its card beside it; return what to tell of it.

    `seed` is the repeat, by default the most accurate one on the validation split. With an `objective`, layers are
    folded where that costs less (`fold`); by "latency_ms" layers, and then the whole, are timed on `device`. Raises
    InvalidValueError for a file that cannot be written or a configuration outside the space, MissingStageError for one
    that is not validated, and GrossRayError where the format cannot hold the network; then nothing is written.
    """
    check_format(target)
    configuration = str(Configuration.parse(configuration))
    if seed is None:
        seed = most_accurate_seed(store, configuration) or 0
    run = Run(store)
    network, base = run.validated(configuration, seed), run.base
    shape = base.input_shape
    told: list[str] = []
    folding: dict[str, Any] = {}
    time: LatencyModel | Timing | None = latencies.in_force(run)
    if objective is not None:
        bottlenecks = network
        network, foldings = fold(bottlenecks, shape, objective=objective, latency=latency, device=device)
        told.append(foldings_text(objective, foldings))
        folded = [asdict(one) for one in foldings if one.folded]
        folding = {"folded by": objective, "folded": folded}
        if objective == "latency_ms":
            both = time_networks({"as bottlenecks": bottlenecks, "as written": network}, shape, latency, device=device)
            time = both["as written"]
            told.append("whole: " + ", ".join(f"{one.latency_ms:.6g} ms {form}" for form, one in both.items()))
        elif folded:
            time = None  # what is predicted is the time of the bottlenecks
    card = model_card(store, configuration, seed, network, shape, base.classes, layers=base.space.layers, latency=time)
    card |= {**folding, "file": target.name}
    if target.suffix == ".safetensors":
        card["network"] = str(network).splitlines()
    beside = card_path(target)
    with whole_or_not_at_all(beside) as partial:  # both, or none of them
        partial.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        export_network(network, target, shape)
    return [*told, f"{configuration} (seed {seed}) written to {target}, its card to {beside}"]
