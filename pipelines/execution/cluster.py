"""The connection to Ray: join a cluster or start Ray on this machine, without output, and clean up afterwards."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# These must be set before Ray is imported: no usage statistics, no tables from Tune, token authentication on.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
if "ray" not in sys.modules:  # set later, the server would ask for a token that this process does not send
    os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_SYNCER", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray  # noqa: E402
from ray._private import ray_constants  # noqa: E402

from gross_ray.errors import ResourcesError  # noqa: E402
from gross_ray.own_code import own_folder  # noqa: E402
from pipelines.capacity import Capacity  # noqa: E402
from pipelines.execution import signals  # noqa: E402
from pipelines.execution.autoscaler import autoscaling_config, may_come  # noqa: E402
from pipelines.execution.versions import PACKAGES  # noqa: E402
from pipelines.nodes import NodeKind  # noqa: E402
from pipelines.resources import Resources  # noqa: E402

CONNECT_SECONDS = 10.0
"""How long a named cluster may take to answer."""
HEAD_SECONDS = 120.0
"""How long a cluster's head may take to run a first small task, including the transfer of the code."""
ORPHAN_SECONDS = 10.0
"""How long to search for and end remaining processes of a Ray that was started here."""
_MARK = "GROSS_RAY_STARTED"
"""Environment variable of all processes of a Ray that is started here."""
_SESSION_TIME = "%Y-%m-%d_%H-%M-%S_%f"
"""Format of the local time in the names of Ray's sessions."""


@contextmanager
def connected(resources: Resources, own_modules: Sequence[str] = ()) -> Iterator[Capacity]:
    """Connect to Ray while the block runs; a running cluster gets the code of gross_ray and `own_modules`.

    Raises ResourcesError if the cluster cannot be reached, or can never have the requested resources.
    """
    started_here = not ray.is_initialized()
    mark, began = uuid.uuid4().hex, datetime.now()
    try:
        if started_here:
            with _environment(_MARK, mark):
                _connect(resources, own_modules)
        alone = started_here and resources.joined_address is None
        capacity = _describe(resources, None if alone else _autoscaling_config())
        yield replace(capacity, private=alone)
    finally:
        if started_here:
            ray.shutdown()
            _end_orphans(mark, None if resources.joined_address else began)


def put(value: Any) -> ray.ObjectRef:
    """Put a value into Ray's object store."""
    return ray.put(value)


def _connect(resources: Resources, own_modules: Sequence[str]) -> None:
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    address = resources.joined_address
    try:
        if address is not None:
            _check_listening(address)
            ray.init(address=address, runtime_env=_runtime_env(own_modules), **quiet)
        else:
            cores = resources.num_cpus or os.cpu_count() or 1
            with _loopback_alone():
                # With several arenas, glibc returns memory of threads to the system and has to fault it in again.
                os.environ.setdefault("MALLOC_ARENA_MAX", "1")
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
    except (KeyboardInterrupt, SystemExit) as error:
        signals.start_interrupted()
        signal.alarm(0)  # set by Ray's SIGTERM handler (absl's): it would abort this process three seconds later
        if isinstance(error, SystemExit):  # raised by Ray's own SIGTERM handler
            raise signals.terminated() from None
        raise
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = f"the cluster at {address}" if address else "Ray on this machine"
        versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
        if len(versions) == 2:
            (their_ray, their_python), (our_ray, our_python) = versions
            raise ResourcesError(
                f"{where} runs Ray {their_ray} with Python {their_python}, this process Ray {our_ray} with "
                f"Python {our_python}: use the same versions of both"
            ) from None
        reason = str(error).splitlines()[0]
        if isinstance(error, ray.exceptions.AuthenticationError):
            raise ResourcesError(
                f"{where} refuses this process: {reason}; put its token into ~/.ray/auth_token (docs/cluster.md)"
            ) from None
        raise ResourcesError(f"cannot reach {where}: {reason}; check --address and that it runs") from None
    finally:
        signals.raise_on_signals()


@contextmanager
def _loopback_alone() -> Iterator[None]:
    """Let Ray listen on 127.0.0.1 only, instead of on all addresses of this machine.

    Ray has this setting for systems other than Linux, and reads it on import, here and in the processes that it starts.
    """
    was_on = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0"):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was_on


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable while the block runs, for the processes that it starts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _end_orphans(mark: str, began: datetime | None) -> None:
    """End remaining processes of a Ray that was started here: agents survive a node that is ended while it starts them.

    `began` is the time of the start; None if a running cluster was joined, which this process may have started, too. A
    node may start agents while the processes are listed, so the search ends after two empty ones in a row.
    """
    num_empty, deadline = 0, time.monotonic() + ORPHAN_SECONDS
    while num_empty < 2 and time.monotonic() < deadline:
        found = [process for process in map(int, _processes()) if _is_ours(process, mark, began)]
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        num_empty = 0 if found else num_empty + 1
        time.sleep(0.05)


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdecimal()] if os.path.isdir("/proc") else []


def _is_ours(process: int, mark: str, began: datetime | None) -> bool:
    with suppress(OSError):  # another user's process, or no longer running
        if f"{_MARK}={mark}".encode() in Path(f"/proc/{process}/environ").read_bytes():
            return True
    return began is not None and _logs_here(process, began)


def _logs_here(process: int, began: datetime) -> bool:
    """Return whether a process of Ray has an open log of a session that this process started after `began`.

    A session's name has the time and the process that started it. The mark is not enough, because Ray's agents
    overwrite their environment with their titles.
    """
    session = re.compile(rf"/session_([^/]*)_{os.getpid()}/")
    try:
        if not Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::"):
            return False
        descriptors = os.listdir(f"/proc/{process}/fd")
    except OSError:  # another user's process, or no longer running
        return False
    for descriptor in descriptors:
        with suppress(OSError):  # closed meanwhile
            found = session.search(os.readlink(f"/proc/{process}/fd/{descriptor}"))
            if found and found.group(1) >= began.strftime(_SESSION_TIME):
                return True
    return False


def module_of(model: str) -> str | None:
    """Return the folder or file of the package with a model package.module:factory; None for a built-in model.

    None also for an installed package, which must be installed on a cluster as well.
    """
    if ":" not in model:
        return None
    module = model.partition(":")[0]
    if (folder := own_folder(module)) is not None:  # in a user's folder `pipelines`
        return str(folder)
    spec = find_spec(module.partition(".")[0])
    if spec is None or spec.origin is None or "site-packages" in Path(spec.origin).parts:
        return None
    file = Path(spec.origin)
    return str(file.parent if file.name == "__init__.py" else file)


def _runtime_env(own_modules: Sequence[str]) -> dict[str, Any]:
    """Return the runtime environment of a running cluster's workers: this checkout's code, and the user's modules."""
    return {
        "py_modules": [*(str(package) for package in PACKAGES), *own_modules],
        "excludes": ["__pycache__"],
        "env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"]},
    }


def _check_listening(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT: Ray itself would try for many minutes."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _autoscaling_config() -> dict[str, Any] | None:
    """Return the configuration of the cluster's autoscaler, read by a task on the head; None without an autoscaler."""
    read = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(autoscaling_config)
    try:
        return ray.get(read.remote(ray.get_runtime_context().gcs_address), timeout=HEAD_SECONDS)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ResourcesError(
            f"the cluster's head cannot run gross_ray's code: {reason}; look at `ray status`"
        ) from None


def _describe(resources: Resources, config: dict[str, Any] | None) -> Capacity:
    """Return the capacity of the running nodes and of those that an autoscaler of this configuration may add."""
    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    shapes = Counter((int(has.get("CPU", 0)), float(has.get("GPU", 0))) for has in alive)
    running = [NodeKind(*shape, count) for shape, count in shapes.items()]
    coming = may_come(config, running) if config is not None else []
    device = resources.device
    if device == "auto":
        device = "cuda" if any(node.num_gpus for node in running + coming) else "cpu"
    asked = resources.gpus_per_unit if device == "cuda" else 0.0
    fitting = [node for node in running + coming if node.num_cpus >= 1 and node.num_gpus >= asked]
    if not fitting:
        raise ResourcesError(_what_is_missing(asked, running, coming if config is not None else None))
    return Capacity(nodes=tuple(fitting), device=device, gpus_per_unit=asked, autoscales=config is not None)


def _what_is_missing(asked: float, running: list[NodeKind], coming: list[NodeKind] | None) -> str:
    unit, remedy = "1 CPU core", "start a node with cores"
    if asked:
        unit += f" and {asked:g} GPU on one node"
        remedy = "use --device cpu, lower --gpus-per-unit, or add nodes with that many GPUs"
    added = "no autoscaler on its head"
    if coming is not None:
        added = f"an autoscaler that may add {', '.join(map(str, coming)) or 'no node more'}"
    return f"a unit of work asks for {unit}; the cluster has {', '.join(map(str, running))}, and {added}: {remedy}"
