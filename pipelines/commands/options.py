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

from gross_ray.efforts import EFFORTS
from gross_ray.search.budgets import COSTS, Budget, RelativeBudget, parse_budgets
from gross_ray.search.options import RUNTIMES
from gross_ray.space import Configuration
from pipelines.resources import DEVICES, Resources

if TYPE_CHECKING:  # it imports torch, which only the commands that do work need
    from pipelines.driver import DataSource

OUT_HELP = "Run folder, or a URI like s3://bucket/folder."
PRESET_HELP = "Named experiment (see `gross presets`)."
EXPERIMENT_HELP = "File of an experiment in place of --preset, like the experiment.json of a run folder."
SET_HELP = "Override a field of the experiment, like training.epochs=3; may be repeated."
MODEL_HELP = "Network: four-conv, vgg16, resnet18 (20, 32, 56), or a function of your own, package.module:factory."
DATA_HELP = (
    "Images: folder:PATH (a folder for each class, or those in train, val and test), parquet:PATH, hf:NAME (Hugging "
    "Face), package.module:function (which returns torch datasets), sample, fashion-mnist, cifar10, "
    "cifar100, svhn or stl10."
)
WEIGHTS_HELP = "Trained weights of the network: safetensors, or a file of torch.save [train them]."
WEIGHTS_KEY_HELP = "Which state dict of --weights to take, like model_ema [the usual one, which a note names]."
ADAPT_HELP = "Train the weights on for so many epochs first, on these images."
EFFORT_HELP = "How many epochs and evaluations are spent."
BUDGET_HELP = (
    "COST=LIMIT on macs, parameters or latency_ms, like macs=40% or latency_ms=60% of the full network's, or "
    "macs=2.66M; may be repeated: all limits hold at once."
)
DRY_RUN_HELP = "Print the plan, the layers and how long all of it will take here, tried in small; write nothing."
TO_HELP = "File to write: FILE.onnx, FILE.pt2 (torch.export) or FILE.safetensors (weights) [OUT/best.onnx]."
IN_PROCESS_HELP = "Do the units one after another in this process, without Ray."
CALLBACK_HELP = (
    "A ray.tune.Callback, or a function that makes one, to be notified of the trials of validate and sweep-alpha; "
    "may be repeated."
)
FROM_HELP = "Read the times that --to wrote on another machine, and time nothing."
NETWORKS_HELP = (
    "Whole networks to time [2.5 for each form of each layer; up to three times as many while the median error is "
    "above 1.5 %]."
)
TIMED_DEVICE_HELP = (
    "Device of this machine to time [cuda if there is a GPU and the runtime is torch or compiled, else cpu]."
)
WORK_PARAMETERS = (
    *("preset_name", "experiment_file", "settings", "data", "model", "weights", "weights_key"),
    *("address", "num_cpus", "device", "gpus_per_unit", "in_process", "data_root", "download"),
)
"""The parameters that `experiment_options` and `work_options` add."""

Command = Callable[..., None]
_FILE = click.Path(path_type=Path)


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
        from pipelines.commands.terminal import reading
        from pipelines.driver import DataSource

        return DataSource(root=self.data_root, download=self.download, reading=reading)


def experiment_options(command: Command, *, preset_required: bool = False) -> Command:
    """Add the options that define an experiment; the command gets `preset_name` and the `settings` that change it.

    `preset_name` is the name of a preset, or the path of an experiment's file.
    """

    @functools.wraps(command)
    def wrapped(
        preset_name: str | None,
        experiment_file: Path | None,
        settings: tuple[str, ...],
        data: str | None,
        model: str | None,
        weights: Path | None,
        weights_key: str | None,
        **rest: Any,
    ) -> None:
        if preset_name is not None and experiment_file is not None:
            raise click.UsageError(f"--experiment {experiment_file} with --preset {preset_name}: leave one of them out")
        if preset_required and preset_name is None and experiment_file is None:
            raise click.UsageError("Missing option '--preset' or '--experiment'.")
        path = None if weights is None else str(weights.absolute())
        named = {"model": model, "data.name": data, "weights": path, "weights_key": weights_key}
        own = {field: value for field, value in named.items() if value is not None}
        words = [*(f"--{field.partition('.')[0].replace('_', '-')} {value}" for field, value in own.items())]
        words += [f"--set {setting}" for setting in settings]
        _refuse_twice([*own, *(setting.partition("=")[0].strip() for setting in settings)], words)
        one = [] if weights is None else ["training.seeds=1"]  # one trained network
        changed = (*(f"{field}={json.dumps(value)}" for field, value in own.items()), *one, *settings)
        command(preset_name=experiment_file or preset_name, settings=changed, **rest)

    for decorate in (
        click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help=SET_HELP),
        click.option("--data", metavar="NAME", help=DATA_HELP),
        click.option("--weights-key", metavar="KEY", help=WEIGHTS_KEY_HELP),
        click.option("--weights", type=_FILE, metavar="FILE", help=WEIGHTS_HELP),
        click.option("--model", metavar="NAME", help=MODEL_HELP),
        click.option("--experiment", "experiment_file", type=_FILE, metavar="FILE", help=EXPERIMENT_HELP),
        click.option("--preset", "preset_name", help=PRESET_HELP),
    ):
        wrapped = decorate(wrapped)
    return wrapped


def latency_options(command: Command) -> Command:
    """Add the options of `gross latency` that no other command has."""
    file = click.Path(dir_okay=False, path_type=Path)
    for decorate in (
        click.option("--from", "source", type=file, metavar="FILE", help=FROM_HELP),
        click.option("--to", "target", type=file, metavar="FILE", help="Also write FILE.parquet."),
        click.option("--networks", "num_sampled", type=click.IntRange(min=2), help=NETWORKS_HELP),
        click.option("--repeats", type=click.IntRange(min=2), help="Rounds of timings [5]."),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help=TIMED_DEVICE_HELP),
    ):
        command = decorate(command)
    return command


def runtime_options(command: Command, what: str = "What runs the networks [onnxruntime; on a GPU torch].") -> Command:
    """Add the options of a measurement of latency: `runtime`, `batch_size` and `threads`, None if not given."""
    for decorate in (
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads; more need an idle machine [1]."),
        click.option("--batch", "batch_size", type=click.IntRange(min=1), help="Images in a batch that is timed [1]."),
        click.option("--runtime", type=click.Choice(list(RUNTIMES)), help=what),
    ):
        command = decorate(command)
    return command


def compress_options(command: Command) -> Command:
    """Add the options of `gross compress` that define its experiment, and the file it writes."""
    for decorate in (
        click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help=SET_HELP),
        click.option("--dry-run", is_flag=True, help=DRY_RUN_HELP),
        click.option("--to", "target", type=_FILE, metavar="FILE", help=TO_HELP),
        click.option(
            "--epochs", type=click.IntRange(min=1), help="Epochs of the supernet's fine-tuning [by --effort]."
        ),
        click.option(
            "--effort", type=click.Choice(list(EFFORTS)), default="normal", show_default=True, help=EFFORT_HELP
        ),
        click.option("--adapt", type=click.IntRange(min=1), metavar="EPOCHS", help=ADAPT_HELP),
        click.option("--budget", "budgets", required=True, multiple=True, callback=budgets_of, help=BUDGET_HELP),
        click.option("--data", required=True, metavar="NAME", help=DATA_HELP),
        click.option("--weights-key", metavar="KEY", help=WEIGHTS_KEY_HELP),
        click.option("--weights", type=_FILE, metavar="FILE", help=WEIGHTS_HELP),
        click.option("--model", required=True, metavar="NAME", help=MODEL_HELP),
        click.option("--out", required=True, help=OUT_HELP),
    ):
        command = decorate(command)
    return command


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
