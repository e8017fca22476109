"""What Ray and torch ask of the user's account: a home folder and a name; containers run accounts that have neither."""

from __future__ import annotations

import getpass
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def provide_home() -> None:
    """Give this process and its children a home folder and a user name, unless the account has them.

    The folder is one of this account alone, in the temporary folder.
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
    """Return the same folder for each command, or, if another account has taken its name, a new one."""
    folder = Path(tempfile.gettempdir(), f"gross_ray-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
