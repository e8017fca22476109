"""The run folder: the one module that knows its file names. Whatever is written is either whole or not there.

RUN/experiment.json                         the experiment that the folder belongs to
RUN/.lock                                   held by the driver that works on it
RUN/tables/NAME/UNIT.parquet                one completed unit of work
RUN/checkpoints/STAGE/UNIT.safetensors      tensors, with their description in the file's metadata
RUN/checkpoints/STAGE/UNIT.json             the same description, for people; never read
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gross_ray.errors import InvalidValueError, MissingStageError, RunFolderError
from gross_ray.experiment import Experiment
from gross_ray.results.tables import SCHEMA_VERSION, VERSION_KEY, table

# pyarrow leaves out of a folder what begins with a dot or an underscore: such a unit would silently be missing.
_NAME = re.compile(r"[A-Za-z0-9=,+-][A-Za-z0-9=,._+-]{0,149}")
_AGAIN = "delete that file and run the same command again"
_DESCRIPTION = "gross_ray.description"


class RunStore:
    """A run folder: the tables and checkpoints of one experiment.

    Pickles to its path and experiment, so that workers can write into it; they must see the same file system.
    """

    def __init__(self, path: Path, experiment: Experiment) -> None:
        """Hold an existing folder: use `create` or `open`."""
        self.path = path
        """The run folder, absolute."""
        self.experiment = experiment
        """The experiment that the folder belongs to."""
        self.damaged: list[str] = []
        """Files, relative to `path`, that `finished_units` found damaged and deleted."""

    def __reduce__(self) -> tuple[type[RunStore], tuple[Path, Experiment]]:
        return RunStore, (self.path, self.experiment)

    @classmethod
    def create(cls, path: str | Path, experiment: Experiment) -> RunStore:
        """Make the run folder of `experiment`, or open it if it is there already.

        Raises RunFolderError if the folder belongs to another experiment (naming the first field that differs),
        holds other files, or cannot be made.
        """
        store = cls(Path(path).resolve(), experiment)
        try:
            store.path.mkdir(parents=True, exist_ok=True)
            if not store._experiment_file.exists():
                foreign = [file.name for file in store.path.iterdir() if not _is_ours(file)]
                if foreign:
                    raise RunFolderError(
                        f"{store.path} is not a run folder and not empty (it holds {min(foreign)!r}): "
                        "give a new or empty folder with --out"
                    )
                with _whole_file(store._experiment_file) as file:
                    file.write(experiment.to_json().encode())
        except OSError as error:
            raise RunFolderError(
                f"cannot make the run folder {store.path}: {error}; give another one with --out"
            ) from None
        store._check_experiment()
        return store

    @classmethod
    def open(cls, path: str | Path) -> RunStore:
        """Open an existing run folder; raises RunFolderError if it is missing or its experiment.json is damaged."""
        path = Path(path).resolve()
        return cls(path, _read_experiment(path))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this driver alone; the kernel lets go of it when the process dies.

        Raises RunFolderError naming the host and process that hold it, or if it now belongs to another experiment.
        """
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise RunFolderError(
                    f"run folder {self.path} is in use by {owner}: wait until it ends, stop it, or give another --out"
                ) from None
            except OSError as error:
                raise RunFolderError(
                    f"cannot lock {file.name}: {error}; give an --out on a file system that has locks"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                self._check_experiment()  # two drivers may have created the folder at the same moment
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it with a forked child

    def remove_leftovers(self) -> None:
        """Delete the temporary files of writers that were killed; only for a driver that holds the lock."""
        for pattern in (".*.tmp", "tables/*/.*.tmp", "checkpoints/*/.*.tmp"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)

    # Tables

    def write_table(
        self, name: str, unit: str, rows: Sequence[Mapping[str, Any]], *, layers: Sequence[str] = ()
    ) -> Path:
        """Store the rows of a completed unit in table `name`, in place of what the unit stored before.

        Return the file. Raises ValueError naming the column that is missing, unknown or holds a wrong value, and
        InvalidValueError for an unknown table or a unit that cannot be a file's name.
        """
        arrow = table(name).to_arrow(rows, layers)
        path = self._table_file(name, unit)
        with _whole_file(path) as file:
            pq.write_table(arrow, file, write_page_checksum=True)
        return path

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """Return the rows of all units, in the natural order of the units' names (seed=2 before seed=10).

        Only `columns`, where they are named: of a million rows that is what fits beside other work.

        Raises RunFolderError naming a damaged file, and InvalidValueError for an unknown table.
        """
        return _frame(name, [_read_sound_unit(file, columns) for file in self._table_files(name)], columns)

    def read_units(self, name: str, units: Sequence[str], columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """Return the rows of some units that are stored, in the order given; of some columns only where they are named.

        Raises RunFolderError naming a damaged or missing file, and InvalidValueError for an unknown table.
        """
        return _frame(name, [_read_sound_unit(self._table_file(name, unit), columns) for unit in units], columns)

    def set_column(self, name: str, unit: str, column: str, values: Sequence[Any]) -> None:
        """Put `values`, one for each row, in place of a column of a stored unit; nothing else of it changes.

        Raises ValueError for a value that the column may not hold, RunFolderError naming a damaged or missing file.
        """
        path = self._table_file(name, unit)
        stored = _read_sound_unit(path)
        field = stored.schema.field(column)
        array = table(name).expand()[column].array(list(values), column)
        with _whole_file(path) as file:
            arrow = stored.set_column(stored.schema.get_field_index(column), field, array)
            pq.write_table(arrow, file, write_page_checksum=True)

    def finished_units(self, name: str) -> set[str]:
        """Return the units of table `name` that are stored whole; a damaged file is deleted and noted in `damaged`."""
        units = set()
        for file in self._table_files(name):
            try:
                _read_unit(file)
                units.add(file.stem)
            except _DamagedFile:
                file.unlink(missing_ok=True)
                self.damaged.append(str(file.relative_to(self.path)))
        return units

    def has_unit(self, name: str, unit: str) -> bool:
        """Return whether a unit of table `name` is stored; its content is not looked at, as `finished_units` does."""
        return self._table_file(name, unit).exists()

    def delete_unit(self, name: str, unit: str) -> None:
        """Forget what a unit stored in table `name`, if anything."""
        self._table_file(name, unit).unlink(missing_ok=True)

    # Checkpoints

    def save_checkpoint(
        self, stage: str, unit: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
    ) -> Path:
        """Store tensors of any device, stride and sharing, with a description of plain JSON values; return the file."""
        path = self._checkpoint_file(stage, unit)
        text = json.dumps(dict(description))
        copies = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        with _whole_file(path) as file:
            file.write(save(copies, metadata={_DESCRIPTION: text}))
        with _whole_file(_beside(path)) as file:
            file.write(json.dumps(dict(description), indent=2).encode())
        return path

    def load_checkpoint(self, stage: str, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors, on the CPU, and their description.

        Raises MissingStageError if nothing is stored, RunFolderError naming the file if it is damaged.
        """
        path = self._checkpoint_file(stage, unit)
        if not path.exists():
            raise MissingStageError(
                f"stage {stage!r} has stored nothing for unit {unit!r} in {self.path}: run that stage first"
            )
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                description = json.loads(file.metadata()[_DESCRIPTION])
                return {name: file.get_tensor(name) for name in file.keys()}, description  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"damaged checkpoint {path}: {error!r}; {_AGAIN}") from None

    def has_checkpoint(self, stage: str, unit: str) -> bool:
        """Return whether a checkpoint is stored."""
        return self._checkpoint_file(stage, unit).exists()

    def delete_checkpoint(self, stage: str, unit: str) -> None:
        """Delete a checkpoint, if there is one."""
        path = self._checkpoint_file(stage, unit)
        path.unlink(missing_ok=True)
        _beside(path).unlink(missing_ok=True)

    # File names

    @property
    def _experiment_file(self) -> Path:
        return self.path / "experiment.json"

    def _table_file(self, name: str, unit: str) -> Path:
        return self.path / "tables" / table(name).name / f"{_checked(unit, 'unit')}.parquet"

    def _table_files(self, name: str) -> list[Path]:
        files = (self.path / "tables" / table(name).name).glob("[!._]*.parquet")
        return sorted(files, key=lambda file: _natural(file.stem))

    def _checkpoint_file(self, stage: str, unit: str) -> Path:
        return self.path / "checkpoints" / _checked(stage, "stage") / f"{_checked(unit, 'unit')}.safetensors"

    def _check_experiment(self) -> None:
        stored = _read_experiment(self.path)
        if stored != self.experiment:
            raise RunFolderError(
                f"{self.path} belongs to another experiment; the first field that differs: "
                f"{self.experiment.first_difference(stored)}. Give another folder with --out, or the same settings"
            )


def read_table(run: str | Path, name: str, columns: Sequence[str] | None = None) -> pandas.DataFrame:
    """Return table `name` of the run folder `run`: all units stored so far, all columns or those named.

    docs/tables.md describes them.

    Raises InvalidValueError, listing the tables, for an unknown name, and RunFolderError if `run` is no run folder
    or holds a damaged file.
    """
    table(name)
    return RunStore.open(run).read_table(name, columns)


class _DamagedFile(Exception):
    """A stored unit cannot be read."""


def _frame(name: str, parts: list[pa.Table], columns: Sequence[str] | None) -> pandas.DataFrame:
    if not parts:
        return table(name).schema().empty_table().to_pandas().reindex(columns=columns)
    return pa.concat_tables(parts).to_pandas()


def _read_sound_unit(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        unit = _read_unit(file, columns)
    except _DamagedFile as error:
        raise RunFolderError(f"damaged file {file}: {error}; {_AGAIN}") from None
    for name in columns or ():
        if name not in unit.column_names:  # pyarrow leaves it out without a word
            there = ", ".join(pq.read_schema(file).names)
            raise InvalidValueError(f"table {file.parent.name!r} has no column {name!r}; its columns: {there}")
    return unit


def _read_unit(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    # ParquetFile, for pyarrow's other readers make columns of folders like seed=0 on the way to the file.
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            rows = parquet.metadata.num_rows
            stored = parquet.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise _DamagedFile(error) from None
    if stored.num_rows != rows:
        raise _DamagedFile(f"{stored.num_rows} rows where its footer says {rows}")
    version = (stored.schema.metadata or {}).get(VERSION_KEY, b"none").decode()
    if version != str(SCHEMA_VERSION):  # whole, only not ours to read: never deleted
        raise RunFolderError(
            f"{file} has schema version {version}, this gross_ray reads {SCHEMA_VERSION}: "
            "use the gross_ray that wrote it, or give another folder"
        )
    return stored


def _read_experiment(path: Path) -> Experiment:
    file = path / "experiment.json"
    try:
        return Experiment.from_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(
            f"{path} is not a run folder (it has no experiment.json): give the --out of a run"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{file} is damaged or of another gross_ray: {error}; restore it, or give another folder"
        ) from None


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` when the block ends well, and is deleted if it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too outlives a power cut
    finally:
        os.close(folder)


def _is_ours(file: Path) -> bool:
    return file.name == ".lock" or (file.name.startswith(".experiment.json.") and file.name.endswith(".tmp"))


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.json")


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
