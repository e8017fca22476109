"""A unit of work, the context in which a worker does it, and where its state is kept between epochs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import ray
import torch
from torch import Tensor

from gross_ray.data.augment import Normalisation
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.images import SPLITS
from gross_ray.errors import DamagedFileError, MissingStageError
from gross_ray.results.store import UNDER_WAY, RunStore

RESIDENT_SHARE = 0.3
"""Of a worker's share of a GPU's memory, what its images may take; where they need more, they are streamed."""


class Report(Protocol):
    """Told the share of a unit that is done (0 to 1), its state in a few words, and its metrics by name."""

    def __call__(self, share: float, text: str, **metrics: float) -> object:
        """Take one report."""
        ...


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work that is stored, retried and resumed by itself."""

    name: str
    """Its name in tables and checkpoints, like ``conv2,g=16,seed=0``."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What the stage's function needs to know; plain values."""
    cost: float = 1.0
    """About how much work it is, in any unit: the longest are started first."""
    shared: str = ""
    """Name of what it reads besides, like a supernet's weights; the driver lays that out once for all workers."""


def grouped(units: Sequence[Unit], size: int) -> list[Unit]:
    """Return units of which each does up to `size` of the given ones in one pass; its work asks `members_of` it."""
    groups = [units[start : start + size] for start in range(0, len(units), size)]
    return [
        Unit(
            group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more",
            {"members": [{"name": unit.name, **unit.arguments} for unit in group]},
            cost=sum(unit.cost for unit in group),
        )
        for group in groups
    ]


def members_of(unit: Unit) -> list[Unit]:
    """Return the units of a group."""
    return [
        Unit(member["name"], {name: value for name, value in member.items() if name != "name"})
        for member in unit.arguments["members"]
    ]


def require(store: RunStore, stage: str, wanted: Iterable[str], there: set[str]) -> None:
    """Raise MissingStageError, naming the earlier `stage`, unless all units `wanted` from it are `there`."""
    names = set(wanted)
    if names - there:
        raise MissingStageError(
            f"{len(names & there)} of {len(names)} units of {stage} are stored in {store.storage}: "
            f"run `gross {stage}` on it first"
        )


@dataclass
class Context:
    """What a worker has at hand: the run folder, the images on its device, and a way to report."""

    store: RunStore
    splits: Splits
    device: str
    report: Report
    shared: Any = None
    """What the unit's `shared` names: arrays in it are read-only memory that all workers of a node share."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What this worker keeps from one unit to the next."""

    @property
    def seed(self) -> int:
        """The experiment's root seed."""
        return self.store.experiment.seed


Work = Callable[[Context, Unit], str]
"""Does one unit, stores its result, and returns a few words about it."""


def done(work: Work, context: Context, unit: Unit) -> str:
    """Do a unit, and return its few words with the damaged files that it deleted and did without."""
    text = work(context, unit)
    lost = "".join(f"; damaged file {file}: deleted, its work was done again" for file in context.store.damaged)
    context.store.damaged.clear()
    return text + lost


@dataclass(frozen=True)
class EpochSlot:
    """Keeps one unit's state between epochs in the run folder (a `CheckpointSlot`)."""

    store: RunStore
    stage: str
    unit: str

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was saved last, or None."""
        if self.store.has_checkpoint(self._stage, self.unit):
            with suppress(DamagedFileError):  # deleted by now: the training starts from its beginning
                return self.store.load_checkpoint(self._stage, self.unit)
        return None

    def save(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Replace what was saved, atomically."""
        self.store.save_checkpoint(self._stage, self.unit, tensors, description)

    def clear(self) -> None:
        """Forget it: the unit's result is stored."""
        self.store.delete_checkpoint(self._stage, self.unit)

    @property
    def _stage(self) -> str:
        return f"{self.stage}{UNDER_WAY}"


def pack_splits(splits: Splits) -> dict[str, Any]:
    """Return the images as NumPy arrays, which Ray's object store shares between processes without a copy."""
    packed: dict[str, Any] = {"name": splits.name, "classes": splits.classes}
    for name in SPLITS:
        part: ImageSet = getattr(splits, name)
        packed[name] = (part.images.numpy(), part.labels.numpy(), part.normalisation)
    return packed


def unpack_splits(packed: Mapping[str, Any], device: str, room: int | None = None) -> Splits:
    """Return what `pack_splits` packed, on `device`, or streamed to it if the images are more than `room` bytes."""
    resident = room is None or sum(packed[name][0].nbytes for name in SPLITS) <= room

    def unpacked(images: np.ndarray, labels: np.ndarray, normalisation: Normalisation) -> ImageSet:
        here = ImageSet(tensor_of(images), tensor_of(labels), normalisation=normalisation)
        return here.to(device) if resident else here.stream_to(device)

    train, validation, test = (unpacked(*packed[name]) for name in SPLITS)
    return Splits(packed["name"], train, validation, test, packed["classes"])


def room_for_images(device: str) -> int | None:
    """Return how many bytes of `device` the images of the process that Ray runs here may take; on a CPU, any number.

    There they lie in the object store, which all processes of a node share.
    """
    if torch.device(device).type != "cuda":
        return None
    share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0)
    return int(RESIDENT_SHARE * share * torch.cuda.get_device_properties(device).total_memory)


def tensor_of(array: np.ndarray) -> Tensor:
    """Return an array of Ray's object store as a tensor on the same memory, which nothing may write to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
