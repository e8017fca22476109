"""The run folder: the only module that knows its file names. No file is ever half written.

RUN/experiment.json                         the experiment, and the version of gross_ray that wrote it
RUN/data.json                               hashes of its images, which commands compare with the images that they load
RUN/weights.json                            the hash of its trained weights, if the user brought them
RUN/plans.json                              each stage's units, for `gross status`; made anew if it is lost
RUN/.lock                                   locked by the driver that works on it
RUN/tables/NAME/UNIT.parquet                one completed unit of work
RUN/checkpoints/STAGE/UNIT.safetensors      tensors, with their description in the file's metadata
RUN/checkpoints/STAGE/UNIT.json             the same description, for people; never read
RUN/report.html                             the page of `gross report`; never read
RUN/tracebacks.txt                          tracebacks of unexpected errors; written by `tracebacks`, never read
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from gross_ray.errors import DamagedFileError, InvalidValueError, MissingStageError, RunFolderError, StorageError
from gross_ray.experiment import PATH_FIELDS, Experiment
from gross_ray.run import lock
from gross_ray.run.experiment_file import EXPERIMENT, experiment_content, read_experiment
from gross_ray.run.file_format import DamagedContentError, checkpoint_file, read_checkpoint, read_unit, unit_file
from gross_ray.run.tables import TABLES, table
from gross_ray.storage import Storage

if TYPE_CHECKING:  # pyarrow imports pandas when it makes a frame, `file_format` imports torch when it reads tensors
    import pandas
    from torch import Tensor

# pyarrow skips files of a folder that begin with a dot or an underscore: such a unit would silently be missing.
_NAME = re.compile(r"[A-Za-z0-9=,+-][A-Za-z0-9=,._+-]{0,149}")
UNDER_WAY = "-under-way"
"""Suffix of the stage under which the state of unfinished units is stored between epochs."""
SEARCH_ENDED = ("search-rounds", "ended")
"""Stage and unit of the checkpoint whose existence says that a search by a strategy has finished."""
_DELETED = "deleted: the same command again makes it anew, or names the stage that does"
_KEPT = "`gross check RUN` deletes it, and its stage, run again, makes it anew"
Pin = TypeVar("Pin")
_REPORT = "report.html"


class RunStore:
    """A run folder, local or in a bucket: the tables and checkpoints of one experiment.

    It pickles to its address and experiment, so that workers can write into it; they must be able to reach it. A copy
    pickled under the lock acts for the process that has the lock.

    Which units are finished follows from file names alone. A file is checked when it is read (`read_table`,
    `read_units`, `load_checkpoint`): a damaged file raises DamagedFileError; under the lock, it is also deleted and
    noted in `damaged`, so that its unit is no longer finished. `check` reads everything.
    """

    def __init__(self, storage: Storage, experiment: Experiment) -> None:
        """Use `create` or `open`."""
        self.storage = storage
        """Where its files are; its `str` is an address for messages."""
        self.experiment = experiment
        """The experiment of the folder."""
        self.damaged: list[str] = []
        """Files, relative to the run folder, that were found damaged and deleted."""
        self._locked = False

    def __reduce__(self) -> tuple[Any, ...]:
        return RunStore, (self.storage, self.experiment), {"_locked": self._locked}

    @property
    def path(self) -> Path:
        """The absolute path of the run folder; raises InvalidValueError if it is in a bucket."""
        if self.storage.folder is None:
            raise InvalidValueError(f"{self.storage} is no folder of this machine: read its tables with read_table")
        return self.storage.folder

    @classmethod
    def create(cls, address: str | Path, experiment: Experiment) -> RunStore:
        """Make the run folder of `experiment` at a path or URI, or open it if it exists.

        Raises RunFolderError if the folder belongs to another experiment (naming the first field that differs),
        holds other files, or cannot be made, and InvalidValueError for a URI that pyarrow does not know.
        """
        store = cls(Storage(address), experiment)
        storage = store.storage
        try:
            storage.make()
            if not storage.exists(EXPERIMENT):
                foreign = [name for name in storage.entries() if not _is_ours(name)]
                if foreign:
                    raise RunFolderError(
                        f"{storage} is not a run folder and not empty (it holds {min(foreign)!r}): "
                        "name a new or empty folder with --out"
                    )
                storage.write(EXPERIMENT, experiment_content(experiment))
        except StorageError as error:
            raise RunFolderError(
                f"cannot make the run folder {storage}: {error}; name another one with --out"
            ) from None
        store._check_experiment()
        return store

    @staticmethod
    def is_there(address: str | Path) -> bool:
        """Return whether a path or URI is a run folder; raises as `Storage` does."""
        return Storage(address).exists(EXPERIMENT)

    @classmethod
    def open(cls, address: str | Path) -> RunStore:
        """Open an existing run folder; raises RunFolderError if it is missing or its experiment.json is damaged."""
        storage = Storage(address)
        return cls(storage, read_experiment(storage))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for this driver; a dead owner's lock is taken over.

        Raises RunFolderError, naming host, process and time, if another driver has the lock, or if the folder now
        belongs to another experiment.
        """
        with lock.held(self.storage):
            self._check_experiment()  # two drivers may have created the folder at the same moment
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def require_here(self) -> None:
        """Raise RunFolderError unless this machine can reach the folder."""
        if not self.storage.exists(EXPERIMENT):
            raise RunFolderError(
                f"the run folder {self.storage} is not there on {socket.gethostname()}: give --out a folder that all "
                "machines of the cluster see under this path, or a bucket (s3://bucket/folder)"
            )

    def remove_leftovers(self) -> None:
        """Delete the temporary files of killed writers. Only for a driver that has the lock."""
        self.storage.remove_leftovers()

    def check(self) -> None:
        """Read every table and checkpoint; under the lock, delete damaged files and note them in `damaged`.

        Without the lock, raises DamagedFileError for the first damaged file.
        """
        for name in TABLES:
            for unit in self.units(name):
                self._is_whole(partial(self._read_sound_unit, _table_file(name, unit)))
        for stage in self.storage.folders("checkpoints"):
            for unit in self.checkpoints(stage):
                self._is_whole(partial(self.load_checkpoint, stage, unit))

    # Small JSON files: hashes of the images and of the user's weights, and the stages' plans

    def read_pin(self, name: str, parse: Callable[[Any], Pin]) -> Pin | None:
        """Return the content of a small file, "data", "weights" or "plans", read by `parse`; None if it is not stored.

        Raises RunFolderError if the file is damaged, and StorageError.
        """
        file = f"{name}.json"
        try:
            return parse(json.loads(self.storage.read(file)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(
                f"{self.storage.shown(file)} is damaged ({error!r}): restore it, or delete it, and the next command "
                f"that reads the {name} stores a new one"
            ) from None

    def write_pin(self, name: str, values: Mapping[str, Any]) -> None:
        """Store a small file, "data", "weights" or "plans". Raises StorageError."""
        self.storage.write(f"{name}.json", json.dumps(dict(values), indent=2).encode())

    def unpinned(self) -> list[str]:
        """Return the experiment's fields that may hold a path to content whose hash is not stored."""
        return [field for field, name in PATH_FIELDS.items() if not self.storage.exists(f"{name}.json")]

    # Tables

    def write_table(
        self, name: str, unit: str, rows: Sequence[Mapping[str, Any]], *, layers: Sequence[str] = ()
    ) -> None:
        """Store the rows of a completed unit in table `name`, replacing its earlier rows.

        Raises ValueError naming the column that is missing, unknown or holds a wrong value, InvalidValueError for an
        unknown table or a unit that cannot be a file's name, and StorageError.
        """
        self.write_arrow(name, unit, table(name).to_arrow(rows, layers))

    def write_arrow(self, name: str, unit: str, arrow: pa.Table) -> None:
        """Store rows read from another run folder as a unit of table `name`, unchecked; raises StorageError."""
        self.storage.write(_table_file(name, unit), unit_file(arrow))

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """Return the rows of all units, in the natural order of the units' names (seed=2 before seed=10).

        `columns` limits what is read, by default all columns. Raises DamagedFileError naming a damaged file, and
        InvalidValueError for an unknown table or column.
        """
        return self.read_units(name, self.units(name), columns)

    def read_units(self, name: str, units: Sequence[str], columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """Return the rows of these units; raises as `read_table`, and RunFolderError for a missing unit."""
        return _frame(name, [self._read_sound_unit(_table_file(name, unit), columns) for unit in units], columns)

    def first_rows(self, name: str, units: Sequence[str], columns: Sequence[str]) -> pandas.DataFrame:
        """Return the first row of each unit; raises as `read_units`, and DamagedFileError for a unit without rows."""
        rows = []
        for unit in units:
            file = _table_file(name, unit)
            rows.append(self._read_sound_unit(file, columns).slice(0, 1))
            if not rows[-1].num_rows:
                raise self._damage("file", file, DamagedContentError("it has no rows"))
        return _frame(name, rows, columns)

    def set_column(self, name: str, unit: str, column: str, values: Sequence[Any]) -> None:
        """Replace one column of a stored unit with `values`, one for each row.

        Raises ValueError for a value that the column must not hold, RunFolderError naming a missing file, and
        DamagedFileError naming a damaged file.
        """
        file = _table_file(name, unit)
        stored = self._read_sound_unit(file)
        field = stored.schema.field(column)
        array = table(name).expand()[column].array(list(values), column)
        arrow = stored.set_column(stored.schema.get_field_index(column), field, array)
        self.storage.write(file, unit_file(arrow))

    def units(self, name: str) -> list[str]:
        """Return the units of table `name` in natural order; their files are not read."""
        files = self.storage.names(f"tables/{table(name).name}")
        units = [file.removesuffix(".parquet") for file in files if file.endswith(".parquet") and file[0] not in "._"]
        return sorted(units, key=_natural)

    def finished_units(self, name: str) -> set[str]:
        """Return the set of `units`."""
        return set(self.units(name))

    def read_sound(self, name: str, columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """Return `read_table` without damaged units; under the lock, these are deleted and noted in `damaged`."""
        whole = [
            unit
            for unit in self.units(name)
            if self._is_whole(partial(self._read_sound_unit, _table_file(name, unit)), always=True)
        ]
        return self.read_units(name, whole, columns)

    def has_unit(self, name: str, unit: str) -> bool:
        """Return whether a unit of table `name` is stored; its file is not read."""
        return self.storage.exists(_table_file(name, unit))

    def delete_unit(self, name: str, unit: str) -> None:
        """Delete the rows of a unit in table `name`, if it has any."""
        self.storage.delete(_table_file(name, unit))

    def copy_unit(self, other: RunStore, name: str, unit: str) -> None:
        """Copy a unit of table `name` from another run folder. Raises FileNotFoundError and StorageError."""
        file = _table_file(name, unit)
        self.storage.write(file, other.storage.read(file))

    # The page for people

    def write_report(self, page: str) -> str:
        """Store or replace the page of results, and return its address. Raises StorageError."""
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

        Raises MissingStageError if nothing is stored, and DamagedFileError naming the file if it is damaged.
        """
        file = _checkpoint_file(stage, unit)
        try:
            return read_checkpoint(self.storage, file)
        except FileNotFoundError:
            raise MissingStageError(
                f"stage {stage!r} has stored nothing for unit {unit!r} in {self.storage}: run that stage first"
            ) from None
        except DamagedContentError as error:
            raise self._damage("checkpoint", file, error) from None

    def has_checkpoint(self, stage: str, unit: str) -> bool:
        """Return whether a checkpoint is stored; for many units, `finished_checkpoints` is one call to the store."""
        return self.storage.exists(_checkpoint_file(stage, unit))

    def finished_checkpoints(self, stage: str) -> set[str]:
        """Return the set of `checkpoints`."""
        return set(self.checkpoints(stage))

    def checkpoints(self, stage: str) -> list[str]:
        """Return the units with a checkpoint of `stage`, in natural order; their files are not read."""
        files = self.storage.names(f"checkpoints/{_checked(stage, 'stage')}")
        ending = ".safetensors"
        units = [file.removesuffix(ending) for file in files if file.endswith(ending) and file[0] not in "._"]
        return sorted(units, key=_natural)

    def copy_checkpoint(self, other: RunStore, stage: str, unit: str) -> None:
        """Copy a checkpoint from another run folder. Raises FileNotFoundError and StorageError."""
        file = _checkpoint_file(stage, unit)
        content = other.storage.read(file)
        with suppress(FileNotFoundError):  # whoever wrote it was killed before the file for people
            self.storage.write(_beside(file), other.storage.read(_beside(file)))
        self.storage.write(file, content)

    def delete_checkpoint(self, stage: str, unit: str) -> None:
        """Delete a checkpoint if it exists."""
        file = _checkpoint_file(stage, unit)
        self.storage.delete(file)
        self.storage.delete(_beside(file))

    def _read_sound_unit(self, file: str, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            unit = read_unit(self.storage, file, columns)
        except FileNotFoundError:
            raise RunFolderError(
                f"damaged file {self.storage.shown(file)}: it is not stored; run its stage again"
            ) from None
        except DamagedContentError as error:
            raise self._damage("file", file, error) from None
        for name in columns or ():
            if name not in unit.column_names:  # pyarrow silently leaves it out
                known = ", ".join(pq.read_schema(pa.BufferReader(self.storage.read(file))).names)
                raise InvalidValueError(f"table {file.split('/')[1]!r} has no column {name!r}; its columns: {known}")
        return unit

    def _damage(self, kind: str, file: str, error: DamagedContentError) -> DamagedFileError:
        """Return the error for a damaged file; under the lock, delete the file and note it in `damaged`."""
        if self._locked:
            self.storage.delete(file)
            self.damaged.append(file)
        remedy = _DELETED if self._locked else _KEPT
        return DamagedFileError(f"damaged {kind} {self.storage.shown(file)}: {error}; {remedy}")

    def _is_whole(self, read: Callable[[], object], *, always: bool = False) -> bool:
        """Return whether `read` finds no damage; its DamagedFileError is raised without the lock, unless `always`."""
        try:
            read()
        except DamagedFileError:
            if not self._locked and not always:
                raise
            return False
        return True

    def _check_experiment(self) -> None:
        stored = read_experiment(self.storage)
        if stored == self.experiment:
            return
        if difference := self.experiment.first_difference(stored, paths=self.unpinned()):
            name = difference.partition(" ")[0]
            raise RunFolderError(
                f"{self.storage} belongs to another experiment; the first field that differs: {difference}. "
                f"Name another folder with --out, or repeat the folder's settings (--set {name}={stored.setting(name)})"
            )


def read_table(run: str | Path, name: str, columns: Sequence[str] | None = None) -> pandas.DataFrame:
    """Return the rows stored so far in table `name` of the run folder `run`, a path or URI; by default all columns.

    docs/tables.md describes the tables. Raises InvalidValueError, listing the tables, for an unknown name, and
    RunFolderError if `run` is no run folder or the table has a damaged file.
    """
    table(name)
    return RunStore.open(run).read_table(name, columns)


def _frame(name: str, parts: list[pa.Table], columns: Sequence[str] | None) -> pandas.DataFrame:
    """Return the parts as one frame; without parts, an empty frame with the table's columns."""
    if not parts:
        return table(name).schema().empty_table().to_pandas().reindex(columns=columns)
    return pa.concat_tables(parts).to_pandas()


def _table_file(name: str, unit: str) -> str:
    return f"tables/{table(name).name}/{_checked(unit, 'unit')}.parquet"


def _checkpoint_file(stage: str, unit: str) -> str:
    return f"checkpoints/{_checked(stage, 'stage')}/{_checked(unit, 'unit')}.safetensors"


def _is_ours(name: str) -> bool:
    return name == lock.LOCK or (name.startswith(f".{EXPERIMENT}.") and name.endswith(".tmp"))


def _beside(file: str) -> str:
    return f"{file.removesuffix('.safetensors')}.json"


def _checked(name: str, kind: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidValueError(
            f"{kind} {name!r}: a name has 1 to 150 letters, digits and = , . _ + -, and does not begin with . or _"
        )
    return name


def _natural(name: str) -> tuple[list[Any], str]:
    # A dot is a decimal point only after "=", as in alpha=0.25; in a layer's name (features.10) it separates.
    parts: list[Any] = re.split(r"((?<==)\d+\.\d+|\d+)", name)
    parts[1::2] = [float(number) for number in parts[1::2]]
    return parts, name
