"""The errors of gross_ray. Every message names the value, the rule and the remedy.

Each kind takes one message and nothing else, so that it survives pickling on its way back from a worker.
"""

import operator


class GrossRayError(Exception):
    """Base of all errors that gross_ray raises on purpose."""


class InvalidValueError(GrossRayError, ValueError):
    """A value that a user gave breaks a rule (a `ValueError` too)."""


class DatasetError(GrossRayError):
    """A dataset is missing, truncated or not what its name says."""


class RunFolderError(GrossRayError):
    """A run folder belongs to another experiment, is in use, or holds a damaged file."""


class DamagedFileError(RunFolderError):
    """A file of a run folder is damaged; where this process may repair the folder, the file was deleted."""


class StorageError(GrossRayError):
    """A store of files refuses, is full, or does not answer."""


class MissingStageError(GrossRayError):
    """A stage was asked for whose input an earlier stage has not stored yet."""


class DivergedError(GrossRayError):
    """Training reached a loss that is not finite."""


class ResourcesError(GrossRayError):
    """An experiment asks for resources that the cluster does not have."""


class VersionMismatchError(GrossRayError):
    """A worker runs another gross_ray, torch or Python than its driver."""


class UnitsFailedError(GrossRayError):
    """Some units of work did not end; all others are stored."""


def is_whole(value: object, least: int) -> bool:
    """Return whether a value is a whole number of `least` or more; True, 2.0 and nan are none."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= least  # type: ignore[arg-type]
    except TypeError:
        return False


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of what it says: torch explains itself in dozens."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def one_line(error: BaseException) -> str:
    """Return an error of whatever kind, of the user's own code say, with its type, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
