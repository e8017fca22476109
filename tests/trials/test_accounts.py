"""Accounts without a home folder or a name, as containers run them under any user id."""

from __future__ import annotations

import getpass
import os
import pwd
import tempfile
from pathlib import Path

import pytest

from pipelines.home import provide_home

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make this account one that has no entry in the list of users; return the temporary folder."""

    def unknown(user: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", *NAMES):
        monkeypatch.setenv(name, "set back at the end")
        monkeypatch.delenv(name)
    with pytest.raises(RuntimeError):
        Path.home()
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    return tmp_path


def test_an_account_without_home_and_name_gets_both(nobody: Path) -> None:
    provide_home()
    home = Path.home()
    assert home.parent == nobody and home.is_dir()
    assert home.stat().st_mode & 0o777 == 0o700
    assert getpass.getuser() == f"user{os.getuid()}"
    provide_home()
    assert Path.home() == home
    os.environ.pop("HOME")
    provide_home()  # the next command
    assert Path.home() == home


@pytest.mark.parametrize("taken", ["by a file", "by a link", "open to all"])
def test_a_folder_that_others_can_write_is_not_taken(nobody: Path, taken: str) -> None:
    folder = nobody / f"gross_ray-{os.getuid()}"
    if taken == "by a link":
        (nobody / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(nobody / "elsewhere")
    elif taken == "open to all":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        folder.touch()
    provide_home()
    home = Path.home()
    assert home.parent == nobody and home not in (folder, nobody / "elsewhere")
    assert home.is_dir() and home.stat().st_mode & 0o777 == 0o700


def test_a_home_and_a_name_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("LOGNAME", "someone")
    monkeypatch.delenv("USER", raising=False)
    provide_home()
    assert os.environ["HOME"] == "/somewhere"
    assert getpass.getuser() == "someone"
    assert "USER" not in os.environ
