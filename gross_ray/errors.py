"""The errors of gross_ray. Every message names the value, the rule and the remedy.

Each class takes one message and nothing else, so that it survives pickling on its way back from a worker.
"""

import operator


class GrossRayError(Exception):
    """Base class of all errors that gross_ray raises on purpose."""


class InvalidValueError(GrossRayError, ValueError):
    """A user's value breaks a rule (also a `ValueError`)."""


class DatasetError(GrossRayError):
    """A dataset is missing, truncated or not what its name says."""


class RunFolderError(GrossRayError):
    """A run folder belongs to another experiment, is in use, or contains a damaged file."""


class DamagedFileError(RunFolderError):
    """A file of a run folder is damaged; a process that may repair the folder has deleted it."""

    deleted: tuple[str, ...] = ()
    """Files that a unit found damaged and deleted, relative to the run folder; pickled with the error."""


class StorageError(GrossRayError):
    """A storage refuses access, is full, or does not answer."""


class MissingStageError(GrossRayError):
    """A stage lacks input that an earlier stage has not stored yet."""


class DivergedError(GrossRayError):
    """A training's loss became infinite or NaN."""


class ResourcesError(GrossRayError):
    """An experiment needs resources that the cluster does not have."""


class VersionMismatchError(GrossRayError):
    """A worker and its driver run different versions of gross_ray, torch or Python."""


class UnitsFailedError(GrossRayError):
    """Units of work failed; the results of all others are stored."""

    def __init__(self, what: str, then: str = "") -> None:
        """Join what failed and what helps to one line."""
        super().__init__(f"{what}. {then}" if then else what)
        self.what = what


class ConvertedNetworkWarning(UserWarning):
    """A user's network has another floating-point type, and its copy in float32 is used instead."""


def is_whole(value: object, least: int) -> bool:
    """Return whether a value is a whole number of at least `least`; True, 2.0 and nan are not whole numbers."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= least  # type: ignore[arg-type]
    except TypeError:
        return False


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message: torch's messages have dozens."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def one_line(error: BaseException) -> str:
    """Return any error, for example of the user's own code, as its type and message in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
