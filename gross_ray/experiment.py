"""A whole experiment as frozen dataclasses: what is done, never where (workers, devices and folders are not in it)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import typing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from gross_ray.data.augment import DEVIATION, MEAN, Normalisation
from gross_ray.data.names import check_dataset_name
from gross_ray.decomposition.btd import BTDOptions
from gross_ray.decomposition.layers import parse_layer_group_sizes
from gross_ray.errors import InvalidValueError
from gross_ray.models import check_model_name
from gross_ray.precision import PRECISIONS
from gross_ray.search.evaluation_options import FORM_CHOICES, STRATEGY_NAMES
from gross_ray.search.selection import Budget


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise InvalidValueError(f"{name} = {value!r}: {rule}")


def _require_group_sizes(name: str, sizes: tuple[int, ...]) -> None:
    lawful = all(size >= 1 for size in sizes) and len(set(sizes)) == len(sizes)
    _require(lawful, name, sizes, "must be group-sizes of 1 or more, each named once")


def _settle(options: Any, prefix: str) -> None:
    """Bring every field to its type (1 to 1.0, a list to a tuple), so that what is equal has one fingerprint."""
    for name, hint in typing.get_type_hints(type(options)).items():
        object.__setattr__(options, name, _convert(hint, getattr(options, name), prefix + name))


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which images, and how many of them."""

    name: str = "sample"
    """Dataset: sample, fashion-mnist, cifar10, folder:PATH, or package.module:function, which returns datasets."""
    mean: tuple[float, ...] = (MEAN,)
    """Mean that pixels, from 0 to 1, are normalised by: one for all channels, or one for each of three."""
    std: tuple[float, ...] = (DEVIATION,)
    """Standard deviation that they are normalised by, likewise."""
    limit_train: int = 0
    """Use only the first so many training images (0: all)."""
    limit_validation: int = 0
    """Use only the first so many validation images (0: all)."""
    limit_test: int = 0
    """Use only the first so many test images (0: all)."""

    def __post_init__(self) -> None:
        _settle(self, "data.")
        check_dataset_name(self.name)
        Normalisation(self.mean, self.std)
        for name in ("limit_train", "limit_validation", "limit_test"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "must be 0 (all images) or more")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One run of stochastic gradient descent with step decay."""

    epochs: int
    """Passes over the training split."""
    lr: float
    """Learning rate of the first epoch."""
    milestones: tuple[int, ...] = ()
    """Epochs after which the learning rate is multiplied by `gamma`."""
    gamma: float = 0.1
    """Factor of the learning rate at a milestone."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-3
    """Weight decay (L2) of SGD."""
    batch_size: int = 256
    """Images a step."""
    images: int = 0
    """Images an epoch, drawn anew for each; 0, or more than there are: every image of the training split once."""
    augment: bool = True
    """Random crop from a 2-pixel padding and horizontal flip."""

    def __post_init__(self) -> None:
        _settle(self, "")
        _require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        _require(self.lr > 0, "lr", self.lr, "must be above 0")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "must be 1 or more")
        _require(self.images >= 0, "images", self.images, "must be 0 (all images) or more")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "must be in [0, 1)")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")
        _require(0 < self.gamma <= 1, "gamma", self.gamma, "must be in (0, 1]")
        ordered = all(earlier < later for earlier, later in pairwise((0, *self.milestones)))
        _require(ordered, "milestones", self.milestones, "must be positive and ascending")

    def images_of(self, num_images: int) -> int:
        """Return how many of a training split's `num_images` an epoch takes."""
        return min(self.images or num_images, num_images)

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of `epoch` (0 is the first)."""
        return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Schedule):
    """The base network (section 4.2 of the paper)."""

    epochs: int = 100
    lr: float = 0.1
    milestones: tuple[int, ...] = (50, 75)
    seeds: int = 5
    """How many networks are trained; the one of median validation accuracy is decomposed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.seeds >= 1, "training.seeds", self.seeds, "must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class DecompositionOptions(BTDOptions):
    """The block term decomposition of each layer at each group-size (section 3)."""

    layers: tuple[str, ...] = ()
    """Names or globs of layers to decompose; empty: every dense convolution with a kernel above 1x1 but the first."""
    group_sizes: tuple[int, ...] = ()
    """Group-sizes to try where they divide a layer's input channels; empty: the powers of two up to them."""
    layer_group_sizes: tuple[str, ...] = ()
    """Other ones for single layers, like "layer4.*=16,32": a name, or a glob; the first that fits a layer counts."""
    nested: bool = False
    """Start each group-size from the expansion of the next smaller one (a chain), not by itself (parallel)."""

    def __post_init__(self) -> None:
        _settle(self, "decomposition.")
        super().__post_init__()
        named = all(self.layers) and len(set(self.layers)) == len(self.layers)
        _require(named, "decomposition.layers", self.layers, "must be names of layers, each named once")
        _require_group_sizes("decomposition.group_sizes", self.group_sizes)
        try:
            parse_layer_group_sizes(self.layer_group_sizes)
        except InvalidValueError as error:
            raise InvalidValueError(f"decomposition.layer_group_sizes: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions(Schedule):
    """Response reconstruction of the supernet (section 4.3)."""

    epochs: int = 30
    lr: float = 1e-4
    milestones: tuple[int, ...] = (20,)


@dataclass(frozen=True, kw_only=True)
class FinetuningOptions(Schedule):
    """Fine-tuning of the supernet (section 4.4)."""

    epochs: int = 150
    lr: float = 1e-4
    milestones: tuple[int, ...] = (80, 120)


@dataclass(frozen=True, kw_only=True)
class SupernetOptions:
    """The supernet whose configurations are searched."""

    seeds: int = 5
    """How many supernets are trained; a configuration's accuracy is their median."""
    alpha: float = 0.0
    """Temperature of the sampling of group-sizes (Eq. 8); 0 is uniform, the paper's is 4 (docs/method.md)."""
    scaling: str = "normalised"
    """"index" samples with exp(-alpha i), Eq. 8 as printed; "normalised" with exp(-alpha i / N)."""

    def __post_init__(self) -> None:
        _settle(self, "supernet.")
        _require(self.seeds >= 1, "supernet.seeds", self.seeds, "must be 1 or more")
        _require(self.alpha >= 0, "supernet.alpha", self.alpha, "must be 0 or more")
        _require(self.scaling in SCALINGS, "supernet.scaling", self.scaling, f"must be one of {', '.join(SCALINGS)}")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The search, exhaustive (section 5.1) or by a strategy, and the selection."""

    budgets: tuple[int, ...] = (16, 4)
    """Each names a fixed configuration (this group-size in every layer) whose MACs are a budget; may be empty where
    there are limits."""
    limits: tuple[str, ...] = ()
    """Budgets besides, like "latency_ms=1.5" or "macs=2.66M,parameters=60k" (all of them hold): the best within each
    are retrained too, and a strategy searches within each."""
    top: int = 2
    """How many configurations are selected under each budget."""
    strategy: str = "exhaustive"
    """What is evaluated: the whole space, or what surrogate, breadth-first, evolution or random propose."""
    evaluations: int = 0
    """Configurations that a strategy may evaluate, the fixed ones besides; 0 with the whole space."""
    form: str = "auto"
    """How decomposed layers run: dense, bottleneck, or auto (timed once, at the start; equal up to float rounding)."""
    precision: str = "float32"
    """float32, tf32 (CUDA only) or bfloat16: the latter two are faster where the device has them, and change counts."""
    memory_budget: int = 0
    """Bytes of live tensors on each worker; 0: its share of the CPU's largest cache, or of half of a GPU's memory."""

    def __post_init__(self) -> None:
        _settle(self, "search.")
        _require(self.top >= 1, "search.top", self.top, "must be 1 or more")
        for name, choices in (("form", FORM_CHOICES), ("precision", PRECISIONS), ("strategy", STRATEGY_NAMES)):
            value = getattr(self, name)
            _require(value in choices, f"search.{name}", value, f"must be one of {', '.join(choices)}")
        _require(self.evaluations >= 0, "search.evaluations", self.evaluations, "must be 0 or more")
        whole = self.strategy == "exhaustive"
        rule = "must be 0 with search.strategy=exhaustive" if whole else f"must be 1 or more with {self.strategy}"
        _require(whole == (self.evaluations == 0), "search.evaluations", self.evaluations, rule)
        _require(self.memory_budget >= 0, "search.memory_budget", self.memory_budget, "must be 0 (automatic) or more")
        rule = "must name a group-size or more, like [16, 4], where search.limits is empty"
        _require(bool(self.budgets or self.limits), "search.budgets", self.budgets, rule)
        _require_group_sizes("search.budgets", self.budgets)
        for text in self.limits:
            try:
                Budget.parse_all(text)
            except InvalidValueError as error:
                raise InvalidValueError(f"search.limits: {error}") from None
        _require(len(set(self.limits)) == len(self.limits), "search.limits", self.limits, "must name each once")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The sweep over sampling temperatures (section 5.2, Figure 1)."""

    alphas: tuple[float, ...] = (0.0, 2.0, 4.0, 8.0)
    """Temperatures to train a supernet with."""
    scalings: tuple[str, ...] = ("index", "normalised")
    """Ways to read Eq. 8 (see `supernet.scaling`)."""
    seeds: int = 5
    """Supernets for each temperature and scaling."""

    def __post_init__(self) -> None:
        _settle(self, "sweep.")
        _require(self.seeds >= 1, "sweep.seeds", self.seeds, "must be 1 or more")
        lawful = all(alpha >= 0 for alpha in self.alphas) and len(set(self.alphas)) == len(self.alphas)
        _require(lawful, "sweep.alphas", self.alphas, "must be 0 or more, each named once")
        known = set(self.scalings) <= set(SCALINGS) and len(set(self.scalings)) == len(self.scalings)
        _require(known, "sweep.scalings", self.scalings, f"must be among {', '.join(SCALINGS)}, each named once")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Fixed and selected configurations, decomposed and trained on their own (sections 4.5 and 5.1)."""

    fixed: tuple[int, ...] = (32, 16, 4, 1)
    """Group-sizes of the fixed configurations, if any; those of the budgets are always added."""
    seeds: int = 5
    """Repeats of each configuration."""
    reconstruction: Schedule = field(default_factory=lambda: Schedule(epochs=30, lr=0.01, milestones=(20,)))
    """Response reconstruction of one configuration."""
    finetuning: Schedule = field(default_factory=lambda: Schedule(epochs=100, lr=0.001, milestones=(80,)))
    """Fine-tuning of one configuration."""

    def __post_init__(self) -> None:
        _settle(self, "validation.")
        _require(self.seeds >= 1, "validation.seeds", self.seeds, "must be 1 or more")
        _require_group_sizes("validation.fixed", self.fixed)


SCALINGS = ("index", "normalised")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How trainings compute, and what evaluations are given."""

    precision: str = "float32"
    """Of trainings: float32, tf32 (CUDA only) or bfloat16 (autocast). `search.precision` is that of the search."""
    compile: bool = False
    """Compile losses with torch.compile, which needs a C++ compiler; a supernet becomes one graph."""
    capture: bool = False
    """On a GPU, replay each step as one CUDA graph; not for a network whose path depends on numbers or on chance."""
    parallel_seeds: int = 1
    """Supernets trained in one batched pass, where a GPU is not filled by one; equal to one by one but for rounding."""
    recalibrate: bool = True
    """Give each configuration batch-norm statistics of its own, from training images, in a network that has them."""

    def __post_init__(self) -> None:
        _settle(self, "engine.")
        known = self.precision in PRECISIONS
        _require(known, "engine.precision", self.precision, f"must be one of {', '.join(PRECISIONS)}")
        _require(self.parallel_seeds >= 1, "engine.parallel_seeds", self.parallel_seeds, "must be 1 or more")
        for name, stacks in (("parallel_seeds", self.parallel_seeds > 1), ("compile", self.compile)):
            _require(
                not stacks or self.precision != "bfloat16",
                "engine.precision",
                self.precision,
                f"must be float32 or tf32 with engine.{name} = {getattr(self, name)}: supernets are then stacked by "
                "torch.func.vmap, which knows no autocast",
            )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A whole experiment: every number that decides a result is in here."""

    name: str = "custom"
    """Name shown in reports, usually the preset's."""
    seed: int = 0
    """Root of every random number of the experiment."""
    model: str = "four-conv"
    """Network: four-conv (the paper's), vgg16, resnet18, or a function of one's own, package.module:factory."""
    weights: str = ""
    """File of its trained weights (safetensors, or a state dict by torch.save); empty: networks are trained."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    """The base network."""
    decomposition: DecompositionOptions = field(default_factory=DecompositionOptions)
    """Block term decomposition."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """How trainings compute, and what evaluations are given."""
    supernet: SupernetOptions = field(default_factory=SupernetOptions)
    """The supernet."""
    reconstruction: ReconstructionOptions = field(default_factory=ReconstructionOptions)
    """Response reconstruction of the supernet."""
    finetuning: FinetuningOptions = field(default_factory=FinetuningOptions)
    """Fine-tuning of the supernet."""
    search: SearchOptions = field(default_factory=SearchOptions)
    """Evaluation and selection of configurations."""
    sweep: SweepOptions = field(default_factory=SweepOptions)
    """The sweep over alpha."""
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    """Fixed and selected configurations on their own."""

    def __post_init__(self) -> None:
        _settle(self, "")
        _require(bool(self.name), "name", self.name, "must not be empty")
        _require(self.seed >= 0, "seed", self.seed, "must be 0 or more")
        check_model_name(self.model)
        alone = not self.weights or self.training.seeds == 1
        _require(alone, "training.seeds", self.training.seeds, "must be 1 where weights are given")
        rule = "a sweep is compared with fixed configurations; name some in validation.fixed, or sweep.alphas=[]"
        compared = bool(self.validation.fixed or self.search.budgets or not (self.sweep.alphas and self.sweep.scalings))
        _require(compared, "sweep.alphas", self.sweep.alphas, rule)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        """Return the experiment as JSON text; `from_json` reads it back to an equal experiment."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Experiment:
        """Read what `to_json` wrote; raises InvalidValueError for anything else."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InvalidValueError(f"this is not the JSON of an experiment: {error}") from None
        if not isinstance(values, dict):
            raise InvalidValueError(f"an experiment is a JSON object of fields, not {values!r}")
        return _build(cls, values, "")

    def fields(self) -> dict[str, Any]:
        """Return every field by its dotted name, as `--set` writes it: ``training.epochs`` -> 100."""
        return dict(_flatten(self.to_dict(), ""))

    def without_effect(self) -> list[str]:
        """Return a line for each setting that changes nothing: milestones at which a training has ended."""
        fields, lines = self.fields(), []
        for name, milestones in fields.items():
            place, _, last = name.rpartition(".")
            if last != "milestones":
                continue
            epochs = fields[f"{place}.epochs"]
            if late := [milestone for milestone in milestones if milestone >= epochs]:
                lines.append(f"{name} = {milestones}: {epochs} epochs do not reach {', '.join(map(str, late))}")
        return lines

    def fingerprint(self, *, weights: str = "", data: str = "") -> str:
        """Return 16 hexadecimal digits that are equal for equal experiments.

        A path is no part of an experiment. `weights` and `data` are the hashes of what the paths in `weights` and in
        `data.name` lead to; each counts only where the experiment has such a path.
        """
        values = self.to_dict()
        if self.weights:
            values["weights"] = f"file:{weights}"
        if self.data.name.startswith(_FOLDER):
            values["data"]["name"] = _FOLDER + data
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def override(self, settings: list[str]) -> Experiment:
        """Return a copy with settings like ``training.epochs=3`` applied.

        Values are JSON (``[16, 4]``, ``0.1``, ``true``), or plain text for text fields. Raises InvalidValueError for
        an unknown field (the error lists what there is), a wrong type or a value out of range.
        """
        nested = self.to_dict()
        known = self.fields()
        for setting in settings:
            name, separator, text = setting.partition("=")
            name = name.strip()
            if not separator:
                raise InvalidValueError(f"setting {setting!r}: write FIELD=VALUE, like training.epochs=3")
            if name not in known:
                raise InvalidValueError(f"unknown field {name!r}; there are: {', '.join(known)}")
            *path, last = name.split(".")
            place = nested
            for part in path:
                place = place[part]
            place[last] = _parse(text.strip(), is_text=isinstance(known[name], str))
        return _build(type(self), nested, "")

    def differences(self, other: Experiment, *, paths: typing.Collection[str] = ()) -> list[str]:
        """Return the names of the fields that differ from `other`.

        Two paths in `weights`, or of folders in `data.name`, differ only where `paths` has the field's name: what
        they lead to is compared by its hash (`gross_ray.results.pins`).
        """
        mine, theirs = self.fields(), other.fields()
        differing = [name for name, value in mine.items() if value != theirs.get(name)]
        return [name for name in differing if name in paths or not _both_paths(name, mine[name], theirs.get(name))]

    def first_difference(self, other: Experiment, *, paths: typing.Collection[str] = ()) -> str | None:
        """Return ``"training.epochs (5, not 3)"`` for the first of the `differences` from `other`, or None."""
        differing = self.differences(other, paths=paths)
        if not differing:
            return None
        name = differing[0]
        return f"{name} ({self.fields()[name]!r}, not {other.fields().get(name)!r})"


_FOLDER = "folder:"
PATH_FIELDS = {"data.name": "data", "weights": "weights"}
"""The fields that may hold a path, each with the name under which a run folder stores the hash of its content."""


def _both_paths(name: str, one: object, other: object) -> bool:
    """Return whether a field has a path in both of two experiments."""
    if name == "weights":
        return bool(one and other)
    return name == "data.name" and str(one).startswith(_FOLDER) and str(other).startswith(_FOLDER)


def _parse(text: str, *, is_text: bool) -> Any:
    try:
        value = json.loads(text)
    except ValueError:  # no JSON, or a whole number of thousands of digits
        return text
    return text if is_text and not isinstance(value, str) else value


def _flatten(value: dict[str, Any], prefix: str) -> typing.Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        known = ", ".join(prefix + name for name in hints)
        raise InvalidValueError(f"unknown field {prefix + unknown[0]!r}; there are: {known}")
    required = [one.name for one in dataclasses.fields(cls) if _has_no_default(one)]
    missing = [name for name in required if name not in values]
    if missing:
        raise InvalidValueError(f"{prefix}{missing[0]} is missing and has no default: give it a value")
    converted = {name: _convert(hints[name], value, prefix + name) for name, value in values.items()}
    try:
        return cls(**converted)
    except InvalidValueError as error:
        message = str(error)
        owned = message.startswith(prefix) or "." in message.split(" = ")[0]
        raise InvalidValueError(message if owned else prefix + message) from None


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if type(value) is hint:
            return value
        if not isinstance(value, dict):
            raise InvalidValueError(
                f"{name} = {value!r}: is a group of fields; set one of them, like {name}.{_first(hint)}"
            )
        return _build(typing.cast(type, hint), value, f"{name}.")
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(typing.get_args(hint)[0], item, name) for item in items)
    accepted = int | float if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise InvalidValueError(f"{name} = {value!r}: must be of type {hint.__name__}")
    if hint is not float:
        return value
    _require(abs(value) <= sys.float_info.max, name, value, "must be a finite number")
    return float(value) + 0.0  # -0.0 becomes 0.0, to which it is equal


def _has_no_default(one: dataclasses.Field[Any]) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def _first(hint: Any) -> str:
    return dataclasses.fields(hint)[0].name
