"""The command `gross export`: write a validated configuration as a network file with its model card beside it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.data.image_set import ImageSet
from gross_ray.export import card_path, check_export, check_format, export_network
from gross_ray.report.model_card import foldings_text, model_card, most_accurate_seed
from gross_ray.run.opened import Run
from gross_ray.run.pins import check_data
from gross_ray.run.store import RunStore
from gross_ray.search.folding import fold
from gross_ray.search.latency import LatencyModel, LatencyOptions, Timing, time_networks
from gross_ray.space import Configuration
from pipelines.driver import DataSource
from pipelines.stages import latencies

CHECKED = 250
"""Images in a batch of a check."""


def export(
    run: str,
    configuration: str,
    target: Path,
    *,
    seed: int | None,
    objective: str | None,
    batch_size: int,
    device: str | None,
    images: DataSource | None,
) -> None:
    """Write a validated configuration as a plain network and its card to `target`, and print a summary.

    `seed` is the repeat, by default the most accurate one on the validation split. With an `objective`, layers are
    folded if that costs less (`fold`). For "latency_ms", batches of `batch_size` images are timed on `device`, by
    default a GPU if there is one. With `images`, the file is compared with the network on the run's test split. Raises
    InvalidValueError for a file that cannot be written or a configuration outside the space, MissingStageError if it is
    not validated, and GrossRayError if the format cannot represent the network or the file computes something else;
    then nothing is written.
    """
    check_format(target)
    store, configuration = RunStore.open(run), str(Configuration.parse(configuration))
    if seed is None:
        seed = most_accurate_seed(store, configuration) or 0
    opened = Run(store)
    network, base = opened.validated(configuration, seed), opened.base
    shape = base.input_shape
    folding: dict[str, Any] = {}
    time: LatencyModel | Timing | None = latencies.in_force(opened)
    lines: list[str] = []
    if objective is not None:
        bottlenecks, options = network, LatencyOptions(batch_size=batch_size)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        network, foldings = fold(bottlenecks, shape, objective=objective, latency=options, device=device)
        lines.append(foldings_text(objective, foldings))
        folded = [asdict(layer) for layer in foldings if layer.folded]
        folding = {"folded by": objective, "folded": folded}
        if objective == "latency_ms":
            both = time_networks({"as bottlenecks": bottlenecks, "as written": network}, shape, options, device=device)
            time = both["as written"]
            lines.append("whole: " + ", ".join(f"{timing.latency_ms:.6g} ms {form}" for form, timing in both.items()))
        elif folded:
            time = None  # the predicted time is that of the bottlenecks
    card = model_card(store, configuration, seed, network, shape, base.classes, layers=base.space.layers, latency=time)
    card |= {**folding, "file": target.name}
    if target.suffix == ".safetensors":
        card["network"] = str(network).splitlines()
    test = None if images is None else _test_images(opened, images)
    beside = card_path(target)
    with whole_or_not_at_all(beside) as partial_card, whole_or_not_at_all(target) as partial:  # both files, or neither
        partial_card.touch()  # before the network's file: their folder may be read-only
        export_network(network, partial, shape)
        if test is not None:
            check = check_export(partial, network, (test.as_inputs(batch) for batch, _ in test.batches(CHECKED)))
            lines.append(str(check))
            card["check"] = asdict(check)
        partial_card.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    click.echo("\n".join([*lines, f"{configuration} (seed {seed}) written to {target}, its card to {beside}"]))


def _test_images(run: Run, source: DataSource) -> ImageSet:
    """Return the test split; raises DatasetError if the images are not those of the run."""
    splits = source.load(run.experiment.data)
    check_data(run.store, splits)
    return splits.test
