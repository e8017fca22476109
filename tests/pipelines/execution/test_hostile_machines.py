"""Real accounts and machines that lack what Ray needs: `gross` works there, or names cause and remedy in one line.

`tests/trials` has the same kinds in process; here they are made by namespaces and limits, which needs root and Linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from miniature import ROOT, SETTINGS, command

from pipelines.execution.processes import local_nodes

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_ray")]

NAMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
WITHOUT_NAME = ["unshare", "-U", "--map-user=12345", "--map-group=12345"]
DEVICES = "mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9"
"""What makes the devices that Python and Ray open."""
SETUP = [part for setting in SETTINGS for part in ("--set", setting)]


@pytest.fixture(autouse=True)
def allowed() -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("namespaces need root and util-linux")
    tried = subprocess.run([*_mounted("ro"), "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespaces here: {tried.stderr.decode().strip()}")


def _after(setup: str) -> list[str]:
    """Return the words before a command that let a shell do `setup` first."""
    return ["bash", "-c", f'{setup} && exec "$@"', "-"]


def _mounted(options: str) -> list[str]:
    return ["unshare", "-m", *_after(f"mount -t tmpfs -o {options} tmpfs /dev/shm")]


WITHOUT_SHM = ["unshare", "-m", *_after(f"umount -l /dev/shm; mount -t tmpfs tmpfs /dev && {DEVICES}")]
READ_ONLY_TMP = ["unshare", "-m", *_after("mount --bind /tmp /tmp && mount -o remount,ro,bind /tmp")]


def _train(run: Path, before: list[str], *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the first stage of the miniature, which starts or joins Ray."""
    words = command("train", str(run), "--preset", "quickstart", *SETUP, *more)
    around = {name: value for name, value in os.environ.items() if name not in (*NAMES, "RAY_ADDRESS")}
    kept = {} if "-U" in before else {"HOME": os.environ["HOME"]}
    return subprocess.run(
        [*before, *words],
        env={**around, **kept, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("before", "environment", "note"),
    [
        (WITHOUT_NAME, {}, ""),
        ([], {"HOME": "/proc"}, ""),  # nothing can be written there
        (_mounted("ro"), {}, "Ray's objects are in /tmp: the shared memory /dev/shm cannot be written"),
        (_mounted("size=1m"), {}, ""),
        (WITHOUT_SHM, {}, "the shared memory /dev/shm is not there"),
        (READ_ONLY_TMP, {}, "Ray's temporary files are in /var/tmp/ray: /tmp cannot be written"),
    ],
    ids=[
        "no home and no name",
        "read-only home",
        "read-only /dev/shm",
        "tiny /dev/shm",
        "no /dev/shm",
        "read-only /tmp",
    ],
)
def test_it_simply_works(before: list[str], environment: dict[str, str], note: str) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        ended = _train(Path(folder) / "run", before, "--num-cpus", "2", **environment)
        assert ended.returncode == 0, ended.stderr
        assert note in ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("kind", [90 * "x", "with a space and ümlaut"])
def test_an_odd_temporary_folder_works(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    ended = _train(tmp_path / "run", [], "--num-cpus", "2", TMPDIR=str(folder))
    assert ended.returncode == 0, ended.stderr
    assert f"Ray's temporary files are in /tmp/ray: {folder} " in ended.stderr


def _refused(ended: subprocess.CompletedProcess[str]) -> str:
    """Return the line in which a command ended that named what is wrong."""
    assert ended.returncode == 2, ended.stderr
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert "Traceback" not in ended.stderr
    return line


def test_too_few_open_files_are_one_line(tmp_path: Path) -> None:
    line = _refused(_train(tmp_path / "run", _after("ulimit -n 100"), "--num-cpus", "2"))
    assert "open files, and this process may have 100: raise the limit" in line


PRIVATE = """
import sys
import ray
from pipelines.execution.cluster import connected
from pipelines.resources import Resources
with connected(Resources(num_cpus=1)):
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def private() -> Iterator[str]:
    """The address of a Ray that another command has started for itself."""
    words = [sys.executable, "-c", PRIVATE]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "no Ray"
        yield address
        process.communicate(timeout=300)


def test_the_ray_of_another_command_is_not_joined(private: str, tmp_path: Path) -> None:
    if any(not node.private for node in local_nodes()):
        pytest.skip("another Ray on this machine may be joined")
    line = _refused(_train(tmp_path / "run", [], "--address", "auto"))
    assert "the only Ray on this machine is one that another gross command has started for itself" in line
    line = _refused(_train(tmp_path / "run", [], "--address", private))
    assert "that Ray was started by another gross command for itself" in line
    ended = _train(tmp_path / "run", [], "--num-cpus", "2")  # beside it
    assert ended.returncode == 0, ended.stderr
