"""The run folder: the one module that knows its file names. Whatever is written is either whole or not there.

RUN/experiment.json                         the experiment that the folder belongs to
RUN/data.json                               hashes of its images, which commands compare with what they load
RUN/weights.json                            the hash of its trained weights, where they were given
RUN/.lock                                   held by the driver that works on it
RUN/tables/NAME/UNIT.parquet                one completed unit of work
RUN/checkpoints/STAGE/UNIT.safetensors      tensors, with their description in the file's metadata
RUN/checkpoints/STAGE/UNIT.json             the same description, for people; never read
RUN/report.html                             the page of `gross report`; never read
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from gross_ray.errors import InvalidValueError, MissingStageError, RunFolderError, StorageError
from gross_ray.experiment import PATH_FIELDS, Experiment
from gross_ray.run import lock
from gross_ray.run.file_format import DamagedFileError, checkpoint_file, read_checkpoint, read_unit, unit_file
from gross_ray.run.storage import Storage
from gross_ray.run.tables import TABLES, table

if TYPE_CHECKING:  # pyarrow imports pandas itself where it makes a frame; tensors come from `file_format`
    import pandas
    from torch import Tensor

# pyarrow leaves out of a folder what begins with a dot or an underscore: such a unit would silently be missing.
_NAME = re.compile(r"[A-Za-z0-9=,+-][A-Za-z0-9=,._+-]{0,149}")
UNDER_WAY = "-under-way"
"""Ending of the stages whose checkpoints are the state of units between epochs."""
SEARCH_ENDED = ("search-rounds", "ended")
"""Stage and unit of the checkpoint that tells that a search by a strategy has ended."""
_AGAIN = "run its stage again: it deletes the file and says what follows"
_EXPERIMENT = "experiment.json"
Pin = TypeVar("Pin")
_REPORT = "report.html"


class RunStore:
    """A run folder, local or in a bucket: the tables and checkpoints of one experiment.

    Pickles to its address and experiment, so that workers can write into it; they must be able to reach it.
    """

    def __init__(self, storage: Storage, experiment: Experiment) -> None:
        """Hold an existing folder: use `create` or `open`."""
        self.storage = storage
        """Where its files are; as text, the address as it may be shown."""
        self.experiment = experiment
        """The experiment that the folder belongs to."""
        self.damaged: list[str] = []
        """Files, named from the run folder on, that were found damaged and deleted."""
        self._locked = False
        self._sound: set[str] = set()
        """Files that were read under this lock, and found whole."""

    def __reduce__(self) -> tuple[type[RunStore], tuple[Storage, Experiment]]:
        return RunStore, (self.storage, self.experiment)

    @property
    def path(self) -> Path:
        """The run folder, absolute; raises InvalidValueError where it is in a bucket."""
        if self.storage.folder is None:
            raise InvalidValueError(f"{self.storage} is no folder of this machine: use its tables through read_table")
        return self.storage.folder

    @classmethod
    def create(cls, address: str | Path, experiment: Experiment) -> RunStore:
        """Make the run folder of `experiment` at a path or URI, or open it if it is there already.

        Raises RunFolderError if the folder belongs to another experiment (naming the first field that differs),
        holds other files, or cannot be made, and InvalidValueError for a URI that pyarrow does not know.
        """
        store = cls(Storage(address), experiment)
        storage = store.storage
        try:
            storage.make()
            if not storage.exists(_EXPERIMENT):
                foreign = [name for name in storage.entries() if not _is_ours(name)]
                if foreign:
                    raise RunFolderError(
                        f"{storage} is not a run folder and not empty (it holds {min(foreign)!r}): "
                        "give a new or empty folder with --out"
                    )
                storage.write(_EXPERIMENT, experiment.to_json().encode())
        except StorageError as error:
            raise RunFolderError(
                f"cannot make the run folder {storage}: {error}; give another one with --out"
            ) from None
        store._check_experiment()
        return store

    @staticmethod
    def is_there(address: str | Path) -> bool:
        """Return whether there is a run folder at a path or URI; raises as `Storage` does."""
        return Storage(address).exists(_EXPERIMENT)

    @classmethod
    def open(cls, address: str | Path) -> RunStore:
        """Open an existing run folder; raises RunFolderError if it is missing or its experiment.json is damaged."""
        storage = Storage(address)
        return cls(storage, _read_experiment(storage))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this driver alone; a dead owner's lock is taken over.

        Raises RunFolderError naming host, process and time of the driver that holds it, or if it now belongs to
        another experiment.
        """
        with lock.held(self.storage):
            self._check_experiment()  # two drivers may have created the folder at the same moment
            self._locked = True
            try:
                yield
            finally:
                self._locked = False
                self._sound.clear()

    def require_here(self) -> None:
        """Raise RunFolderError unless this machine reaches the folder, as each one that does its work has to."""
        if not self.storage.exists(_EXPERIMENT):
            raise RunFolderError(
                f"the run folder {self.storage} is not there on {socket.gethostname()}: give --out a folder that all "
                "machines of the cluster see under this path, or a bucket (s3://bucket/folder)"
            )

    def remove_leftovers(self) -> None:
        """Delete what killed writers left, and the damaged files of all tables and of trainings under way.

        The latter are noted in `damaged`; other checkpoints are judged by `has_checkpoint`. Only for a driver that
        holds the lock.
        """
        self.storage.remove_leftovers()
        for stage in self.storage.folders("checkpoints"):
            if stage.endswith(UNDER_WAY):
                for name in self.storage.names(f"checkpoints/{stage}"):
                    if name.endswith(".safetensors") and not name.startswith("."):
                        self._is_whole(f"checkpoints/{stage}/{name}", read_checkpoint)
        for name in TABLES:
            self.finished_units(name)

    # Hashes of what lies outside the run folder: its images and given weights

    def read_pin(self, name: str, parse: Callable[[Any], Pin]) -> Pin | None:
        """Return what `parse` makes of the hashes stored under `name`, "data" or "weights"; None where none are stored.

        Raises RunFolderError where the file is damaged, and StorageError.
        """
        file = f"{name}.json"
        try:
            return parse(json.loads(self.storage.read(file)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(
                f"{self.storage.shown(file)} is damaged ({error!r}): restore it, or delete it, and the next command "
                f"that reads the {name} stores what it finds then"
            ) from None

    def write_pin(self, name: str, values: Mapping[str, Any]) -> None:
        """Store hashes under `name`, "data" or "weights". Raises StorageError."""
        self.storage.write(f"{name}.json", json.dumps(dict(values), indent=2).encode())

    def unpinned(self) -> list[str]:
        """Return the fields that may hold a path and for whose content no hash is stored: only the path tells."""
        return [field for field, name in PATH_FIELDS.items() if not self.storage.exists(f"{name}.json")]

    # Tables

    def write_table(
        self, name: str, unit: str, rows: Sequence[Mapping[str, Any]], *, layers: Sequence[str] = ()
    ) -> None:
        """Store the rows of a completed unit in table `name`, in place of what the unit stored before.

        Raises ValueError naming the column that is missing, unknown or holds a wrong value, InvalidValueError for an
        unknown table or a unit that cannot be a file's name, and StorageError.
        """
        arrow = table(name).to_arrow(rows, layers)
        self.storage.write(_table_file(name, unit), unit_file(arrow))

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """Return the rows of all units, in the natural order of the units' names (seed=2 before seed=10).

        Only `columns`, where they are named: of a million rows that is what fits beside other work.

        Raises RunFolderError naming a damaged file, and InvalidValueError for an unknown table.
        """
        return self.read_units(name, self.units(name), columns)

    def read_units(self, name: str, units: Sequence[str], columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """Return the rows of some units that are stored, in the order given; of some columns only where they are named.

        Raises RunFolderError naming a damaged or missing file, and InvalidValueError for an unknown table.
        """
        parts = [self._read_sound_unit(_table_file(name, unit), columns) for unit in units]
        if not parts:
            return table(name).schema().empty_table().to_pandas().reindex(columns=columns)
        return pa.concat_tables(parts).to_pandas()

    def first_rows(self, name: str, units: Sequence[str], columns: Sequence[str]) -> pandas.DataFrame:
        """Return the first row of each of some units that are stored, in the order given.

        Raises RunFolderError naming a file that is damaged, missing or without rows, and InvalidValueError for an
        unknown table.
        """
        rows = []
        for unit in units:
            file = _table_file(name, unit)
            rows.append(self._read_sound_unit(file, columns).slice(0, 1))
            if not rows[-1].num_rows:
                raise RunFolderError(f"damaged file {self.storage.shown(file)}: it has no rows; {_AGAIN}")
        if not rows:
            return table(name).schema().empty_table().to_pandas().reindex(columns=list(columns))
        return pa.concat_tables(rows).to_pandas()

    def set_column(self, name: str, unit: str, column: str, values: Sequence[Any]) -> None:
        """Put `values`, one for each row, in place of a column of a stored unit; nothing else of it changes.

        Raises ValueError for a value that the column may not hold, RunFolderError naming a damaged or missing file.
        """
        file = _table_file(name, unit)
        stored = self._read_sound_unit(file)
        field = stored.schema.field(column)
        array = table(name).expand()[column].array(list(values), column)
        arrow = stored.set_column(stored.schema.get_field_index(column), field, array)
        self.storage.write(file, unit_file(arrow))

    def units(self, name: str) -> list[str]:
        """Return the units that have a file in table `name`, by natural order; what is in it is not looked at."""
        files = self.storage.names(f"tables/{table(name).name}")
        units = [file.removesuffix(".parquet") for file in files if file.endswith(".parquet") and file[0] not in "._"]
        return sorted(units, key=_natural)

    def finished_units(self, name: str) -> set[str]:
        """Return the units of table `name` that are stored whole.

        Where this process holds the lock, a damaged file is deleted and noted in `damaged`. Its content is read once.
        """
        return {unit for unit in self.units(name) if self._is_whole(_table_file(name, unit), read_unit)}

    def read_sound(self, name: str, columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """Return what `read_table` does of the units that are stored whole; damaged ones as `finished_units` does."""
        sound = self.finished_units(name)
        return self.read_units(name, [unit for unit in self.units(name) if unit in sound], columns)

    def has_unit(self, name: str, unit: str) -> bool:
        """Return whether a unit of table `name` is stored; its content is not looked at, as `finished_units` does."""
        return self.storage.exists(_table_file(name, unit))

    def delete_unit(self, name: str, unit: str) -> None:
        """Forget what a unit stored in table `name`, if anything."""
        self.storage.delete(_table_file(name, unit))

    def copy_unit(self, other: RunStore, name: str, unit: str) -> None:
        """Store what a unit of table `name` is in another run folder. Raises FileNotFoundError and StorageError."""
        file = _table_file(name, unit)
        self.storage.write(file, other.storage.read(file))

    # The page for people

    def write_report(self, page: str) -> str:
        """Store the page of results, in place of the one that is there, and return where. Raises StorageError."""
        self.storage.write(_REPORT, page.encode())
        return self.storage.shown(_REPORT)

    # Checkpoints

    def save_checkpoint(
        self, stage: str, unit: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
    ) -> None:
        """Store tensors of any device, stride and sharing, with a description of plain JSON values.

        Raises InvalidValueError for a stage or unit that cannot be a file's name, and StorageError.
        """
        file = _checkpoint_file(stage, unit)
        self.storage.write(file, checkpoint_file(tensors, description))
        self.storage.write(_beside(file), json.dumps(dict(description), indent=2).encode())

    def load_checkpoint(self, stage: str, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors, on the CPU, and their description.

        Raises MissingStageError if nothing is stored, RunFolderError naming the file if it is damaged.
        """
        file = _checkpoint_file(stage, unit)
        try:
            return read_checkpoint(self.storage, file)
        except FileNotFoundError:
            raise MissingStageError(
                f"stage {stage!r} has stored nothing for unit {unit!r} in {self.storage}: run that stage first"
            ) from None
        except DamagedFileError as error:
            raise RunFolderError(f"damaged checkpoint {self.storage.shown(file)}: {error}; {_AGAIN}") from None

    def has_checkpoint(self, stage: str, unit: str) -> bool:
        """Return whether a checkpoint is stored.

        Where this process holds the lock, one that is damaged is not: it is deleted, and noted in `damaged`. Its
        content is read once.
        """
        file = _checkpoint_file(stage, unit)
        if not self.storage.exists(file):
            return False
        return not self._locked or self._is_whole(file, read_checkpoint)

    def checkpoints(self, stage: str) -> list[str]:
        """Return the units that have a checkpoint of `stage`, by natural order; what is in it is not looked at."""
        files = self.storage.names(f"checkpoints/{_checked(stage, 'stage')}")
        ending = ".safetensors"
        units = [file.removesuffix(ending) for file in files if file.endswith(ending) and file[0] not in "._"]
        return sorted(units, key=_natural)

    def copy_checkpoint(self, other: RunStore, stage: str, unit: str) -> None:
        """Store what a checkpoint is in another run folder. Raises FileNotFoundError and StorageError."""
        file = _checkpoint_file(stage, unit)
        for part in (_beside(file), file):
            self.storage.write(part, other.storage.read(part))

    def delete_checkpoint(self, stage: str, unit: str) -> None:
        """Delete a checkpoint, if there is one."""
        file = _checkpoint_file(stage, unit)
        self.storage.delete(file)
        self.storage.delete(_beside(file))

    def _read_sound_unit(self, file: str, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            unit = read_unit(self.storage, file, columns)
        except DamagedFileError as error:
            raise RunFolderError(f"damaged file {self.storage.shown(file)}: {error}; {_AGAIN}") from None
        for name in columns or ():
            if name not in unit.column_names:  # pyarrow leaves it out without a word
                there = ", ".join(pq.read_schema(pa.BufferReader(self.storage.read(file))).names)
                raise InvalidValueError(f"table {file.split('/')[1]!r} has no column {name!r}; its columns: {there}")
        return unit

    def _is_whole(self, file: str, read: Callable[[Storage, str], object]) -> bool:
        """Return whether `read` finds a file whole; under the lock it is read once, and deleted if it is damaged."""
        if self._locked and file in self._sound:
            return True
        try:
            read(self.storage, file)
        except DamagedFileError:
            if self._locked:
                self.storage.delete(file)
                self.damaged.append(file)
            return False
        if self._locked:
            self._sound.add(file)
        return True

    def _check_experiment(self) -> None:
        stored = _read_experiment(self.storage)
        if stored == self.experiment:
            return
        if difference := self.experiment.first_difference(stored, paths=self.unpinned()):
            raise RunFolderError(
                f"{self.storage} belongs to another experiment; the first field that differs: {difference}. "
                "Give another folder with --out, or the same settings"
            )


def read_table(run: str | Path, name: str, columns: Sequence[str] | None = None) -> pandas.DataFrame:
    """Return table `name` of the run folder `run`, a path or URI: all units stored so far, all columns or those named.

    docs/tables.md describes them.

    Raises InvalidValueError, listing the tables, for an unknown name, and RunFolderError if `run` is no run folder
    or holds a damaged file.
    """
    table(name)
    return RunStore.open(run).read_table(name, columns)


def _read_experiment(storage: Storage) -> Experiment:
    try:
        return Experiment.from_json(storage.read(_EXPERIMENT).decode())
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(
            f"{storage} is not a run folder (it has no {_EXPERIMENT}): give the --out of a run"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{storage.shown(_EXPERIMENT)} is damaged or of another gross_ray: {error}; "
            "restore it, or give another folder"
        ) from None


def _table_file(name: str, unit: str) -> str:
    return f"tables/{table(name).name}/{_checked(unit, 'unit')}.parquet"


def _checkpoint_file(stage: str, unit: str) -> str:
    return f"checkpoints/{_checked(stage, 'stage')}/{_checked(unit, 'unit')}.safetensors"


def _is_ours(name: str) -> bool:
    return name == lock.LOCK or (name.startswith(f".{_EXPERIMENT}.") and name.endswith(".tmp"))


def _beside(file: str) -> str:
    return f"{file.removesuffix('.safetensors')}.json"


def _checked(name: str, kind: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidValueError(
            f"{kind} {name!r}: a name has 1 to 150 letters, digits and = , . _ + -, and begins with none of . and _"
        )
    return name


def _natural(name: str) -> tuple[list[Any], str]:
    # A fraction is a number only after "=", as in alpha=0.25: in a layer's name (features.10) the dot separates.
    parts: list[Any] = re.split(r"((?<==)\d+\.\d+|\d+)", name)
    parts[1::2] = [float(number) for number in parts[1::2]]
    return parts, name
