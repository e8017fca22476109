"""The address of the cluster to join, checked before Ray tries it: Ray itself would try for minutes, or without end."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import canonicalize_bootstrap_address, get_node_to_connect_for_driver
from ray._private.utils import check_version_info, read_ray_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RpcError

from gross_ray.errors import first_line
from pipelines.execution.processes import local_nodes

ANSWER_SECONDS = 5.0
"""How long a server at an address may take to answer."""
NODE_SECONDS = 10
"""How long a node of the cluster, on this machine, may take to be known to the cluster."""
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a client of HTTP/2, the protocol below gRPC, opens a connection: the preface and an empty frame of settings."""
_SETTINGS = 4
"""Type of the frame with which a server of HTTP/2 opens a connection."""


class NotJoinedError(Exception):
    """No cluster can be joined at an address; the message is the reason."""


def checked_address(address: str) -> str:
    """Return the address of a cluster that answers; for "auto" that of a cluster with a node on this machine.

    Raises NotJoinedError, OSError, ray's AuthenticationError and RpcError, and RuntimeError for other versions.
    """
    if address == "auto":
        address = _found_here()
    scheme, separator, place = address.rpartition("://")
    host, colon, port = place.rpartition(":")
    if not colon or not host or not port.isdecimal() or scheme != ("ray" if separator else ""):
        raise NotJoinedError("an address is HOST:PORT (the port of `ray start --head --port`, 6379), or auto")
    _check_speaks_grpc(host.strip("[]"), int(port))
    if not separator:
        _check_cluster(address)
    return address


def _found_here() -> str:
    """Return the address of the cluster that `ray start` joined last on this machine, else of any with a node here."""
    nodes = local_nodes()
    shared = sorted({node.address for node in nodes if not node.private})
    if not shared and nodes:
        raise NotJoinedError(
            "the only Ray on this machine is one that another gross command has started for itself and ends with it"
        )
    if not shared:
        raise NotJoinedError("no Ray runs on this machine (`ray start --head` starts one)")
    latest = read_ray_address(None)
    return latest if latest in shared else shared[0]


def _check_speaks_grpc(host: str, port: int) -> None:
    """Raise OSError if nothing answers, and NotJoinedError if the server cannot be Ray's."""
    try:
        connection = socket.create_connection((host, port), timeout=ANSWER_SECONDS)
    except socket.gaierror as error:
        raise NotJoinedError(f"this machine knows no host {host} ({error.strerror})") from None
    except TimeoutError:
        raise NotJoinedError(f"no answer within {ANSWER_SECONDS:g} s") from None
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        connection.close()
        return
    answer = b""
    with connection, suppress(OSError):  # a server that speaks something else may wait, or end the connection
        connection.sendall(_HELLO)
        while len(answer) < 4 and (more := connection.recv(64)):
            answer += more
    if len(answer) < 4 or answer[3] != _SETTINGS:
        said = answer.decode(errors="replace").splitlines()
        spoken = f"it answers {said[0]!r}" if said else "it does not speak Ray's protocol (gRPC)"
        raise NotJoinedError(f"the server there is not Ray's: {spoken}")


def _check_cluster(address: str) -> None:
    """Raise an error unless a cluster of these versions is there, and this machine is one of its nodes."""
    reached = str(canonicalize_bootstrap_address(address))  # Ray takes this machine's own address for localhost
    host, _, port = reached.rpartition(":")
    names = {address, reached} if reached == address else {address, reached, f"127.0.0.1:{port}"}
    if any(node.private for node in local_nodes() if node.address in names):
        raise NotJoinedError("that Ray was started by another gross command for itself, and ends with it")
    if reached != address:
        try:
            _check_speaks_grpc(host.strip("[]"), int(port))
        except OSError:
            raise NotJoinedError(f"that Ray listens on the loopback address alone, and not at {reached}") from None
    ensure_token_if_auth_enabled(create_token_if_missing=False)
    client = _client(reached)
    check_version_info(get_cluster_metadata(client), "the driver")
    try:
        get_node_to_connect_for_driver(client, timeout_seconds=NODE_SECONDS)
    except RuntimeError:
        raise NotJoinedError(
            "this machine is not one of its nodes; run gross on one of them, or add this machine to it with "
            f"`ray start --address={address}`"
        ) from None


def _client(address: str) -> GcsClient:
    """Return a client of the cluster's head, with this account's token if the cluster asks for one."""
    with _without_stderr():  # Ray's C++ code prints a line about a missing token
        try:
            return GcsClient(address=address)
        except AuthenticationError:
            if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
                raise
            return GcsClient(address=address)
        except RpcError as error:
            raise NotJoinedError(f"no Ray cluster answers there ({first_line(error)})") from None


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what any code of this process prints on stderr while the block runs."""
    sys.stderr.flush()
    before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)
