"""The file experiment.json of a run folder: its experiment, and the version of gross_ray that wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gross_ray.errors import InvalidValueError, RunFolderError, one_line
from gross_ray.experiment import BEFORE, Experiment
from gross_ray.run.tables import SCHEMA_VERSION
from gross_ray.storage import Storage
from gross_ray.version import VERSION

EXPERIMENT = "experiment.json"
_WRITTEN_BY = "gross_ray"
"""Key of {"version": gross_ray's version, "schema": SCHEMA_VERSION} in the file."""


def experiment_content(experiment: Experiment) -> bytes:
    """Return the content of experiment.json: this version of gross_ray, then the experiment's fields."""
    written_by = {"version": VERSION, "schema": SCHEMA_VERSION}
    return json.dumps({_WRITTEN_BY: written_by, **experiment.to_dict()}, indent=2).encode()


def read_experiment(storage: Storage) -> Experiment:
    """Return the experiment of a run folder.

    Fields that are missing because an older version wrote the file get the values by which that version worked. That
    is safe, because any change of meaning raises SCHEMA_VERSION. Raises RunFolderError if the folder has no experiment,
    or, naming both versions, if its schema differs or a field is unknown.
    """
    written_by: dict[str, Any] = {}
    try:
        values = json.loads(storage.read(EXPERIMENT).decode())
        written_by = values.pop(_WRITTEN_BY, None) or {}
        if written_by.get("schema", SCHEMA_VERSION) == SCHEMA_VERSION:
            return Experiment.from_json(json.dumps(_as_before(values)))
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(
            f"{storage} is not a run folder (it has no {EXPERIMENT}): name the --out of a run"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{storage.shown(EXPERIMENT)} is damaged or of another gross_ray: {error}; {_versions(written_by)}; "
            "restore it, or name another folder"
        ) from None
    raise RunFolderError(f"{storage}: {_versions(written_by)}: use the gross_ray that wrote it, or name another folder")


def experiment_of(file: Path) -> Experiment:
    """Return the experiment of a JSON file: its fields, or the experiment.json of a run folder.

    Missing fields get their defaults, or in a run folder's file the values by which its version worked. Raises
    InvalidValueError, naming the file, for anything else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.pop(_WRITTEN_BY, None):
            values = _as_before(values)
        return Experiment.from_json(json.dumps(values))
    except (OSError, ValueError) as error:  # also InvalidValueError and UnicodeDecodeError
        raise InvalidValueError(
            f"experiment {file}: {one_line(error)}; write one like a run folder's {EXPERIMENT}"
        ) from None


def _as_before(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an experiment.json, with those added that the version which wrote it did not have."""
    for (group, name), value in BEFORE.items():
        if isinstance(values.get(group), dict):
            values[group].setdefault(name, value)
    return values


def _versions(written_by: Any) -> str:
    """Return a clause with the version of gross_ray that wrote the run folder and the version that runs now."""
    known = written_by if isinstance(written_by, dict) else {}
    by = f"gross_ray {known.get('version', 'of before 0.1.0')} (schema {known.get('schema', 'not stored')})"
    return f"it was written by {by}, and this is gross_ray {VERSION} (schema {SCHEMA_VERSION})"
