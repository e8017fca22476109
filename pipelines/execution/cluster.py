"""Ray: joined at an address or started on this machine, quietly, and left as it was found."""

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
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before Ray is imported: no usage statistics, no boxes from Tune, its token authentication explicitly on.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
if "ray" not in sys.modules:  # set later, its server would ask for the token and this process not send it
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
"""How long a cluster's head may take to run a first small task, the code's way there included."""
ORPHAN_SECONDS = 10.0
"""How long what is left of a Ray that was started here is looked for and ended."""
_MARK = "GROSS_RAY_STARTED"
_SESSION_TIME = "%Y-%m-%d_%H-%M-%S_%f"  # Ray's own, of the local time
"""Environment variable of all processes of a Ray that is started here."""


@contextmanager
def connected(resources: Resources, own_modules: Sequence[str] = ()) -> Iterator[Capacity]:
    """Connect to Ray while the block runs; to a running cluster the code of gross_ray travels along, and `own_modules`.

    Raises ResourcesError if the cluster cannot be reached, or will never have what is asked for.
    """
    started_here = not ray.is_initialized()
    mark, began = uuid.uuid4().hex, datetime.now()
    try:
        if started_here:
            with _environment(_MARK, mark):
                _connect(resources, own_modules)
        alone = started_here and resources.joined_address is None
        yield _describe(resources, None if alone else _autoscaling_config())
    finally:
        if started_here:
            ray.shutdown()
            _end_orphans(mark, None if resources.joined_address else began)


def put(value: Any) -> ray.ObjectRef:
    """Lay a value out in Ray's object store."""
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
                # Of a thread that is not the main one, glibc's arena gives memory back and faults it in again.
                os.environ.setdefault("MALLOC_ARENA_MAX", "1")
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
    except (KeyboardInterrupt, SystemExit) as error:
        signals.start_interrupted()
        signal.alarm(0)  # of Ray's handler of SIGTERM (absl's): this process would be aborted three seconds later
        if isinstance(error, SystemExit):  # Ray's own answer
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
    """Let Ray start on 127.0.0.1: by itself it listens on all of this machine's addresses.

    It has this for machines other than Linux, read as it is imported, here and in the processes that it starts.
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
    """Set a variable for the processes that the block starts."""
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
    """End what is left of a Ray that was started here: agents outlive a node that is ended while it starts them.

    `began` is when that was; None where a running one was joined, which this process may have started, too. A node that
    is looked at after its agents' places may start them meanwhile, so that one look is not enough.
    """
    calm, deadline = 0, time.monotonic() + ORPHAN_SECONDS
    while calm < 2 and time.monotonic() < deadline:
        found = [process for process in map(int, _processes()) if _is_ours(process, mark, began)]
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        calm = 0 if found else calm + 1
        time.sleep(0.05)


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdecimal()] if os.path.isdir("/proc") else []


def _is_marked(process: int, mark: str) -> bool:
    try:
        return f"{_MARK}={mark}".encode() in Path(f"/proc/{process}/environ").read_bytes()
    except OSError:  # another user's, or gone
        return False


def _is_ours(process: int, mark: str, began: datetime | None) -> bool:
    return _is_marked(process, mark) or (began is not None and _logs_here(process, began))


def _logs_here(process: int, began: datetime) -> bool:
    """Return whether a process is one of Ray's, with a log open of a session that this process started after `began`.

    Sessions are named after the time and the process that started them. Ray's agents write their titles over their
    environment, and the mark with it.
    """
    session = re.compile(rf"/session_([^/]*)_{os.getpid()}/")
    try:
        if not Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::"):
            return False
        descriptors = os.listdir(f"/proc/{process}/fd")
    except OSError:  # another user's, or gone
        return False
    for descriptor in descriptors:
        with suppress(OSError):  # closed meanwhile
            found = session.search(os.readlink(f"/proc/{process}/fd/{descriptor}"))
            if found and found.group(1) >= began.strftime(_SESSION_TIME):
                return True
    return False


def module_of(model: str) -> str | None:
    """Return the folder or file of the package that a model package.module:factory is in; None for a built-in one.

    None too for one that is installed: on a cluster it is installed there as well.
    """
    if ":" not in model:
        return None
    if (folder := own_folder(model.partition(":")[0])) is not None:  # a folder called like our package
        return str(folder)
    spec = find_spec(model.partition(":")[0].partition(".")[0])
    if spec is None or spec.origin is None or "site-packages" in Path(spec.origin).parts:
        return None
    file = Path(spec.origin)
    return str(file.parent if file.name == "__init__.py" else file)


def _runtime_env(own_modules: Sequence[str]) -> dict[str, Any]:
    """Return what workers of a running cluster need: this code, whatever is installed there, and the user's."""
    return {
        "py_modules": [*(str(package) for package in PACKAGES), *own_modules],
        "excludes": ["__pycache__"],
        "env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"]},
    }


def _check_listening(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT: Ray itself would knock for many minutes."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _autoscaling_config() -> dict[str, Any] | None:
    """Return what the cluster's autoscaler was configured with, None if it has none, through a task on the head."""
    read = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(autoscaling_config)
    try:
        return ray.get(read.remote(ray.get_runtime_context().gcs_address), timeout=HEAD_SECONDS)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ResourcesError(
            f"the cluster's head cannot run gross_ray's code: {reason}; look at `ray status`"
        ) from None


def _describe(resources: Resources, config: dict[str, Any] | None) -> Capacity:
    """Count what is there and what may come; `config` is the autoscaler's."""
    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    shapes = Counter((int(has.get("CPU", 0)), float(has.get("GPU", 0))) for has in alive)
    there = [NodeKind(*shape, count) for shape, count in shapes.items()]
    coming = may_come(config, there) if config is not None else []
    device = resources.device
    if device == "auto":
        device = "cuda" if any(node.num_gpus for node in there + coming) else "cpu"
    asked = resources.gpus_per_unit if device == "cuda" else 0.0
    fitting = [node for node in there + coming if node.num_cpus >= 1 and node.num_gpus >= asked]
    if not fitting:
        raise ResourcesError(_what_is_missing(asked, there, coming if config is not None else None))
    return Capacity(nodes=tuple(fitting), device=device, gpus_per_unit=asked, autoscales=config is not None)


def _what_is_missing(asked: float, there: list[NodeKind], coming: list[NodeKind] | None) -> str:
    unit, remedy = "1 CPU core", "start a node with cores"
    if asked:
        unit += f" and {asked:g} GPU on one node"
        remedy = "use --device cpu, lower --gpus-per-unit, or add nodes with that many GPUs"
    added = "no autoscaler on its head"
    if coming is not None:
        added = f"an autoscaler that may add {', '.join(map(str, coming)) or 'no node more'}"
    return f"a unit of work asks for {unit}; the cluster has {', '.join(map(str, there))}, and {added}: {remedy}"
