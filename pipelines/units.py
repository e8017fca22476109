"""The vocabulary that stages and executors share: a unit of work, a job of many units, and a unit's context."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from gross_ray.data.image_set import Splits
from gross_ray.errors import DamagedFileError, MissingStageError
from gross_ray.run.opened import Run
from gross_ray.run.store import UNDER_WAY, RunStore


@dataclass(frozen=True, kw_only=True)
class Unit(ABC):
    """The smallest piece of work that is stored, retried and resumed on its own. Each stage has a subclass.

    The fields of a subclass are plain values that define the work; its name is made from them.
    """

    cost: float = field(default=1.0, compare=False)
    """Amount of work, in any unit of measure: the most costly units are started first."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the unit in tables and checkpoints, like ``conv2,g=16,seed=0``; unique within its stage."""

    @property
    def stored_as(self) -> list[str]:
        """Names under which its results are stored: its own, unless its parts are stored one by one."""
        return [self.name]

    @property
    def shared(self) -> str:
        """Name of data that several units read, like a supernet's weights: it is loaded once for all of them."""
        return ""

    def values(self) -> dict[str, Any]:
        """Return the fields that define the work, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "cost"}


@dataclass(frozen=True, kw_only=True)
class Group(Unit):
    """Several units that are computed together in one pass."""

    members: tuple[Unit, ...]

    @property
    def name(self) -> str:
        """Name of the first member, and the number of others."""
        first = self.members[0].name
        return first if len(self.members) == 1 else f"{first} and {len(self.members) - 1} more"


def grouped(units: Sequence[Unit], size: int) -> list[Group]:
    """Return the units in groups of up to `size`, in their order."""
    groups = [tuple(units[start : start + size]) for start in range(0, len(units), size)]
    return [Group(members=group, cost=sum(unit.cost for unit in group)) for group in groups]


def require(store: RunStore, stage: str, wanted: Iterable[str], done: set[str]) -> None:
    """Raise MissingStageError, naming the earlier `stage`, unless all its units in `wanted` are `done`."""
    names = set(wanted)
    if names - done:
        raise MissingStageError(
            f"{len(names & done)} of {len(names)} units of {stage} are stored in {store.storage}: "
            f"run `gross {stage}` on it first"
        )


class Report(Protocol):
    """Receives a unit's progress: the share that is done (0 to 1), its state in a few words, and metrics by name."""

    def __call__(self, share: float, text: str, **metrics: float) -> object:
        """Take one report."""


@dataclass
class Context:
    """The environment of the work on a unit: the run, the images on its device, and a way to report."""

    run: Run
    splits: Splits
    device: str
    report: Report
    shared: Any = None
    """The data that the unit's `shared` names; its arrays may be read-only memory shared by all workers of a node."""
    kept: dict[str, Any] = field(default_factory=dict)
    """A cache that this worker keeps from one unit to the next."""

    @property
    def store(self) -> RunStore:
        """The run's folder."""
        return self.run.store

    @property
    def seed(self) -> int:
        """The experiment's root seed."""
        return self.run.experiment.seed


Work = Callable[[Context, Any], str]
"""Does one unit, stores its result, and returns a few words about the result."""
Shared = Callable[[str], Any]
"""Loads the data that units share, by its name: anything that pickles, preferably NumPy arrays."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage's request to the driver: units, the work on one of them, and which of them are done."""

    stage: str
    """Name shown with the progress."""
    units: Sequence[Unit]
    work: Work
    done: Callable[[], set[str]]
    """Returns the names of the units whose results are stored."""
    kind: str
    """All units of one kind run with the same number of threads, whichever command asks for them."""
    num_equal: int | None
    """Approximate number of units of this kind in the whole experiment: it decides the number of threads.

    None: several for each worker, however many workers run at once.
    """
    trials: bool = False
    """Whether units report metrics after each epoch: Ray runs such units as trials of Ray Tune."""
    shared: Shared | None = None
    """Loads the data that units share (`Unit.shared`)."""
    together: int | None = None
    """Pass `work` groups of up to this many units (`Group`), computed in one pass; None: one unit at a time."""


@dataclass(frozen=True)
class EpochSlot:
    """Stores one unit's state between epochs in the run folder (a `CheckpointSlot`)."""

    store: RunStore
    stage: str
    unit: str

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the state that was saved last, or None."""
        if self.store.has_checkpoint(self._stage, self.unit):
            with suppress(DamagedFileError):  # the file was deleted, and the training starts from its beginning
                return self.store.load_checkpoint(self._stage, self.unit)
        return None

    def save(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Save the state, atomically replacing the last one."""
        self.store.save_checkpoint(self._stage, self.unit, tensors, description)

    def clear(self) -> None:
        """Delete the state, once the unit's result is stored."""
        self.store.delete_checkpoint(self._stage, self.unit)

    @property
    def _stage(self) -> str:
        return f"{self.stage}{UNDER_WAY}"
