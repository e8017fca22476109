"""A run folder as a command gets it: opened, or made for a new experiment once that is known to work."""

from __future__ import annotations

import click

from gross_ray.data.names import is_function_name
from gross_ray.data.own import function_of
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Experiment
from gross_ray.models import factory_of
from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from gross_ray.weights import read_weights
from pipelines.commands.preflight import check_experiment
from pipelines.reuse import check_reusable
from pipelines.session import DataSource


def run_folder(
    run: str,
    preset_name: str | None,
    settings: tuple[str, ...],
    source: DataSource,
    reuse: RunStore | None = None,
) -> RunStore:
    """Open a run folder, or make it for a preset and its settings. Where both exist, they must agree.

    A new experiment is first checked against the network, the images of `source` and the run folder `reuse`: a mistake
    leaves nothing behind.
    """
    if preset_name is None:
        if settings:
            raise InvalidValueError(f"--set {settings[0]} without --preset: name the preset that it changes")
        return RunStore.open(run)
    experiment = _experiment_of(preset_name, settings)
    if not RunStore.is_there(run):
        if experiment.weights:
            read_weights(experiment.weights)  # before the images, which take longer to read
        if reuse is not None:
            check_reusable(experiment, reuse)
        check_experiment(experiment, source.load(experiment.data))
        for line in experiment.without_effect():
            click.echo(f"without effect: {line}", err=True)
    return RunStore.create(run, experiment)


def _experiment_of(preset_name: str, settings: tuple[str, ...]) -> Experiment:
    """Return the experiment; raises InvalidValueError also where a function that it names cannot be imported."""
    experiment = preset(preset_name).override(list(settings))
    factory_of(experiment.model)
    if is_function_name(experiment.data.name):
        function_of(experiment.data.name)
    return experiment
