"""Opt-in (`make test-cluster`, as root): machines of their own address, killed whole; and an autoscaler.

A machine is a network namespace, joined to the other by a cable (veth), with a process namespace: killing that one's
first process kills every process of the machine at once, as a cut of its power does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import ray
from miniature import SETTINGS, assert_equal_tables, command

from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from pipelines.execution import actors
from pipelines.execution.actors import Actors
from pipelines.execution.cluster import connected
from pipelines.execution.tune import Trials
from pipelines.packing import pack_splits
from pipelines.resources import Resources
from pipelines.units import Context, Job, Unit
from pipelines.watching import StageProgress

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("no_ray")]

RAY = str(Path(sys.executable).with_name("ray"))
MACHINE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 6399
STORE = ["--object-store-memory=80000000", "--disable-usage-stats", "--block"]


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    """Skip where this may not be done, naming what is missing; have the token that all nodes of a cluster share."""
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            pytest.skip(f"no program {program!r}: install {package}")
    if os.geteuid() != 0:
        pytest.skip("namespaces need root: sudo make test-cluster")
    name = f"gross-{os.getpid()}-try"
    for words in (["ip", "netns", "add", name], ["ip", "netns", "exec", name, *MACHINE, "true"]):
        tried = subprocess.run(words, capture_output=True, text=True, check=False)
        if tried.returncode:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            pytest.skip(f"`{' '.join(words)}` is not allowed here: {tried.stderr.strip()}")
    subprocess.run(["ip", "netns", "delete", name], check=True)
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled

    ensure_token_if_auth_enabled()


@contextmanager
def _machine(words: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the first process of a machine, and kill the machine at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


def _wait_for(there: Callable[[], bool], what: str, seconds: float, logs: list[Path]) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        told = "\n".join(log.read_text()[-3000:] for log in logs)
        assert time.monotonic() < deadline, f"no {what} after {seconds:g} s:\n{told}"
        time.sleep(0.05)


# Two machines


class TwoMachines:
    """A head with one core, from which the commands are given, and another machine with one core."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.spaces = [f"gross-{os.getpid()}-{place}" for place in "ab"]
        for space in self.spaces:
            self._ip("netns", "add", space)
            stack.callback(self._ip, "netns", "delete", space)  # the cable goes with it
        ends = [f"gr{os.getpid()}{place}" for place in "ab"]
        self._ip(
            "link", "add", ends[0], "netns", self.spaces[0], "type", "veth", "peer", ends[1], "netns", self.spaces[1]
        )
        for space, end, address in zip(self.spaces, ends, ADDRESSES, strict=True):
            self._ip("-n", space, "address", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                self._ip("-n", space, "link", "set", device, "up")
        self._start(0, "--head", f"--port={PORT}", "--include-dashboard=false")
        self.other = self._start(1, f"--address={ADDRESSES[0]}:{PORT}")

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def in_space(self, place: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.spaces[place], *words]

    def _start(self, place: int, *options: str) -> subprocess.Popen[bytes]:
        log = self._folder / f"machine{place}.log"
        address = f"--node-ip-address={ADDRESSES[place]}"
        temporary = f"--temp-dir={self._folder / str(place)}" if place == 0 else "--num-gpus=0"
        words = self.in_space(place, *MACHINE, RAY, "start", address, temporary, "--num-cpus=1", *STORE, *options)
        process = self._stack.enter_context(_machine(words, log, RAY_AUTH_MODE="token"))
        _wait_for(lambda: "Ray runtime started" in log.read_text(), f"machine {place}", 60, [log])
        return process

    def run_command(self, out: Path) -> list[str]:
        longer = ["training.epochs=80" if one == "training.epochs=2" else one for one in SETTINGS]
        settings = [part for setting in longer for part in ("--set", setting)]
        address = f"{ADDRESSES[0]}:{PORT}"
        words = command("run", "--preset", "quickstart", "--out", str(out), "--address", address, "--device", "cpu")
        return self.in_space(0, *words, *settings)


@pytest.fixture
def two_machines() -> Iterator[TwoMachines]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gr", ignore_cleanup_errors=True)))
        yield TwoMachines(folder, stack)


def test_a_machine_killed_whole_in_mid_training_changes_no_table(two_machines: TwoMachines, tmp_path: Path) -> None:
    ended = subprocess.run(
        two_machines.run_command(tmp_path / "undisturbed"), capture_output=True, text=True, check=False, timeout=600
    )
    assert ended.returncode == 0, ended.stderr

    run, log = tmp_path / "run", tmp_path / "run.log"
    with log.open("w") as output:
        process = subprocess.Popen(two_machines.run_command(run), stdout=output, stderr=output)
    try:
        epochs = run / "checkpoints/train-under-way"
        both = lambda: len(list(epochs.glob("*.safetensors"))) == 2  # noqa: E731 (one on each machine)
        _wait_for(both, "epoch on both machines", 200, [log])
        os.kill(two_machines.other.pid, signal.SIGKILL)
        assert process.wait(600) == 0, log.read_text()
    finally:
        process.kill()
        process.wait(20)
    assert log.read_text().count("; trying again") == 1
    assert_equal_tables(tmp_path / "undisturbed", run)


# An autoscaler

HEAD_ID = "f" * 51 + "00000"


class Recorded(StageProgress):
    """Progress that knows which node did what."""

    def __init__(self) -> None:
        super().__init__("test", 0, 0)
        self.nodes: dict[str, str] = {}

    def unit_done(self, unit: str, text: str) -> None:
        self.nodes[unit] = text


@dataclass(frozen=True, kw_only=True)
class Nap(Unit):
    label: str
    seconds: float

    @property
    def name(self) -> str:
        return self.label


def sleep(context: Context, unit: Nap) -> str:
    time.sleep(unit.seconds)
    return ray.get_runtime_context().get_node_id()


@pytest.fixture
def autoscaled(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a head without cores, whose autoscaler has 0 to 2 nodes with a core and a GPU (only told)."""
    ray.cloudpickle.register_pickle_by_value(request.module)
    address = ray.util.get_node_ip_address()
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    provider = {
        "type": "fake_multinode",
        "head_node_id": HEAD_ID,
        "gcs_address": f"{address}:{port}",
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    gpu = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80_000_000}, "node_config": {}}
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config: dict[str, Any] = {
        "cluster_name": "test",
        "max_workers": 2,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 0.1,
        "provider": provider,
        "auth": {"ssh_user": "nobody"},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": gpu | {"min_workers": 0, "max_workers": 2},
        },
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **dict.fromkeys(("cluster_synced_files", "rsync_exclude", "rsync_filter"), []),
        **{f"{name}_commands": [] for name in lists},
    }
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_AUTH_MODE": "token" if is_token_auth_enabled() else "disabled",  # as Ray in this process
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gr", ignore_cleanup_errors=True)))
        file, log = folder / "autoscaler.yaml", folder / "head.log"
        file.write_text(json.dumps(config))  # JSON is YAML
        head = ["--head", f"--port={port}", f"--node-ip-address={address}", "--num-cpus=0", "--include-dashboard=false"]
        words = [*MACHINE, RAY, "start", *head, f"--autoscaling-config={file}", f"--temp-dir={folder / 'ray'}", *STORE]
        stack.enter_context(_machine(words, log, **environment))
        _wait_for(lambda: "Ray runtime started" in log.read_text(), "head", 60, [log])
        yield f"{address}:{port}"
    ray.cloudpickle.unregister_pickle_by_value(request.module)


def _job(units: list[Nap]) -> Job:
    return Job(stage="naps", units=units, work=sleep, done=set, kind="naps", num_equal=len(units))


def _gpu_nodes() -> int:
    return sum(node["Alive"] and "GPU" in node["Resources"] for node in ray.nodes())


def test_gpu_nodes_come_with_the_work_and_go_with_it(
    autoscaled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_gpu(pool: Actors) -> Any:
        """Ask for a GPU, as on cuda, and work without."""
        actor = ray.remote(num_cpus=1, num_gpus=1, concurrency_groups={"state": 1})(actors._Worker)
        return actor.remote(pool._packed, "cpu", pool._versions, pool._run)

    monkeypatch.setattr(Actors, "_start", with_gpu)
    counts: list[int] = []
    over = threading.Event()

    def count() -> None:
        while not over.wait(0.2):
            counts.append(_gpu_nodes())

    with connected(Resources(address=autoscaled, gpus_per_unit=1.0)) as cluster:
        assert (cluster.device, cluster.num_gpus, cluster.slots(), cluster.autoscales) == ("cuda", 2, 2, True)
        assert _gpu_nodes() == 0
        counter = threading.Thread(target=count)
        counter.start()
        try:
            run = Run(RunStore.create(tmp_path / "run", preset("quickstart")))
            packed = ray.put(pack_splits(load_dataset(DataOptions(name="sample", limit_train=2))))
            pool, progress = Actors(cluster, packed, run), Recorded()
            units = [Nap(label="long", seconds=40, cost=9), *(Nap(label=f"unit={n}", seconds=1) for n in range(4))]
            assert pool.do(_job(units), units, threads=1, progress=progress) == {}
            assert set(progress.nodes) == {unit.name for unit in units}
            assert len(set(progress.nodes.values())) == 2
            assert counts[-1] == 1  # the other one was given back while the long unit went on
            pool.close()
            _wait_for(lambda: _gpu_nodes() == 0, "node given back", 60, [])

            few, trials = [Nap(label=f"trial={n}", seconds=1) for n in range(2)], Recorded()
            on_cores = Trials(replace(cluster, device="cpu"), packed, run)
            assert on_cores.do(_job(few), few, threads=1, progress=trials) == {}
            assert set(trials.nodes) == {"trial=0", "trial=1"}
            _wait_for(lambda: _gpu_nodes() == 0, "node given back after the trials", 60, [])
            counts.append(_gpu_nodes())
        finally:
            over.set()
            counter.join()
    levels = [count for count, _ in groupby(counts)]
    assert max(levels) in (2, 3)  # one that was just given back counts for some seconds beside the one after it
    assert levels[0] == levels[-1] == 0
