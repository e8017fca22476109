"""A whole experiment as frozen dataclasses: what is done, never where (workers, devices and folders are not in it)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gross_ray.data.options import DataOptions
from gross_ray.errors import InvalidValueError
from gross_ray.fields import build, require, settle
from gross_ray.model_names import check_model_name
from gross_ray.search.options import SearchOptions
from gross_ray.supernet.options import DecompositionOptions
from gross_ray.training.options import (
    EngineOptions,
    FinetuningOptions,
    ReconstructionOptions,
    Schedule,
    SupernetOptions,
    SweepOptions,
    TrainingOptions,
    ValidationOptions,
)

__all__ = [
    "DataOptions",
    "DecompositionOptions",
    "EngineOptions",
    "Experiment",
    "FinetuningOptions",
    "ReconstructionOptions",
    "Schedule",
    "SearchOptions",
    "SupernetOptions",
    "SweepOptions",
    "TrainingOptions",
    "ValidationOptions",
]


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
        settle(self, "")
        require(bool(self.name), "name", self.name, "must not be empty")
        require(self.seed >= 0, "seed", self.seed, "must be 0 or more")
        check_model_name(self.model)
        alone = not self.weights or self.training.seeds == 1
        require(alone, "training.seeds", self.training.seeds, "must be 1 where weights are given")
        rule = "a sweep is compared with fixed configurations; name some in validation.fixed, or sweep.alphas=[]"
        compared = bool(self.validation.fixed or self.search.budgets or not (self.sweep.alphas and self.sweep.scalings))
        require(compared, "sweep.alphas", self.sweep.alphas, rule)

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
        return build(cls, values, "")

    def fields(self) -> dict[str, Any]:
        """Return every field by its dotted name, as `--set` writes it: ``training.epochs`` -> 100."""
        return dict(_flatten(self.to_dict(), ""))

    def without_effect(self, *, device: str | None = None, num_images: int | None = None) -> list[str]:
        """Return a line for each setting that changes nothing beside the other settings.

        With `device` or `num_images`, instead for each that changes nothing on this device, or with so many training
        images.
        """
        fields = self.fields()
        if device is None and num_images is None:
            return _without_effect(fields, Experiment().fields())
        on_device = [] if device is None else _without_effect_on_device(fields, device)
        on_images = [] if num_images is None else _without_effect_on_images(fields, num_images)
        return on_device + on_images

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
        return build(type(self), nested, "")

    def differences(self, other: Experiment, *, paths: typing.Collection[str] = ()) -> list[str]:
        """Return the names of the fields that differ from `other`.

        Two paths in `weights`, or of folders in `data.name`, differ only where `paths` has the field's name: what
        they lead to is compared by its hash (`gross_ray.run.pins`).
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


_Fields = Mapping[str, Any]
"""Every field of an experiment by its dotted name."""


def _without_effect(fields: _Fields, defaults: _Fields) -> list[str]:
    """Return a line for each setting that has no effect beside the others, whatever the images and the device.

    A value that is the default of its field counts as not set, but for milestones.
    """
    changed = {name: value for name, value in fields.items() if value != defaults[name]}
    return [
        *_of_schedules(fields, changed),
        *_of_base_network(fields, changed),
        *_of_supernets(fields, changed),
        *_of_decompositions(fields, changed),
    ]


def _without_effect_on_images(fields: _Fields, num_images: int) -> list[str]:
    """Return a line for each setting that has no effect with so many training images."""
    return [
        f"{name} = {value}: the training split has {num_images} images, an epoch takes them all"
        for name, value in fields.items()
        if name.endswith(".images") and value > num_images
    ]


def _without_effect_on_device(fields: _Fields, device: str) -> list[str]:
    """Return a line for each setting that has no effect on `device`, like cpu or cuda:0."""
    if fields["engine.capture"] and not device.startswith("cuda"):
        return [f"engine.capture = True: trainings are on {device}, and only a GPU has CUDA graphs"]
    return []


def _of_schedules(fields: _Fields, changed: _Fields) -> list[str]:
    found = []
    for place in (name.removesuffix(".milestones") for name in fields if name.endswith(".milestones")):
        if place == "training" and fields["weights"]:
            continue  # nothing of it has an effect
        name, milestones, epochs = f"{place}.milestones", fields[f"{place}.milestones"], fields[f"{place}.epochs"]
        gamma = f"{place}.gamma"
        if late := [milestone for milestone in milestones if milestone >= epochs]:
            found.append(f"{name} = {milestones}: {epochs} epochs do not reach {', '.join(map(str, late))}")
        if fields[gamma] == 1 and len(late) < len(milestones):
            found.append(f"{name} = {milestones}: {gamma} = 1 leaves the learning rate as it is")
        if gamma in changed and len(late) == len(milestones):
            found.append(f"{gamma} = {fields[gamma]}: no milestone is reached ({name})")
    return found


def _of_base_network(fields: _Fields, changed: _Fields) -> list[str]:
    names = [name for name in changed if name.startswith("training.") and name != "training.seeds"]
    if not fields["weights"] or not names:
        return []
    return [f"{', '.join(names)}: the base network has the weights {fields['weights']} and is not trained"]


def _of_supernets(fields: _Fields, changed: _Fields) -> list[str]:
    found = []
    alphas, scalings = fields["sweep.alphas"], fields["sweep.scalings"]
    one = "with alpha = 0 group-sizes are drawn uniformly in either scaling"
    if "supernet.scaling" in changed and fields["supernet.alpha"] == 0:
        found.append(f"supernet.scaling = {fields['supernet.scaling']!r}: {one}")
    if not alphas or not scalings:
        empty = "sweep.scalings" if alphas else "sweep.alphas"
        ours = [name for name in changed if name.startswith("sweep.") and changed[name]]
        found += [f"{name} = {changed[name]}: {empty} = [] means that there is no sweep" for name in ours]
    elif "sweep.scalings" in changed and set(alphas) == {0}:
        found.append(f"sweep.scalings = {scalings}: {one} (sweep.alphas = {alphas})")
    together = fields["engine.parallel_seeds"]
    if together > (most := _num_supernets(fields)):
        found.append(f"engine.parallel_seeds = {together}: no stage trains more than {most} supernets")
    return found


def _num_supernets(fields: _Fields) -> int:
    """Return how many supernets the stage that trains the most of them trains."""
    kinds = {
        (alpha, scaling if alpha else "") for alpha in fields["sweep.alphas"] for scaling in fields["sweep.scalings"]
    }
    return max(fields["supernet.seeds"], len(kinds) * fields["sweep.seeds"])


def _of_decompositions(fields: _Fields, changed: _Fields) -> list[str]:
    sizes, by_layer = fields["decomposition.group_sizes"], fields["decomposition.layer_group_sizes"]
    single = len(sizes) == 1 and all("," not in text for text in by_layer)
    if "decomposition.nested" in changed and single:
        return [f"decomposition.nested = True: decomposition.group_sizes = {sizes} has no smaller size to start from"]
    return []
