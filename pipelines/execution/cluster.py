"""The connection to Ray: join a cluster or start Ray on this machine, without output, and clean up afterwards."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from ray._private.authentication.authentication_token_setup import (  # noqa: E402
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined] # noqa: E402

from gross_ray.errors import ResourcesError, first_line  # noqa: E402
from gross_ray.own_code import own_folder  # noqa: E402
from gross_ray.run.tracebacks import keep_traceback  # noqa: E402
from pipelines.capacity import Capacity  # noqa: E402
from pipelines.execution import machine, signals  # noqa: E402
from pipelines.execution.addresses import NotJoinedError, checked_address  # noqa: E402
from pipelines.execution.autoscaler import autoscaling_config, may_come  # noqa: E402
from pipelines.execution.processes import MARK, end_orphans  # noqa: E402
from pipelines.execution.starting import StartFailedError, watched  # noqa: E402
from pipelines.execution.versions import PACKAGES  # noqa: E402
from pipelines.nodes import NodeKind  # noqa: E402
from pipelines.resources import Resources  # noqa: E402

START_SECONDS = 60.0
"""How long Ray's start on this machine may take; it takes 4 to 7 s, and several times that on a busy machine."""
HEAD_SECONDS = 120.0
"""How long a cluster may take to be joined, and its head to run a first small task, with the transfer of the code."""
_HEAD = "node:__internal_head__"
"""A resource that only a cluster's head has."""


@contextmanager
def connected(
    resources: Resources,
    own_modules: Sequence[str] = (),
    *,
    note: Callable[[str], object] = print,
    run: str | Path | None = None,
) -> Iterator[Capacity]:
    """Connect to Ray while the block runs; a running cluster gets the code of gross_ray and `own_modules`.

    `note` shows a line about what is unusual on this machine; `run` is the run folder for unexpected errors. Raises
    ResourcesError if the cluster cannot be reached, or can never have the requested resources, and if Ray cannot start
    on this machine.
    """
    started_here = not ray.is_initialized()
    mark, began = uuid.uuid4().hex, datetime.now()
    try:
        if started_here:
            with _environment(MARK, mark):
                _connect(resources, own_modules, note, run)
        alone = started_here and resources.joined_address is None
        capacity = _describe(resources, None if alone else _autoscaling_config())
        yield replace(capacity, private=alone)
    finally:
        if started_here:
            ray.shutdown()
            end_orphans(mark, None if resources.joined_address else began)


def put(value: Any) -> ray.ObjectRef:
    """Put a value into Ray's object store."""
    return ray.put(value)


def this_node() -> str:
    """Return Ray's id of this machine's node."""
    return str(ray.get_runtime_context().get_node_id())


def _connect(
    resources: Resources, own_modules: Sequence[str], note: Callable[[str], object], run: str | Path | None
) -> None:
    address = resources.joined_address
    logs = ""
    try:
        with _without_logs():
            if address is None:
                cores = resources.num_cpus or os.cpu_count() or 1
                machine.check_limits(cores)
                place = machine.place()
                logs = place.logs
                for line in place.notes:
                    note(line)
                _start(cores, place)
            else:
                with watched(HEAD_SECONDS):
                    ray.init(address=checked_address(address), runtime_env=_runtime_env(own_modules), **_QUIET)
    except (KeyboardInterrupt, SystemExit, StartFailedError) as error:
        signals.start_interrupted()
        signal.alarm(0)  # set by Ray's SIGTERM handler (absl's): it would abort this process three seconds later
        if isinstance(error, SystemExit):  # raised by Ray's own SIGTERM handler
            raise signals.terminated() from None
        if isinstance(error, StartFailedError):
            raise _not_connected(resources, str(error), logs) from None
        raise
    except ResourcesError:
        raise
    except Exception as error:  # whatever Ray, gRPC and the system raise
        raise _refusal(resources, error, logs, run) from None
    finally:
        signals.raise_on_signals()


_QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
"""Arguments of ray.init."""


def _start(cores: int, place: machine.Place) -> None:
    """Start Ray on this machine."""
    enable_token_auth_by_default()
    try:
        ensure_token_if_auth_enabled()
    except (OSError, RuntimeError):  # there is no home folder, or it cannot be written: a token of this process alone
        os.environ["RAY_AUTH_TOKEN"] = uuid.uuid4().hex
        AuthenticationTokenLoader.instance().reset_cache()
    with _loopback_alone(), watched(START_SECONDS):
        # With several arenas, glibc returns memory of threads to the system and has to fault it in again.
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **place.options, **_QUIET)


def _refusal(resources: Resources, error: Exception, logs: str, run: str | Path | None) -> ResourcesError:
    """Return the error to raise for one that came up as Ray was joined or started."""
    where = f"the cluster at {resources.joined_address}"
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
    if len(versions) == 2:
        (their_ray, their_python), (our_ray, our_python) = versions
        return ResourcesError(
            f"{where} runs Ray {their_ray} with Python {their_python}, this process Ray {our_ray} with "
            f"Python {our_python}: use the same versions of both"
        )
    if isinstance(error, ray.exceptions.AuthenticationError):
        return ResourcesError(
            f"{where} refuses this process: {error.message}; put its token into ~/.ray/auth_token (docs/cluster.md)"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not isinstance(error, NotJoinedError | OSError):
        reason = f"{first_line(error)}; {keep_traceback(traceback.format_exc(), run)}"
    return _not_connected(resources, reason, logs)


def _not_connected(resources: Resources, reason: str, logs: str) -> ResourcesError:
    address, option = resources.joined_address, resources.address_option
    if address is None:
        return ResourcesError(
            f"Ray does not start on this machine: {reason}; its logs are in {logs}; {machine.IN_PROCESS}"
        )
    leave = "leave --address out" if option == "--address" else f"unset {option}"
    return ResourcesError(
        f"cannot reach the cluster at {address}: {reason}; correct {option}, or {leave} to start Ray on this machine"
    )


@contextmanager
def _without_logs() -> Iterator[None]:
    """Silence the logs while Ray starts or is joined: an error is raised too, and becomes one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


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


def _autoscaling_config() -> dict[str, Any] | None:
    """Return the configuration of the cluster's autoscaler, read by a task on the head; None without an autoscaler."""
    read = ray.remote(num_cpus=0, resources={_HEAD: 0.001})(autoscaling_config)
    try:
        return ray.get(read.remote(ray.get_runtime_context().gcs_address), timeout=HEAD_SECONDS)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ResourcesError(
            f"the cluster's head cannot run gross_ray's code: {reason}; look at `ray status`"
        ) from None


def _describe(resources: Resources, config: dict[str, Any] | None) -> Capacity:
    """Return the capacity of the running nodes and of those that an autoscaler of this configuration may add."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shapes = Counter(map(_shape, alive))
    running = [NodeKind(*shape, count) for shape, count in shapes.items()]
    head = next((NodeKind(*_shape(has)) for has in alive if _HEAD in has), None)
    coming = may_come(config, running, head) if config is not None else []
    device = resources.device
    if device == "auto":
        device = "cuda" if any(node.num_gpus for node in running + coming) else "cpu"
    asked = resources.gpus_per_unit if device == "cuda" else 0.0
    fitting = [node for node in running + coming if node.num_cpus >= 1 and node.num_gpus >= asked]
    if not fitting:
        raise ResourcesError(_what_is_missing(asked, running, coming if config is not None else None))
    return Capacity(nodes=tuple(fitting), device=device, gpus_per_unit=asked, autoscales=config is not None)


def _shape(has: dict[str, float]) -> tuple[int, float]:
    return int(has.get("CPU", 0)), float(has.get("GPU", 0))


def _what_is_missing(asked: float, running: list[NodeKind], coming: list[NodeKind] | None) -> str:
    unit, remedy = "1 CPU core", "start a node with cores"
    if asked:
        unit += f" and {asked:g} GPU on one node"
        remedy = "use --device cpu, lower --gpus-per-unit, or add nodes with that many GPUs"
    added = "no autoscaler on its head"
    if coming is not None:
        added = f"an autoscaler that may add {', '.join(map(str, coming)) or 'no node more'}"
    return f"a unit of work asks for {unit}; the cluster has {', '.join(map(str, running))}, and {added}: {remedy}"
