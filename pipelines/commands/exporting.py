"""The command `gross export`: write a validated configuration as a network file with its model card beside it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.data.image_set import ImageSet
from gross_ray.errors import InvalidValueError, MissingStageError
from gross_ray.export import card_path, check_export, check_format, export_network, file_facts
from gross_ray.report.model_card import foldings_text, model_card, most_accurate_seed, predicted_entry, timed_entry
from gross_ray.report.results import where
from gross_ray.run.limits import limits
from gross_ray.run.opened import Run
from gross_ray.run.pins import check_data
from gross_ray.run.store import RunStore
from gross_ray.search.folding import fold, fold_within
from gross_ray.search.forms import group_sizes_of
from gross_ray.search.latency import LatencyModel, time_networks
from gross_ray.search.options import LatencyOptions
from gross_ray.search.runtimes import READ_ONNX
from gross_ray.space import DENSE, Configuration
from pipelines.driver import DataSource
from pipelines.stages import latencies

CHECKED = 250
"""Images in a batch of a check."""
ROUNDS = 20
"""Rounds in which the file is timed beside the full network."""


def export(
    run: str, configuration: str, target: Path, *, seed: int | None, objective: str | None, images: DataSource | None
) -> None:
    """Write a validated configuration as a plain network and its card to `target`, and print a summary.

    `seed` is the repeat, by default the most accurate one on the validation split. With an `objective`, layers are
    written as dense convolutions if that costs less (`fold`), for "latency_ms" in the runtime measured last; None:
    latency_ms, if it was measured and the run's limits allow it, otherwise all layers stay bottlenecks. With `images`,
    the file is compared with the network on the run's test split. Raises InvalidValueError for a file that cannot be
    written or a configuration outside the space, MissingStageError if it is not validated, or no latency is measured,
    and GrossRayError if the format cannot represent the network or the file computes something else; then nothing is
    written.
    """
    check_format(target)
    store, configuration = RunStore.open(run), str(Configuration.parse(configuration))
    if seed is None:
        seed = most_accurate_seed(store, configuration) or 0
    opened = Run(store)
    network, base = opened.validated(configuration, seed), opened.base
    measured = latencies.in_force(opened)
    if objective is None:
        network, lines, folding = in_faster_forms(opened, network, measured)
    else:
        network, lines, folding = _folded(opened, network, objective, measured)
    forms = dict.fromkeys(opened.space.layers, DENSE) | group_sizes_of(network)
    time = None if measured is None else predicted_entry(measured, forms)
    test = None if images is None else _test_images(opened, images)
    beside = card_path(target)
    with whole_or_not_at_all(beside) as partial_card, whole_or_not_at_all(target) as partial:  # both files, or neither
        partial_card.touch()  # before the network's file: their folder may be read-only
        export_network(network, partial, base.input_shape)
        check = {}
        if test is not None:
            compared = check_export(partial, network, (test.as_inputs(batch) for batch, _ in test.batches(CHECKED)))
            lines.append(str(compared))
            check = {"check": asdict(compared)}
        if measured is not None and (device := measured.timed_here()) is not None:
            time, line = _timed(opened, measured, device, partial if target.suffix == ".onnx" else None, network, time)
            lines.append(line)
        card = model_card(
            store,
            configuration,
            seed,
            network,
            base.input_shape,
            base.classes,
            layers=opened.space.layers,
            preparation=base.preparation,
            latency=time,
        )
        card |= {**folding, **check, "predicted latencies": _predictions(opened, forms), "file": target.name}
        card |= file_facts(partial, network)
        partial_card.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    click.echo("\n".join([*lines, f"{configuration} (seed {seed}) written to {target}, its card to {beside}"]))


def in_faster_forms(
    run: Run, network: nn.Module, measured: LatencyModel | None
) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """Return the network that `gross export` writes by default, a line for each layer, and the card's fields on them.

    Each layer has its faster form (`fold_within`), if latency was measured.
    """
    if measured is None:
        return network, [], {}
    folded, added, why_not = fold_within(network, measured, run.base.input_shape, limits(run.store))
    return (network, [why_not], {}) if why_not else (folded, *_by_latency(network, added))


def _folded(
    run: Run, network: nn.Module, objective: str, measured: LatencyModel | None
) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """Return the network in the form that costs less, a line for each layer, and what the card says of them."""
    if objective == "none":
        return network, [], {}
    if objective != "latency_ms":
        network, foldings = fold(network, run.base.input_shape, objective=objective)
        folded = [asdict(layer) for layer in foldings if layer.folded]
        return network, [foldings_text(objective, foldings)], {"folded by": objective, "folded": folded}
    if measured is None:
        raise MissingStageError(
            f"--fold latency_ms needs a measurement, and {run.store.storage} has none in use: run `gross latency` on "
            "it first"
        )
    dense, added = measured.fold(network)
    return dense, *_by_latency(network, added)


def _by_latency(network: nn.Module, added: dict[str, float]) -> tuple[list[str], dict[str, Any]]:
    """Return a line for each layer of a network before it is folded, and what the card says of the dense ones."""
    sizes = group_sizes_of(network)
    lines = [
        f"{name} (group-size {sizes[name]}): a bottleneck is {abs(ms):.3g} ms "
        f"{'slower: written as the dense convolution' if ms > 0 else 'faster: kept'}"
        for name, ms in added.items()
    ]
    dense = [{"layer": name, "group_size": sizes[name], "added_ms": ms} for name, ms in added.items() if ms > 0]
    return lines, {"folded by": "latency_ms", "folded": dense}


def _timed(
    run: Run,
    measured: LatencyModel,
    device: torch.device,
    file: Path | None,
    network: nn.Module,
    predicted: dict[str, Any] | None,
) -> tuple[dict[str, Any] | None, str]:
    """Time the network as written beside the full one, in the runtime and the conditions measured last.

    Return the card's entry and a line. If it cannot be timed any more, the entry is the prediction.
    """
    as_written = file if file is not None and measured.runtime in READ_ONNX else network
    what = "network" if as_written is network else "file"
    networks = {"full": run.base.network, "written": as_written}
    try:
        options = LatencyOptions(
            runtime=measured.runtime, batch_size=measured.batch_size, threads=measured.threads, repeats=ROUNDS
        )
        times = time_networks(networks, run.base.input_shape, options, device=device)
    except InvalidValueError as error:
        return predicted, f"not timed again: {error}"
    full, written = (times[name].latency_ms for name in networks)
    line = (
        f"the {what} takes {written:.3g} ms for a batch of {measured.batch_size} in "
        f"{where(times['written'])}; the full network takes {full:.3g} ms"
    )
    return timed_entry(times["written"], what, full), line


def _predictions(run: Run, forms: dict[str, int]) -> list[dict[str, Any]]:
    """Return the time that each stored measurement predicts of these forms, whatever its runtime, batch and threads."""
    return [predicted_entry(model, forms) for model in latencies.all_of(run)]


def _test_images(run: Run, source: DataSource) -> ImageSet:
    """Return the test split; raises DatasetError if the images are not those of the run."""
    splits = source.load(run.experiment.data)
    check_data(run.store, splits)
    return splits.test
