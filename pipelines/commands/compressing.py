"""The command `gross compress`: from a trained network and images to a smaller file, by every stage of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from gross_ray.data.options import DataOptions
from gross_ray.defaults import augmentation_for, compression_experiment
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Experiment
from gross_ray.export import check_format
from gross_ray.models import build_model
from gross_ray.report.compressed import (
    best_candidate,
    compressed_table,
    estimate_table,
    plan_lines,
    trained_candidates,
)
from gross_ray.report.inspection import inspection
from gross_ray.report.model_card import most_accurate_seed
from gross_ray.report.page import write_page
from gross_ray.report.searched import Searched
from gross_ray.report.terminal import as_text
from gross_ray.run.opened import Run, layer_choice
from gross_ray.search.budgets import Budget, RelativeBudget
from gross_ray.search.cost import full_costs
from gross_ray.search.options import LatencyOptions
from gross_ray.space import SearchSpace
from gross_ray.supernet.layers import LayerChoice
from gross_ray.training.options import CROP
from gross_ray.weights import load_weights, read_weights
from pipelines.commands import exporting
from pipelines.commands.estimating import estimate
from pipelines.commands.measuring import asked_for
from pipelines.commands.options import Place
from pipelines.commands.preflight import check_experiment
from pipelines.commands.run_folders import folder_of, with_channels
from pipelines.commands.running import work
from pipelines.commands.terminal import measuring_bar
from pipelines.driver import DataSource, Session
from pipelines.stages import latencies, train
from pipelines.stages.pipeline import do_all

_CONDITIONS = ("runtime", "batch_size", "threads")
BEST = "best.onnx"
"""The exported file in the run folder, if no other is named."""


def compress(
    out: str,
    *,
    model: str,
    weights: Path | None,
    weights_key: str | None,
    data: str,
    budgets: Sequence[Budget | RelativeBudget],
    adapt: int | None,
    effort: str,
    epochs: int | None,
    settings: Sequence[str],
    timed: dict[str, Any],
    target: Path | None,
    dry_run: bool,
    place: Place,
) -> None:
    """Do every stage of the compression within `budgets`, write the best network and the page, and print a table.

    `timed` are fields of LatencyOptions, the runtime in which latency is measured (None: the default); `settings`
    override fields of the experiment. With `dry_run`, print the plan, the layers and how long all of it will take here,
    and write nothing. Raises as `compression_experiment`, `check_experiment` and `export` do.
    """
    started = time.perf_counter()
    target = _target(out, target)
    source, texts = place.source(), list(map(str, budgets))
    experiment, choice = _experiment(
        source, model, weights, weights_key or "", data, texts, adapt or 0, effort, epochs or 0, settings
    )
    if dry_run:
        _print_estimate(experiment, choice, out, place, timed, target, started)
        return
    store = folder_of(out, experiment, source, endings=[target.suffix])

    def do(session: Session) -> None:
        train.do(session)
        _measure(session, timed)
        do_all(session)

    def show() -> tuple[Searched, str]:
        searched = Searched.of(store)
        return searched, write_page(store, searched=searched)

    searched, page = work(store, place, do, show)
    best = best_candidate(store, searched)
    exporting.export(out, best, target, seed=None, objective=None, images=source)
    run = Run(store)
    costs = {name: _as_written(run, name) for name in trained_candidates(store, searched)}
    click.echo("\n" + as_text(compressed_table(store, searched, costs, best, str(target))))
    click.echo(f"page: {page}", err=True)


def _as_written(run: Run, configuration: str) -> dict[str, float]:
    """Return the costs of a candidate in the form in which it is written: macs, parameters and latency_ms."""
    measured = latencies.in_force(run)
    assert measured is not None  # by `_measure`
    network = run.validated(configuration, most_accurate_seed(run.store, configuration) or 0)
    network, *_ = exporting.in_faster_forms(run, network, measured)
    return full_costs(network, run.base.input_shape) | {"latency_ms": measured.predict_network(network)}


def _print_estimate(
    experiment: Experiment,
    choice: LayerChoice,
    out: str,
    place: Place,
    timed: dict[str, Any],
    target: Path,
    started: float,
) -> None:
    """Check the experiment, and print its layers, its space, and the time that each part of it will take here."""
    splits, ending = place.source().load(experiment.data), target.suffix
    for line in (*splits.notes, *check_experiment(experiment, splits, endings=[ending])):
        click.echo(line, err=True)
    tables = inspection(choice.network, choice, splits.train.images.shape[1:])
    seconds = {"images and checks": time.perf_counter() - started}
    click.echo("the parts are tried in small, to see how long they will take", err=True)
    seconds |= estimate(
        experiment,
        out,
        place,
        *_asked_for(timed),
        ending,
        lambda name, took: click.echo(f"{name}: tried in {took:.0f} s", err=True),
    )
    click.echo("\n\n".join(as_text(table) for table in [*tables, estimate_table(seconds)]))


def _asked_for(timed: dict[str, Any]) -> tuple[str, LatencyOptions]:
    return asked_for(None, {name: value for name, value in timed.items() if value is not None})


def _target(out: str, target: Path | None) -> Path:
    """Return the file to write; raises InvalidValueError if it cannot be written."""
    if target is None:
        if "://" in out:
            raise InvalidValueError(f"--out {out}: the best network cannot be written there; name a file with --to")
        return Path(out) / BEST
    check_format(target)
    return target


def _experiment(
    source: DataSource,
    model: str,
    weights: Path | None,
    weights_key: str,
    data: str,
    budgets: Sequence[str],
    adapt: int,
    effort: str,
    epochs: int,
    settings: Sequence[str],
) -> tuple[Experiment, LayerChoice]:
    """Return the experiment for the network and the images, and its layers, and print what it chose."""
    data_fields = [setting for setting in settings if setting.partition("=")[0].strip().startswith("data.")]
    options = with_channels(Experiment(model=model, data=DataOptions(name=data)).override(data_fields)).data
    if weights is not None:
        read_weights(weights, weights_key)  # before the images, which take longer
    splits = source.load(options)
    shape = splits.train.images.shape[1:]
    network = build_model(model, num_classes=len(splits.classes), image_size=shape[-1], generator=torch.Generator())
    augment, key = CROP, [f"weights_key={json.dumps(weights_key)}"] if weights_key else []
    if weights is not None:
        load_weights(network, weights, key=weights_key, new_classifier=bool(adapt))
        augment = augmentation_for(network, splits.validation)
    experiment = compression_experiment(
        network,
        shape,
        model=model,
        budgets=budgets,
        num_images=len(splits.train),
        data=options,
        weights="" if weights is None else str(weights.absolute()),
        adapt=adapt,
        effort=effort,
        epochs=epochs,
        augment=augment,
    ).override([*key, *(setting for setting in settings if setting not in data_fields)])
    choice = layer_choice(network, experiment.decomposition, shape)
    for line in plan_lines(experiment, SearchSpace(choice.group_sizes), splits):
        click.echo(line, err=True)
    return experiment, choice


def _measure(session: Session, timed: dict[str, Any]) -> None:
    """Measure latency in the run's process, unless the measurement in use was made in the same conditions."""
    device, options = _asked_for(timed)
    used = latencies.in_force(session.run)
    if used is not None and all(getattr(used, name) == getattr(options, name) for name in _CONDITIONS):
        return
    with measuring_bar(options.runtime, device) as advance:
        model = latencies.measure(session.run, device, options, advance)
    latencies.put(session.run, model)
    fastest = model.predict(model.costs.cheapest)
    session.note(f"latency: the full network takes {model.full_ms:.3g} ms, the fastest configuration {fastest:.3g} ms")
