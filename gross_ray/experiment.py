"""An experiment as frozen dataclasses: everything that decides a result, but no workers, devices or folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gross_ray.data.names import WITH_FILES, is_place
from gross_ray.data.options import DataOptions
from gross_ray.errors import InvalidValueError
from gross_ray.fields import build, require, settle
from gross_ray.model_names import check_model_name
from gross_ray.search.options import SearchOptions
from gross_ray.supernet.options import DecompositionOptions
from gross_ray.training.options import (
    CUDNN_BENCHMARK,
    EARLIER_AUGMENT,
    PRODUCTS,
    EngineOptions,
    FinetuningOptions,
    ReconstructionOptions,
    Schedule,  # noqa: F401 (part of this module's interface)
    SupernetOptions,
    SweepOptions,
    TrainingOptions,
    ValidationOptions,
)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment: every number that decides a result."""

    name: str = "custom"
    """Name in reports, usually the preset's."""
    seed: int = 0
    """Seed from which all random numbers of the experiment derive."""
    model: str = "four-conv"
    """Network: four-conv (the paper's), vgg16, resnet18, 20, 32 or 56, or your own function, package.module:factory."""
    weights: str = ""
    """File of its trained weights (safetensors, or a file of torch.save); empty: the network is trained."""
    weights_key: str = ""
    """Which state dict of that file to take, like model_ema; empty: the usual one, which a note names."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    """The base network."""
    decomposition: DecompositionOptions = field(default_factory=DecompositionOptions)
    """Block term decomposition."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """How trainings and evaluations compute."""
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
        settle(self, "")
        require(bool(self.name), "name", self.name, "must not be empty")
        require(self.seed >= 0, "seed", self.seed, "must be 0 or more")
        check_model_name(self.model)
        rule = "chooses weights in a file, and there is none; name the file too (weights, --weights)"
        require(bool(self.weights) or not self.weights_key, "weights_key", self.weights_key, rule)
        one_network = self.trains_base or self.training.seeds == 1
        require(one_network, "training.seeds", self.training.seeds, "must be 1 with weights; set training.seeds=1")
        begins = bool(self.weights) or self.training.start == "new"
        require(begins, "training.start", self.training.start, "needs weights to begin from; set weights")
        rule = "a sweep needs fixed configurations to compare with; set validation.fixed, or sweep.alphas=[]"
        compared = bool(self.validation.fixed or self.search.budgets or not (self.sweep.alphas and self.sweep.scalings))
        require(compared, "sweep.alphas", self.sweep.alphas, rule)

    @property
    def trains_base(self) -> bool:
        """Whether base networks are trained, and not taken as `weights` has them."""
        return not self.weights or self.training.start == "weights"

    def to_dict(self) -> dict[str, Any]:
        """Return the experiment as nested plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        """Return the experiment as JSON text, from which `from_json` makes an equal experiment."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Experiment:
        """Return the experiment that `to_json` wrote; raises InvalidValueError for any other text."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InvalidValueError(f"this is not the JSON of an experiment: {error}") from None
        if not isinstance(values, dict):
            raise InvalidValueError(f"an experiment is a JSON object of fields, not {values!r}")
        return build(cls, values, "")

    def fields(self) -> dict[str, Any]:
        """Return every field's value by its dotted name, as in `--set`: ``training.epochs`` -> 100."""
        return dict(_flatten(self.to_dict(), ""))

    def setting(self, name: str) -> str:
        """Return a field's value as `--set` takes it: text unchanged, other values as JSON."""
        value = self.fields()[name]
        return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))

    def without_effect(self, *, device: str | None = None, num_images: int | None = None) -> list[str]:
        """Return a line for each setting that the other settings cancel.

        With `device` (like cuda:0) or `num_images`, return instead a line for each setting that has no effect on this
        device, or with this number of training images.
        """
        fields = self.fields()
        if device is None and num_images is None:
            return _without_effect(fields, Experiment().fields())
        found = []
        if device is not None and fields["engine.capture"] and not device.startswith("cuda"):
            found.append(f"engine.capture = True: trainings run on {device}, and only a GPU has CUDA graphs")
        if device is not None and CUDNN_BENCHMARK in fields["engine.kernels"] and not device.startswith("cuda"):
            found.append(f"engine.kernels = {CUDNN_BENCHMARK}: trainings run on {device}, which has no cuDNN")
        stacks = fields["engine.parallel_seeds"] > 1 or fields["engine.compile"] or not fields["engine.capture"]
        if device is not None and PRODUCTS in fields["engine.kernels"] and not stacks and not device.startswith("cuda"):
            found.append(f"engine.kernels = {PRODUCTS}: engine.capture stacks supernets on a GPU only, not on {device}")
        if num_images is not None:
            found += [
                f"{name} = {value}: the training split has only {num_images} images, so an epoch takes all of them"
                for name, value in fields.items()
                if name.endswith(".images") and value > num_images
            ]
        return found

    def fingerprint(self, *, weights: str = "", data: str = "") -> str:
        """Return 16 hexadecimal digits that are equal for equal experiments.

        Paths and `weights_key` do not count. Instead `weights` and `data` are the hashes of the content at the paths in
        `weights` and in `data.name`; each counts only if the experiment has such a path.
        """
        values = self.to_dict()
        del values["weights_key"]  # the hash of what it chooses counts
        if self.weights:
            values["weights"] = f"file:{weights}"
        if is_place(self.data.name):
            values["data"]["name"] = f"folder:{data}"  # of any place: the same images have the same fingerprint
        defaults = Experiment().to_dict()
        for group, name in _LATER_FIELDS:
            if values[group][name] == BEFORE.get((group, name), defaults[group][name]):
                del values[group][name]
        own = (values["validation"][name] for name in ("reconstruction", "finetuning"))
        for schedule in (values["training"], values["reconstruction"], values["finetuning"], *own):
            schedule["augment"] = _AUGMENT_IN_FINGERPRINTS.get(schedule["augment"], schedule["augment"])
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def override(self, settings: list[str]) -> Experiment:
        """Return a copy with settings like ``training.epochs=3`` applied.

        Values are JSON (``[16, 4]``, ``0.1``, ``true``), or plain text for text fields. Raises InvalidValueError for
        an unknown field (the error lists the known ones), a wrong type or a value out of range.
        """
        nested = self.to_dict()
        known = self.fields()
        for setting in settings:
            name, separator, text = setting.partition("=")
            name = name.strip()
            if not separator:
                raise InvalidValueError(f"setting {setting!r}: write FIELD=VALUE, like training.epochs=3")
            if name not in known:
                raise InvalidValueError(f"unknown field {name!r}; known fields: {', '.join(known)}")
            *path, last = name.split(".")
            group = nested
            for part in path:
                group = group[part]
            group[last] = _parse(text.strip(), is_text=isinstance(known[name], str))
        return build(type(self), nested, "")

    def differences(self, other: Experiment, *, paths: typing.Collection[str] = ()) -> list[str]:
        """Return the names of the fields that differ from `other`.

        Two different paths in `weights` or `data.name`, or two values of `weights_key`, count as a difference only if
        `paths` names the field: their content is compared by its hash (`gross_ray.run.pins`).
        """
        mine, theirs = self.fields(), other.fields()
        differing = [name for name, value in mine.items() if value != theirs.get(name)]
        return [name for name in differing if name in paths or not _both_paths(name, mine[name], theirs.get(name))]

    def first_difference(self, other: Experiment, *, paths: typing.Collection[str] = ()) -> str | None:
        """Return the first of the `differences` from `other`, like ``"training.epochs (5, not 3)"``, or None."""
        differing = self.differences(other, paths=paths)
        if not differing:
            return None
        name = differing[0]
        return f"{name} ({self.fields()[name]!r}, not {other.fields().get(name)!r})"


_LATER_FIELDS = (
    ("decomposition", "keep_dense"),
    ("training", "start"),
    ("data", "validation_from"),
    ("data", "channels"),
    ("data", "skip_damaged"),
    ("data", "image_column"),
    ("data", "label_column"),
    ("data", "image_size"),
    ("data", "resize"),
    ("data", "memory"),
    ("validation", "trainable"),
    ("validation", "drawn"),
    ("validation", "drawn_seeds"),
    ("search", "score"),
    ("engine", "kernels"),
)
"""Fields that earlier versions did not have: at their defaults, or at BEFORE, they change no fingerprint."""
BEFORE = {("search", "score"): "median"}
"""What earlier versions did, by group and name, for those later fields whose default is something else."""
_AUGMENT_IN_FINGERPRINTS = {now: json.loads(earlier) for earlier, now in EARLIER_AUGMENT.items()}
"""Values of `augment` that earlier versions wrote as true and false, and that stay so in fingerprints."""
PATH_FIELDS = {"data.name": "data", "weights": "weights", "weights_key": "weights"}
"""The fields that say where content is, each with the name under which a run folder stores its content's hash."""


def _both_paths(name: str, one: object, other: object) -> bool:
    """Return whether the values `one` and `other` of a field both say where content is."""
    if name == "weights":
        return bool(one and other)
    if name == "weights_key":  # without weights there is none
        return True
    return name == "data.name" and is_place(str(one)) and is_place(str(other))


def _parse(text: str, *, is_text: bool) -> Any:
    try:
        value = json.loads(text)
    except ValueError:  # not JSON, or a whole number of thousands of digits
        return text
    return text if is_text and not isinstance(value, str) else value


def _flatten(value: dict[str, Any], prefix: str) -> typing.Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


_Fields = Mapping[str, Any]
"""Every field of an experiment by its dotted name."""


def _without_effect(fields: _Fields, defaults: _Fields) -> list[str]:
    """Return a line for each setting that the other settings cancel, whatever the images and the device.

    A field with its default value counts as not set, except for milestones.
    """
    changed = {name: value for name, value in fields.items() if value != defaults[name]}
    found = _of_data(fields, changed) + _of_schedules(fields, changed)
    of_training = [name for name in changed if name.startswith("training.") and name != "training.seeds"]
    if fields["weights"] and fields["training.start"] != "weights" and of_training:
        weights = fields["weights"]
        found.append(f"{', '.join(of_training)}: the base network has the weights {weights} and is not trained")
    found += _of_supernets(fields, changed)
    if "validation.drawn_seeds" in changed and not fields["validation.drawn"]:
        found.append(
            f"validation.drawn_seeds = {fields['validation.drawn_seeds']}: with validation.drawn = 0 none is drawn"
        )
    sizes, by_layer = fields["decomposition.group_sizes"], fields["decomposition.layer_group_sizes"]
    if "decomposition.nested" in changed and len(sizes) == 1 and all("," not in text for text in by_layer):
        found.append(
            f"decomposition.nested = True: decomposition.group_sizes = {sizes} has no smaller size to start from"
        )
    return found


def _of_data(fields: _Fields, changed: _Fields) -> list[str]:
    kind = fields["data.name"].partition(":")[0]
    rules = {
        "data.skip_damaged": (
            ("folder", "parquet", "hf"),
            "of folder:, parquet: and hf: only are damaged images skipped",
        ),
        "data.image_column": (("parquet", "hf"), "only parquet: and hf: have columns"),
        "data.label_column": (("parquet", "hf"), "only parquet: and hf: have columns"),
    }
    found = [
        f"{name} = {changed[name]!r}: the images are {fields['data.name']}, and {rule}"
        for name, (kinds, rule) in rules.items()
        if name in changed and kind not in kinds
    ]
    if "data.resize" in changed and not fields["data.image_size"]:
        found.append(f"data.resize = {fields['data.resize']}: without data.image_size, images are not resized")
    if "data.memory" in changed and fields["data.name"] in ("sample", *WITH_FILES):
        found.append(f"data.memory = {fields['data.memory']}: {fields['data.name']} is always kept in memory")
    return found


def _of_schedules(fields: _Fields, changed: _Fields) -> list[str]:
    found = []
    for name in (name for name in fields if name.endswith(".milestones")):
        schedule = name.removesuffix(".milestones")
        if schedule == "training" and fields["weights"]:
            continue  # no training setting has an effect
        milestones, epochs, gamma = fields[name], fields[f"{schedule}.epochs"], f"{schedule}.gamma"
        if late := [milestone for milestone in milestones if milestone >= epochs]:
            found.append(f"{name} = {milestones}: {epochs} epochs do not reach {', '.join(map(str, late))}")
        if fields[gamma] == 1 and len(late) < len(milestones):
            found.append(f"{name} = {milestones}: {gamma} = 1 leaves the learning rate unchanged")
        if gamma in changed and len(late) == len(milestones):
            found.append(f"{gamma} = {fields[gamma]}: training reaches no milestone ({name})")
    return found


def _of_supernets(fields: _Fields, changed: _Fields) -> list[str]:
    found = []
    alphas, scalings = fields["sweep.alphas"], fields["sweep.scalings"]
    uniform = "with alpha = 0 both scalings draw group-sizes uniformly"
    if "supernet.scaling" in changed and fields["supernet.alpha"] == 0:
        found.append(f"supernet.scaling = {fields['supernet.scaling']!r}: {uniform}")
    if not alphas or not scalings:
        empty = "sweep.scalings" if alphas else "sweep.alphas"
        found += [
            f"{name} = {value}: with {empty} = [] there is no sweep"
            for name, value in changed.items()
            if name.startswith("sweep.") and value
        ]
    elif "sweep.scalings" in changed and set(alphas) == {0}:
        found.append(f"sweep.scalings = {scalings}: {uniform} (sweep.alphas = {alphas})")
    kinds_in_sweep = {(alpha, scaling if alpha else "") for alpha in alphas for scaling in scalings}
    num_supernets = max(fields["supernet.seeds"], len(kinds_in_sweep) * fields["sweep.seeds"])
    if (together := fields["engine.parallel_seeds"]) > num_supernets:
        found.append(f"engine.parallel_seeds = {together}: no stage trains more than {num_supernets} supernets")
    stacks = any(name in changed for name in ("engine.parallel_seeds", "engine.compile", "engine.capture"))
    if PRODUCTS in fields["engine.kernels"] and not stacks:
        found.append(
            f"engine.kernels = {PRODUCTS}: no supernets are stacked (engine.parallel_seeds = 1, without engine.compile "
            "and engine.capture)"
        )
    return found
