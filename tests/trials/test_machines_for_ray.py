"""Machines on which Ray would not start, or would try for minutes: what they lack is named before, or made up for."""

from __future__ import annotations

import os
import resource
import socket
import threading
from pathlib import Path

import pytest

from gross_ray.errors import ResourcesError
from pipelines.execution import machine

MOST = {"RLIMIT_NOFILE": resource.RLIMIT_NOFILE, "RLIMIT_NPROC": resource.RLIMIT_NPROC}
_CONTROL_GROUPS = machine._control_groups


@pytest.fixture(autouse=True)
def as_usual(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Be a user whom nothing limits, with no folders named in the environment."""
    _limit(monkeypatch)
    monkeypatch.setattr(machine, "_control_groups", lambda: [])
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


def _limit(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    named = {MOST[name]: limit for name, limit in limits.items()}
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (named.get(which, -1), named.get(which, -1)))


def _one_line(error: pytest.ExceptionInfo[ResourcesError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert "use --in-process, which needs no Ray" in message
    assert "--address" not in message
    return message


# Limits


def test_a_machine_without_limits_is_taken() -> None:
    machine.check_limits(64)


def test_too_few_open_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _limit(monkeypatch, RLIMIT_NOFILE=100)
    with pytest.raises(ResourcesError, match=r"this process may have 100: raise the limit \(ulimit -Hn \d+") as error:
        machine.check_limits(2)
    _one_line(error)
    _limit(monkeypatch, RLIMIT_NOFILE=65536)
    machine.check_limits(2)


def test_too_few_processes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_threads_of_user", lambda: 300)
    _limit(monkeypatch, RLIMIT_NPROC=310)
    with pytest.raises(ResourcesError, match=r"the user's limit of 310 \(ulimit -u\) leaves 10: raise it") as error:
        machine.check_limits(2)
    _one_line(error)
    _limit(monkeypatch, RLIMIT_NPROC=10_300)
    machine.check_limits(2)
    with pytest.raises(ResourcesError, match="leaves 10000: .*give fewer --num-cpus"):
        machine.check_limits(1000)


def test_root_has_no_limit_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    _limit(monkeypatch, RLIMIT_NPROC=1)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    machine.check_limits(2)


def test_a_containers_limit_of_processes_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pids.max").write_text("max\n")
    (tmp_path / "pids.current").write_text("90\n")
    monkeypatch.setattr(machine, "_control_groups", lambda: [tmp_path, tmp_path / "none"])
    machine.check_limits(2)
    (tmp_path / "pids.max").write_text("100\n")
    with pytest.raises(ResourcesError, match=r"the container's limit of 100 \(.*/pids.max\) leaves 10") as error:
        machine.check_limits(2)
    assert "docker run --pids-limit" in _one_line(error)


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ("0::/\n", [""]),
        ("0::/user.slice/a.scope\n", ["user.slice/a.scope", "user.slice", ""]),
        ("12:cpu,cpuacct:/a\n3:pids:/docker/b\n", ["pids/docker/b", "pids/docker", "pids"]),
    ],
)
def test_control_groups_of_both_versions_are_found(groups: str, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(groups)
    assert _CONTROL_GROUPS(tmp_path / "cgroup", tmp_path) == [tmp_path / name for name in found]
    assert _CONTROL_GROUPS(tmp_path / "none", tmp_path) == []


def test_threads_count_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real user
    over, before = threading.Event(), machine._threads_of_user()
    threads = [threading.Thread(target=over.wait) for _ in range(200)]
    for thread in threads:
        thread.start()
    try:
        assert machine._threads_of_user() >= before + 100  # others of this user may have ended meanwhile
    finally:
        over.set()
        for thread in threads:
            thread.join()


# Folders


def test_a_usual_machine_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", Path("/tmp"))
    assert machine.place() == machine.Place({"_temp_dir": "/tmp/ray"})


def test_the_longest_path_is_the_one_that_the_kernel_takes() -> None:
    longest = machine.PATH_BYTES - len(str(os.getpid()))
    for length, fits in ((longest, True), (longest + 1, False)):
        folder = Path("/tmp", f"{os.getpid()}".ljust(length - len("/tmp/"), "x"))
        assert len(str(folder)) == length
        session = folder / "ray" / f"session_2026-12-01_00-00-00_000000_{os.getpid()}" / "sockets"
        session.mkdir(parents=True)
        try:
            assert (machine._unfit(str(folder)) is None) == fits
            with socket.socket(socket.AF_UNIX) as bound:
                if fits:
                    bound.bind(str(session / "plasma_store"))
                else:
                    with pytest.raises(OSError, match="too long"):
                        bound.bind(str(session / "plasma_store"))
        finally:
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()


@pytest.mark.parametrize("kind", ["long", "with a space", "ümlaut", "missing", "relative"])
@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_another_folder_is_taken_and_reported(
    kind: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tmp_path / (90 * "x" if kind == "long" else kind)
    if kind != "missing":
        wanted.mkdir()
    named = os.path.relpath(wanted) if kind == "relative" else str(wanted)
    monkeypatch.setenv(variable, named)
    monkeypatch.setattr(machine, "SHARED_MEMORY", Path("/tmp"))
    place = machine.place()
    assert place.options == {"_temp_dir": "/tmp/ray"}
    (note,) = place.notes
    assert note.startswith(f"Ray's temporary files are in /tmp/ray: {named} ")


def test_another_users_folder_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/tmp/ray" and allowed(path, mode))
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/tmp/ray")
    monkeypatch.setattr(machine, "SHARED_MEMORY", Path("/tmp"))
    assert machine.place().options == {"_temp_dir": "/tmp/ray-1000"}


@pytest.mark.parametrize("kind", ["missing", "read-only"])
def test_without_shared_memory_the_objects_are_on_disk(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shm"
    if kind == "read-only":
        shared.mkdir()
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != str(shared) and allowed(path, mode))
    monkeypatch.setattr(machine, "SHARED_MEMORY", shared)
    place = machine.place()
    assert place.options["_temp_dir"] == "/tmp/ray" and place.options["_plasma_directory"] == "/tmp"
    assert 75 * 2**20 <= place.options["object_store_memory"] <= machine.OBJECT_STORE_BYTES
    why = "is not there" if kind == "missing" else "cannot be written"
    assert place.notes == (f"Ray's objects are in /tmp: the shared memory {shared} {why}",)


def test_full_disks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_room", lambda folder: 3 * 2**20)
    with pytest.raises(ResourcesError) as error:
        machine.place()
    message = _one_line(error)
    assert "/tmp has room for 3 MiB, and Ray needs 100" in message
    assert "set RAY_TMPDIR to another one" in message
