"""Options that several commands share, and the checks of their values."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gross_ray.search.budgets import COSTS, Budget, RelativeBudget, parse_budgets
from gross_ray.space import Configuration
from pipelines.resources import DEVICES, Resources

if TYPE_CHECKING:  # it imports torch, which only the commands that do work need
    from pipelines.driver import DataSource

PRESET_HELP = "Named experiment (see `gross presets`)."
SET_HELP = "Override a field of the experiment, like training.epochs=3; may be repeated."
MODEL_HELP = "Network: four-conv, vgg16, resnet18 (20, 32, 56), or a function of your own, package.module:factory."
DATA_HELP = "Dataset: sample, fashion-mnist, cifar10, folder:PATH, or a function of your own, package.module:function."
WEIGHTS_HELP = "Trained weights of the network: safetensors, or a state dict by torch.save [train them]."
IN_PROCESS_HELP = "Do the units one after another in this process, without Ray."
CALLBACK_HELP = (
    "A ray.tune.Callback, or a function that makes one, to be notified of the trials of validate and sweep-alpha; "
    "may be repeated."
)
WORK_PARAMETERS = (
    *("preset_name", "settings", "data", "model", "weights"),
    *("address", "num_cpus", "device", "gpus_per_unit", "in_process", "data_root", "download"),
)
"""The parameters that `experiment_options` and `work_options` add."""

Command = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a command runs its units, and where it finds the images."""

    resources: Resources
    """The machine or cluster."""
    in_process: bool
    """Run the units in this process, without Ray."""
    data_root: str | None
    """Folder of the dataset's files; None: ~/.cache/gross_ray."""
    download: bool
    """Download the dataset if it is missing."""

    def source(self) -> DataSource:
        """Return the source of the images."""
        from pipelines.driver import DataSource

        return DataSource(root=self.data_root, download=self.download)


def experiment_options(command: Command, *, preset_required: bool = False) -> Command:
    """Add the options that define an experiment; the command gets `preset_name` and the `settings` that change it."""

    @functools.wraps(command)
    def wrapped(
        settings: tuple[str, ...], data: str | None, model: str | None, weights: Path | None, **rest: Any
    ) -> None:
        path = None if weights is None else str(weights.absolute())
        named = {"model": model, "data.name": data, "weights": path}
        own = {field: value for field, value in named.items() if value is not None}
        words = [*(f"--{field.partition('.')[0]} {value}" for field, value in own.items())]
        words += [f"--set {setting}" for setting in settings]
        _refuse_twice([*own, *(setting.partition("=")[0].strip() for setting in settings)], words)
        one = [] if weights is None else ["training.seeds=1"]  # one trained network
        command(settings=(*(f"{field}={json.dumps(value)}" for field, value in own.items()), *one, *settings), **rest)

    for decorate in (
        click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help=SET_HELP),
        click.option("--data", metavar="NAME", help=DATA_HELP),
        click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help=WEIGHTS_HELP),
        click.option("--model", metavar="NAME", help=MODEL_HELP),
        click.option("--preset", "preset_name", required=preset_required, help=PRESET_HELP),
    ):
        wrapped = decorate(wrapped)
    return wrapped


def work_options(command: Command) -> Command:
    """Add the options that say where the work is done; the command gets one `Place`."""

    @functools.wraps(command)
    def wrapped(
        address: str | None,
        num_cpus: int | None,
        device: str,
        gpus_per_unit: float,
        in_process: bool,
        data_root: str | None,
        download: bool,
        **rest: Any,
    ) -> None:
        if in_process:
            refuse_beside("--in-process, which starts nothing else", "address", "gpus_per_unit")
        resources = Resources(
            address=address, num_cpus=num_cpus, device=device, gpus_per_unit=gpus_per_unit, in_process=in_process
        )
        place = Place(resources=resources, in_process=in_process, data_root=data_root, download=download)
        command(place=place, **rest)

    for decorate in (
        click.option("--download", is_flag=True, help="Download the dataset if it is missing."),
        click.option("--data-root", metavar="FOLDER", help="Folder of the dataset's files [~/.cache/gross_ray]."),
        click.option(
            "--gpus-per-unit", type=float, default=0.25, show_default=True, help="GPUs for each unit of work on cuda."
        ),
        click.option(
            "--device",
            type=click.Choice(DEVICES),
            default="auto",
            show_default=True,
            help="auto: cuda if the cluster has a GPU.",
        ),
        click.option("--num-cpus", type=int, help="CPU cores of this machine to use [all]."),
        click.option("--in-process", is_flag=True, help=IN_PROCESS_HELP),
        click.option("--address", help="Join the Ray cluster at this address [RAY_ADDRESS, else start Ray here]."),
    ):
        wrapped = decorate(wrapped)
    return wrapped


def callback_option(command: Command) -> Command:
    """Add --callback; the command gets the callback objects. Put this decorator above `work_options`."""

    @click.option("--callback", "callbacks", metavar="MODULE:NAME", multiple=True, help=CALLBACK_HELP)
    @functools.wraps(command)
    def wrapped(callbacks: tuple[str, ...], in_process: bool, **rest: Any) -> None:
        if in_process:
            refuse_beside("--in-process, which makes no trials of Ray Tune", "callbacks")
        from pipelines.execution.callbacks import load_callbacks

        command(callbacks=load_callbacks(callbacks), in_process=in_process, **rest)

    return wrapped


def refuse_alone(owner: str, owner_is_set: bool, options: Mapping[str, object]) -> None:
    """Raise UsageError if one of `options` is set without `owner`, the option to which they belong."""
    for name, value in options.items():
        if value is not None and not owner_is_set:
            text = "" if value is True else f" {value}"
            raise click.UsageError(f"{name}{text} without {owner}: it has no effect then; add {owner} or leave it out")


def refuse_beside(owner: str, *names: str) -> None:
    """Raise UsageError if the command line has one of the parameters `names` together with `owner`."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            value = context.params[name]
            text = "" if value is True else f" {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
            raise click.UsageError(f"{parameter.opts[0]}{text} with {owner}: leave one of them out")


def _refuse_twice(fields: Sequence[str], words: Sequence[str]) -> None:
    """Raise UsageError if two of the options `words` set the same of `fields`, their fields of the experiment."""
    for place, field in enumerate(fields):
        if field in fields[:place]:
            first = words[fields.index(field)]
            raise click.UsageError(f"{first} and {words[place]} both set the field {field}: leave one of them out")


def budgets_of(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[Budget | RelativeBudget, ...]:
    """Read budgets like macs=2.66M, or several with commas between (a click callback)."""
    return tuple(budget for value in values for budget in parse_budgets(value))


def costs_of(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Read costs like macs,latency_ms (a click callback)."""
    if value is None:
        return None
    costs = list(dict.fromkeys(part.strip() for part in value.split(",")))
    for cost in costs:
        if cost not in COSTS:
            raise click.UsageError(f"--costs {value}: {cost!r} is none of {', '.join(COSTS)}")
    return costs


def configurations_of(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[Configuration, ...]:
    """Read configurations like 8-16-64 (a click callback)."""
    return tuple(Configuration.parse(value) for value in values)


def whole_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Read the value of `option`, a list like 1,4,16; no numbers for None."""
    parts = () if text is None else tuple(part.strip() for part in text.split(","))
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise click.UsageError(f"{option} {text}: must be whole numbers above 0 with commas between, like 1,4,16,32")
    numbers = tuple(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise click.UsageError(f"{option} {text}: must name each number once")
    return numbers
