"""What Ray and torch ask of the user's account: a home folder and a name; containers run accounts that have neither."""

from __future__ import annotations

import getpass
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from gross_ray.errors import ResourcesError


def provide_home() -> None:
    """Give this process and its children a home folder and a user name, unless the account has them.

    The folder is one of this account alone, in the temporary folder. Raises ResourcesError if another account has it.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_own_folder())
    try:
        getpass.getuser()
    except (KeyError, OSError):  # Python 3.13 and newer raise OSError
        os.environ["USER"] = f"user{os.getuid()}"


def _own_folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"gross_ray-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ResourcesError(
            f"this account has no home folder, and others can write the one in its place, {folder}: set HOME to a "
            "folder of your own"
        )
    return folder
