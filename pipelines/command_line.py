"""What the commands share: options, their values checked, and errors of one line."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

PRESET_HELP = "Named experiment (see `gross presets`)."
SET_HELP = "Override a field of the experiment, like training.epochs=3; may be repeated."
MODEL_HELP = "Network: four-conv, vgg16, resnet18, or a function of your own, package.module:factory."
DATA_HELP = "Dataset: sample, fashion-mnist, cifar10, folder:PATH, or a function of your own, package.module:function."
WEIGHTS_HELP = "Its trained weights: safetensors, or a state dict by torch.save [they are trained]."


class OneLineErrors(click.Group):
    """Ends with status 2 and one line for a user's mistake, with 1 where units of work did not end."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run the command line, and exit with its status unless `standalone_mode` is off."""
        run = functools.partial(super().main, *args, standalone_mode=False, **kwargs)
        if not standalone_mode:
            return run()
        from pipelines import signals

        try:
            with signals.orderly():
                result: Any = run()
            sys.exit(result if isinstance(result, int) else 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            where = f" (see {context.command_path} --help)" if context else ""
            click.echo(f"Error: {error.format_message()}{where}", err=True)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):  # click's versions differ in which of the two it is
            click.echo("Interrupted: what is finished is stored; the same command again continues", err=True)
            signals.leave(signals.exit_status())

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what the project raises for its users becomes a line and a status."""
        from gross_ray.errors import DivergedError, GrossRayError, StorageError, UnitsFailedError

        try:
            return super().invoke(ctx)
        except (UnitsFailedError, DivergedError, StorageError) as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except GrossRayError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except OSError as error:  # of a file that the user named, outside any run folder
            if error.filename is None:
                raise
            click.echo(f"Error: {error.filename}: {error.strerror}; name another file, or make room for it", err=True)
            ctx.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the stages, as they are defined."""
        return list(self.commands)


def experiment_options(command: Callable[..., None], *, preset_required: bool = False) -> Callable[..., None]:
    """Add the options that make an experiment, and hand them over as a preset and the settings that change it."""

    @functools.wraps(command)
    def wrapped(
        settings: tuple[str, ...], data: str | None, model: str | None, weights: Path | None, **rest: Any
    ) -> None:
        own = [] if model is None else [f"model={json.dumps(model)}"]
        own += [] if data is None else [f"data.name={json.dumps(data)}"]
        if weights is not None:  # what is trained is one network
            own += [f"weights={json.dumps(str(weights.absolute()))}", "training.seeds=1"]
        command(settings=(*own, *settings), **rest)

    for decorate in (
        click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help=SET_HELP),
        click.option("--data", metavar="NAME", help=DATA_HELP),
        click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help=WEIGHTS_HELP),
        click.option("--model", metavar="NAME", help=MODEL_HELP),
        click.option("--preset", "preset_name", required=preset_required, help=PRESET_HELP),
    ):
        wrapped = decorate(wrapped)
    return wrapped


def work_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where the work is done, and hand them over as one Resources and one DataSource."""

    @functools.wraps(command)
    def wrapped(
        address: str | None,
        num_cpus: int | None,
        device: str,
        gpus_per_unit: float,
        data_root: str | None,
        download: bool,
        **rest: Any,
    ) -> None:
        from pipelines.cluster import Resources
        from pipelines.session import DataSource

        resources = Resources(address=address, num_cpus=num_cpus, device=device, gpus_per_unit=gpus_per_unit)
        command(resources=resources, source=DataSource(root=data_root, download=download), **rest)

    for decorate in (
        click.option("--download", is_flag=True, help="Fetch a dataset that is missing."),
        click.option("--data-root", metavar="FOLDER", help="Where the dataset's files are [~/.cache/gross_ray]."),
        click.option(
            "--gpus-per-unit", type=float, default=0.25, show_default=True, help="GPUs for each unit of work on cuda."
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="auto: cuda where the cluster has a GPU.",
        ),
        click.option("--num-cpus", type=int, help="CPU cores of this machine to use [all]."),
        click.option("--address", help="Join the Ray cluster at this address [RAY_ADDRESS, else start Ray here]."),
    ):
        wrapped = decorate(wrapped)
    return wrapped


def _experiment_of(preset_name: str, settings: tuple[str, ...]) -> Any:
    from gross_ray.data.names import is_function_name
    from gross_ray.data.own import function_of
    from gross_ray.models import factory_of
    from gross_ray.presets import preset

    experiment = preset(preset_name).override(list(settings))
    factory_of(experiment.model)
    if is_function_name(experiment.data.name):
        function_of(experiment.data.name)
    return experiment


def run_folder(
    run: str,
    preset_name: str | None,
    settings: tuple[str, ...],
    source: Any,
    reuse: Any = None,
) -> Any:
    """Open a run folder, or create it where an experiment is given; both must agree.

    What the network, the images of `source` or the run folder `reuse` show to be wrong with a new one is found before
    anything is made.
    """
    from gross_ray.errors import InvalidValueError
    from gross_ray.results.store import RunStore

    if preset_name is None:
        if settings:
            raise InvalidValueError(f"--set {settings[0]} without --preset: name the preset that it changes")
        return RunStore.open(run)
    experiment = _experiment_of(preset_name, settings)
    if not RunStore.is_there(run):
        from gross_ray.weights import read_weights
        from pipelines.preflight import check_experiment

        if experiment.weights:
            read_weights(experiment.weights)  # before the images: it is sooner told
        if reuse is not None:
            from pipelines.reuse import check_reusable

            check_reusable(experiment, reuse)
        check_experiment(experiment, source.load(experiment.data))
        for line in experiment.without_effect():
            click.echo(f"without effect: {line}", err=True)
    return RunStore.create(run, experiment)


def _callbacks(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> list[Any]:
    from pipelines.callbacks import load_callbacks

    return load_callbacks(values)


callback_option = click.option(
    "--callback",
    "callbacks",
    metavar="MODULE:NAME",
    multiple=True,
    callback=_callbacks,
    help="A ray.tune.Callback, or a function that makes one, to be told of the trials of validate and sweep-alpha; "
    "may be repeated.",
)


def work(
    store: Any,
    resources: Any,
    source: Any,
    do: Callable[[Any], None],
    callbacks: Sequence[Any] = (),
    show: Callable[[], Any] = lambda: None,
) -> Any:
    """Call `do` with a session on a run folder, which reports its progress on stderr, and return what `show` does then.

    Both are called under the folder's lock, and again after a damaged file was found and deleted.
    """
    from pipelines.progress import Reporter
    from pipelines.session import Session, redone_after_damage

    def all_of_it() -> Any:
        do(session)
        return show()

    with Session.opened(store, resources, source, Reporter(), callbacks=callbacks) as session:
        return redone_after_damage(store, session.reporter, all_of_it)


def refuse_alone(owner: str, given: bool, options: Mapping[str, object]) -> None:
    """Refuse those of `options` that are set where the option that they belong to is not."""
    for name, value in options.items():
        if value is not None and not given:
            raise click.UsageError(f"{name} {value} without {owner}: it says nothing then; add {owner} or leave it out")


def budgets_of(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Any, ...]:
    """Read budgets like macs=2.66M (a click callback)."""
    from gross_ray.search.selection import Budget

    return tuple(Budget.parse(value) for value in values)


def costs_of(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Read costs like macs,latency_ms (a click callback)."""
    from gross_ray.search.selection import COSTS

    costs = None if value is None else list(dict.fromkeys(part.strip() for part in value.split(",")))
    for cost in costs or ():
        if cost not in COSTS:
            raise click.UsageError(f"--costs {value}: {cost!r} is none of {', '.join(COSTS)}")
    return costs


def configurations_of(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Any, ...]:
    """Read configurations like 8-16-64 (a click callback)."""
    from gross_ray.space import Configuration

    return tuple(Configuration.parse(value) for value in values)


def whole_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Read a list like 1,4,16 given to `option`; no numbers for None."""
    parts = () if text is None else tuple(part.strip() for part in text.split(","))
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise click.UsageError(f"{option} {text}: must be whole numbers above 0 with commas between, like 1,4,16,32")
    numbers = tuple(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise click.UsageError(f"{option} {text}: must name each number once")
    return numbers
