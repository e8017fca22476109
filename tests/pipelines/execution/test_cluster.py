"""What is asked of Ray: refused where it makes no sense, counted, and left as it was found."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from faults import MARK, assert_nothing_left, marked

from gross_ray.errors import InvalidValueError, ResourcesError
from pipelines.execution import cluster, processes, signals
from pipelines.execution.cluster import connected
from pipelines.resources import Resources

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture(autouse=True)
def no_address_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": "tpu"}, "device = 'tpu': must be one of auto, cpu, cuda"),
        ({"num_cpus": 0}, "num_cpus = 0: must be 1 or more"),
        ({"gpus_per_unit": 0.0}, r"gpus_per_unit = 0\.0: must be above 0"),
        ({"gpus_per_unit": -1.0}, r"gpus_per_unit = -1\.0: must be above 0"),
        ({"gpus_per_unit": 1.5}, r"gpus_per_unit = 1\.5: must be a whole number above 1"),
        ({"num_cpus": 2, "address": "10.0.0.1:6379"}, r"num_cpus = 2 with the running cluster 10\.0\.0\.1:6379"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        Resources(**asked)


def test_cores_are_refused_with_the_cluster_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert Resources().joined_address == "10.0.0.2:6379"
    assert Resources(address="10.0.0.1:6379").joined_address == "10.0.0.1:6379"
    with pytest.raises(InvalidValueError, match=r"num_cpus = 3 with the running cluster 10\.0\.0\.2:6379"):
        Resources(num_cpus=3)


def test_ray_is_joined_or_started_and_left_as_it_was_found() -> None:
    import ray

    with connected(Resources(num_cpus=1)) as started:
        num_gpus = ray.cluster_resources().get("GPU", 0)
        assert (started.num_cpus, started.num_gpus, started.cores_per_node) == (1, num_gpus, 1)
        assert started.device == ("cuda" if num_gpus else "cpu")
        asked = num_gpus + 3
        with (
            pytest.raises(
                ResourcesError, match=f"asks for 1 CPU core and {asked:g} GPU on one node; the cluster has 1 "
            ),
            connected(Resources(device="cuda", gpus_per_unit=asked)),
        ):
            pass
        assert ray.is_initialized()
        with connected(Resources(device="cpu")) as joined:
            assert joined.device == "cpu"
        assert ray.is_initialized()
    assert not ray.is_initialized()


def test_ray_starts_where_it_was_imported_before() -> None:
    program = (
        "import ray\nfrom pipelines.execution.cluster import *\n"
        "with connected(Resources(num_cpus=1)) as there: print(there.num_cpus)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "1\n"


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_where_nothing_listens_is_one_line(address: str) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound and not listening: nobody else takes it meanwhile
        address = address.format(port=bound.getsockname()[1])
        with pytest.raises(ResourcesError) as refused, connected(Resources(address=address)):
            pass
    message = str(refused.value)
    assert message.startswith(f"cannot reach the cluster at {address}: ")
    assert "Connection refused" in message
    assert "\n" not in message


def test_other_versions_of_ray_or_python_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import check_version_info

    def refused(**_: object) -> None:
        check_version_info({"ray_version": "2.1.0", "python_version": "3.8.1"}, "node 10.0.0.1:6379")

    monkeypatch.setattr(cluster, "checked_address", lambda address: address)
    monkeypatch.setattr(cluster.ray, "init", refused)
    with pytest.raises(ResourcesError) as error, connected(Resources(address="auto")):
        pass
    import ray

    ours = f"Ray {ray.__version__} with Python {platform.python_version()}"
    assert str(error.value) == (
        f"the cluster at auto runs Ray 2.1.0 with Python 3.8.1, this process {ours}: use the same versions of both"
    )


LISTENS = """
import ray
from pipelines.execution.cluster import Resources, connected
with connected(Resources(num_cpus=1)):
    @ray.remote
    class Actor:
        def up(self): return True
    actor = Actor.remote()
    ray.get(actor.up.remote())
    print("up", flush=True)
    input()
"""


def _listening(pids: list[int]) -> set[str]:
    """Return the addresses, in the kernel's hexadecimal, on which processes wait for connections."""
    addresses: dict[str, str] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":  # listening
                addresses[f"socket:[{words[9]}]"] = words[1].split(":")[0]
    found = set()
    for pid in pids:
        with suppress(OSError):  # it has just ended
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):  # closed meanwhile
                    found.add(addresses.get(os.readlink(f"/proc/{pid}/fd/{descriptor}")))
    return {address for address in found if address is not None}


def test_nothing_listens_beyond_loopback() -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENS],
        cwd=ROOT,
        env=os.environ | {MARK: mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        addresses = _listening([pid for pid, _ in marked(mark)])
        assert addresses, "nothing listens at all: this tests nothing"
        loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
        assert addresses <= loopback
    finally:
        process.communicate("\n", timeout=600)
    assert_nothing_left(mark)


def test_what_an_orphan_starts_while_it_is_ended_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeping(mark: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "600"], env=os.environ | {"GROSS_RAY_STARTED": mark})

    first, late, another = sleeping("mine"), sleeping("mine"), sleeping("another's")
    try:
        seen = iter([[first.pid, another.pid], [], [late.pid, another.pid]])
        monkeypatch.setattr(processes, "processes", lambda: list(map(str, next(seen, [another.pid]))))
        processes.end_orphans("mine", None)
        assert first.wait(300) == late.wait(300) == -signal.SIGKILL
        assert another.poll() is None
    finally:
        for one in (first, late, another):
            one.kill()
            one.wait()


def test_an_agent_that_has_written_its_title_over_the_mark_is_ended(tmp_path: Path) -> None:
    def agent(title: str, session: str) -> subprocess.Popen[bytes]:
        logs = tmp_path / session / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "agent.out").open("w") as out:
            return subprocess.Popen([title, "600"], executable=shutil.which("sleep"), stdout=out)

    ours, other, earlier = (
        f"session_2026-11-28_10-56-{second}_333465_{process}"
        for second, process in ((51, os.getpid()), (51, os.getppid()), (50, os.getpid()))
    )
    orphan, *others = (
        agent(*each) for each in (("ray::A", ours), ("ray::A", other), ("ray::A", earlier), ("tail", ours))
    )
    try:
        processes.end_orphans("no such mark", None)
        assert orphan.poll() is None, "of a cluster that was joined"
        processes.end_orphans("no such mark", datetime(2026, 11, 28, 10, 56, 51))
        assert orphan.wait(300) == -signal.SIGKILL
        assert [one.poll() for one in others] == [None] * 3
    finally:
        for one in (orphan, *others):
            one.kill()
            one.wait()


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
def test_rays_alarm_does_not_abort_the_closing(ends: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a SIGTERM while Ray starts, its own handler asks for a SIGALRM three seconds later."""

    def init(**_: Any) -> None:
        signal.alarm(100)
        raise ends

    monkeypatch.setattr(cluster.ray, "init", init)
    try:
        with pytest.raises(KeyboardInterrupt), connected(Resources(num_cpus=1, device="cpu")):
            pass
    finally:
        left = signal.alarm(0)
        half_started, signals._half_started = signals._half_started, False
    assert left == 0 and half_started
