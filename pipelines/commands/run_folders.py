"""The run folder of a command: an existing one is opened, a new one is made after its experiment was checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from torch import Generator

from gross_ray.data.names import is_function_name
from gross_ray.data.own import function_of
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Experiment
from gross_ray.models import build_model, factory_of
from gross_ray.nn.calls import input_channels
from gross_ray.presets import preset
from gross_ray.run.experiment_file import experiment_of
from gross_ray.run.opened import Run
from gross_ray.run.pins import pin, pin_weights
from gross_ray.run.progress import store_plans
from gross_ray.run.store import RunStore
from gross_ray.weights import read_weights
from pipelines.commands.preflight import check_experiment
from pipelines.driver import DataSource
from pipelines.stages.pipeline import plans
from pipelines.stages.reuse import check_reusable, check_same_images
from pipelines.stages.train import check_given

_CLASSES, _SIZE = 10, 32
"""The number of classes and the image size for which a network is built to find the channels that it takes."""


_MAY_BE_KNOWN = (
    "the validation split, which selects, may have images that the weights were trained on: accuracies on it are then "
    "too high; data.validation_from=test takes half of the test split instead"
)


def run_folder(
    run: str,
    preset_name: str | Path | None,
    settings: tuple[str, ...],
    source: DataSource,
    reuse: RunStore | None = None,
) -> RunStore:
    """Open a run folder, or make it for a preset or an experiment's file; an existing folder must agree with it.

    A new experiment is first checked against the network, the images of `source` and the run folder `reuse`, so that a
    mistake leaves nothing behind.
    """
    if preset_name is None:
        if settings:
            raise InvalidValueError(
                f"--set {settings[0]} without --preset: name the preset, or the file, that it changes"
            )
        return RunStore.open(run)
    return folder_of(run, _experiment_of(preset_name, settings), source, reuse)


def folder_of(
    run: str,
    experiment: Experiment,
    source: DataSource,
    reuse: RunStore | None = None,
    *,
    endings: Sequence[str] = (),
) -> RunStore:
    """Open a run folder, or make it for an experiment; an existing folder must agree with it (see `run_folder`).

    For a new one, exports to files with these `endings` are tried first.
    """
    if not RunStore.is_there(run):
        return _new_run_folder(run, experiment, source, reuse, endings)
    store = RunStore.create(run, experiment)
    if RunStore.open(run).experiment.data.name != experiment.data.name:  # another path may have the same images
        pin(store, source.load(experiment.data))
    if experiment.weights:
        check_given(store)
    return store


def _new_run_folder(
    run: str, experiment: Experiment, source: DataSource, reuse: RunStore | None, endings: Sequence[str]
) -> RunStore:
    """Check a new experiment, make its run folder, and pin its images and weights there."""
    # First, because images take longer.
    weights = read_weights(experiment.weights, experiment.weights_key) if experiment.weights else {}
    if reuse is not None:
        check_reusable(experiment, reuse)
    splits = source.load(experiment.data)
    for line in splits.notes:
        click.echo(line, err=True)
    if reuse is not None:
        check_same_images(splits, reuse)
    for line in check_experiment(experiment, splits, endings=endings):
        click.echo(line, err=True)
    if experiment.weights and experiment.data.validation_from == "train":
        click.echo(_MAY_BE_KNOWN, err=True)
    for line in (
        *experiment.without_effect(),
        *experiment.without_effect(num_images=len(splits.train)),
        *source.without_effect(experiment.data.name),
    ):
        click.echo(f"without effect: {line}", err=True)
    store = RunStore.create(run, experiment)
    pin(store, splits)
    if experiment.weights:
        pin_weights(store, weights)
    store_plans(store, plans(Run(store)))
    return store


def _experiment_of(named: str | Path, settings: tuple[str, ...]) -> Experiment:
    """Return the experiment of a preset or a file, with its settings.

    Raises InvalidValueError, also if a function that it names cannot be imported.
    """
    experiment = (experiment_of(named) if isinstance(named, Path) else preset(named)).override(list(settings))
    factory_of(experiment.model)
    if is_function_name(experiment.data.name):
        function_of(experiment.data.name)
    return with_channels(experiment)


def with_channels(experiment: Experiment) -> Experiment:
    """Return the experiment with grey images if its network takes one channel, and report that in a line.

    Raises InvalidValueError for a network that takes another number of channels than the images can have.
    """
    if ":" not in experiment.model:
        return experiment
    try:
        network = build_model(experiment.model, num_classes=_CLASSES, image_size=_SIZE, generator=Generator())
    except InvalidValueError:  # it may need other classes or sizes: `check_experiment` builds it for the images
        return experiment
    channels, images = input_channels(network, _SIZE) or 3, experiment.data.channels
    if (channels, images) == (1, 3):
        click.echo("data.channels = 1: the network takes one channel, so the images are made grey", err=True)
        return experiment.override(["data.channels=1"])
    if channels != images:
        remedy = f"set data.channels={channels}" if channels == 3 else f"put nn.Conv2d(3, {channels}, 1) before it"
        raise InvalidValueError(
            f"model {experiment.model!r}: takes images of {channels} channels, and the images have {images} "
            f"(data.channels: 3, or 1 for grey ones); {remedy}"
        )
    return experiment
