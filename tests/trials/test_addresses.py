"""Addresses at which no cluster can be joined: the reason is named within seconds, and without a start of Ray."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from gross_ray.errors import ResourcesError
from pipelines.execution import addresses, cluster, processes
from pipelines.execution.cluster import connected
from pipelines.execution.processes import MARK, LocalNode
from pipelines.resources import Resources

SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""An empty frame of settings, with which a server of HTTP/2 begins."""


@pytest.fixture(autouse=True)
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test reach Ray, and wait for servers that never answer for a moment only."""

    def init(**options: object) -> None:
        pytest.fail(f"ray.init({options})")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(addresses, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(addresses, "local_nodes", lambda: [])


def refusal(**asked: str) -> str:
    with pytest.raises(ResourcesError) as error, connected(Resources(**asked)):  # type: ignore[arg-type]
        pass
    message = str(error.value)
    assert "\n" not in message
    return message


@contextmanager
def server(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """Serve connections one after another by `answer`; yield the address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)  # it ends `accept`
        thread.join()


def http(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def grpc(connection: socket.socket) -> None:
    assert connection.recv(1000).startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    connection.sendall(SETTINGS)


def silent(connection: socket.socket) -> None:
    while connection.recv(1000):
        pass


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (http, "it answers 'HTTP/1.1 400 Bad Request'"),
        (silent, "it does not speak Ray's protocol (gRPC)"),
        (socket.socket.close, "it does not speak Ray's protocol (gRPC)"),
    ],
)
def test_another_server_is_named(answer: Callable[[socket.socket], object], said: str, scheme: str) -> None:
    with server(answer) as place:
        address = f"{scheme}{place}"
        assert refusal(address=address) == (
            f"cannot reach the cluster at {address}: the server there is not Ray's: {said}; correct --address, or "
            "leave --address out to start Ray on this machine"
        )


def test_a_server_that_speaks_grpc_passes() -> None:
    with server(grpc) as place:
        addresses._check_speaks_grpc("127.0.0.1", int(place.rpartition(":")[2]))


def test_a_server_behind_tls_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with server(silent) as place:
        addresses._check_speaks_grpc("127.0.0.1", int(place.rpartition(":")[2]))


def test_a_host_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(place: tuple[str, int], timeout: float) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(addresses.socket, "create_connection", nobody)
    assert "cannot reach the cluster at 10.9.8.7:6379: no answer within 0.3 s; correct" in refusal(
        address="10.9.8.7:6379"
    )


def test_a_host_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(place: tuple[str, int], timeout: float) -> socket.socket:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(addresses.socket, "create_connection", unknown)
    line = refusal(address="head:6379")
    assert "at head:6379: this machine knows no host head (Name or service not known); correct" in line


@pytest.mark.parametrize("address", ["10.0.0.1", "head", ":6379", "http://10.0.0.1:8265", "10.0.0.1:port", "://a:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    line = refusal(address=address)
    assert line.startswith(f"cannot reach the cluster at {address}: an address is HOST:PORT (the port of ")


def test_the_environment_variable_is_named_where_it_gave_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head")
    line = refusal()
    assert line.endswith("; correct RAY_ADDRESS, or unset RAY_ADDRESS to start Ray on this machine")
    assert "--address" not in line
    assert refusal(address="auto") == line  # as in Ray, the variable decides
    assert "--address" in refusal(address="other")


# A cluster with a node on this machine


def test_without_any_ray_auto_is_refused() -> None:
    assert "the cluster at auto: no Ray runs on this machine (`ray start --head`" in refusal(address="auto")


def test_the_ray_of_another_command_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(grpc) as place:
        monkeypatch.setattr(addresses, "local_nodes", lambda: [LocalNode(place, private=True)])
        assert "auto: the only Ray on this machine is one that another gross command has" in refusal(address="auto")
        assert "that Ray was started by another gross command for itself" in refusal(address=place)


@pytest.mark.parametrize(("latest", "chosen"), [(None, "a:1"), ("b:2", "b:2"), ("gone:3", "a:1")])
def test_auto_is_a_cluster_that_others_may_join(
    latest: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [LocalNode("private:0", private=True), LocalNode("b:2", private=False), LocalNode("a:1", private=False)]
    monkeypatch.setattr(addresses, "local_nodes", lambda: nodes)
    monkeypatch.setattr(addresses, "read_ray_address", lambda folder: latest)
    assert addresses._found_here() == chosen


@pytest.fixture
def cluster_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of what seems to be a cluster of our versions, with a node on this machine."""
    ours = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    monkeypatch.setattr(addresses, "_client", lambda address: address)
    monkeypatch.setattr(addresses, "canonicalize_bootstrap_address", lambda address: address)
    monkeypatch.setattr(addresses, "ensure_token_if_auth_enabled", lambda **_: None)
    monkeypatch.setattr(addresses, "get_cluster_metadata", lambda client: ours)
    monkeypatch.setattr(addresses, "get_node_to_connect_for_driver", lambda client, timeout_seconds: None)
    with server(grpc) as place:
        assert addresses.checked_address(place) == place
        yield place


def test_a_ray_of_another_version_is_named(cluster_there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"ray_version": "2.1.0", "python_version": "3.8.1"}
    monkeypatch.setattr(addresses, "get_cluster_metadata", lambda client: theirs)
    assert refusal(address=cluster_there) == (
        f"the cluster at {cluster_there} runs Ray 2.1.0 with Python 3.8.1, this process Ray {ray.__version__} with "
        f"Python {platform.python_version()}: use the same versions of both"
    )


def test_a_machine_that_is_no_node_is_named(cluster_there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(client: object, timeout_seconds: int) -> None:
        raise RuntimeError("No node info found matching attributes: ''")

    monkeypatch.setattr(addresses, "get_node_to_connect_for_driver", none_here)
    line = refusal(address=cluster_there)
    assert ": this machine is not one of its nodes; run gross on one of them, or add this machine" in line
    assert f"`ray start --address={cluster_there}`" in line


def test_a_ray_on_the_loopback_address_alone_is_named(cluster_there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray joins a cluster at this machine's own address, whatever name of it was given."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound and not listening: nobody else takes it meanwhile
        elsewhere = f"127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setattr(addresses, "canonicalize_bootstrap_address", lambda address: elsewhere)
        assert f"listens on the loopback address alone, and not at {elsewhere}" in refusal(address=cluster_there)


@pytest.mark.parametrize("has_token", [True, False])
def test_a_cluster_that_asks_for_a_token_gets_the_accounts(has_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def client(address: str) -> str:
        asked.append(address)
        if len(asked) == 1:
            raise ray.exceptions.AuthenticationError("Authentication token is missing or incorrect")
        return "client"

    monkeypatch.setattr(addresses, "GcsClient", client)
    monkeypatch.setattr(addresses, "maybe_enable_token_auth_if_token_available", lambda warn_if_disabled: has_token)
    if has_token:
        assert addresses._client("a:1") == "client"
    else:
        with pytest.raises(ray.exceptions.AuthenticationError):
            addresses._client("a:1")
    assert len(asked) == 1 + has_token


@pytest.mark.parametrize("private", [True, False])
def test_nodes_are_found_by_their_processes(private: bool) -> None:
    environment = {**os.environ, **({MARK: "f00"} if private else {})}
    environment = environment if private else {name: value for name, value in environment.items() if name != MARK}
    words = ["/opt/ray/raylet", "-c", "read line", "--gcs-address=10.1.2.3:6379", "--node_id=f"]
    node = LocalNode("10.1.2.3:6379", private)
    with subprocess.Popen(words, executable="/bin/bash", env=environment, stdin=subprocess.PIPE) as process:
        try:
            while not Path(f"/proc/{process.pid}/cmdline").read_bytes():  # the program is just being started
                time.sleep(0.01)
            assert node in processes.local_nodes()
        finally:
            process.kill()
    assert node not in processes.local_nodes()


def test_an_ended_server_of_ray_is_noticed(tmp_path: Path) -> None:
    program = tmp_path / "raylet"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o755)
    process = subprocess.Popen([program])
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its status
        assert processes.dead_servers() == {str(process.pid): "raylet"}
    finally:
        process.wait()
    assert processes.dead_servers() == {}
