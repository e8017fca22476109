"""The run folder's lock: the kernel's in a local folder, a lease that has to be refreshed in a bucket."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gross_ray.errors import RunFolderError, StorageError
from gross_ray.experiment import Experiment
from gross_ray.run import lock
from gross_ray.run.store import RunStore
from gross_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path):
    return RunStore.create(tmp_path / "run", Experiment(name="test"))


def start(program, *arguments):
    """A process that works on a run folder: it must outlive or be killed apart from the test's own process."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


HOLD = """
import sys, time
from gross_ray.run.store import RunStore
with RunStore.open(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_driver_is_refused_by_the_first_one_s_host_and_pid_until_that_is_killed(store):
    with start(HOLD, store.path) as process:
        try:
            assert process.stdout.readline() == "held\n"
            owner = rf"process {process.pid} on {socket.gethostname()} since 20\d\d-\d\d-\d\dT[\d:.]+\+00:00"
            with (
                pytest.raises(RunFolderError, match=f"in use by {owner}: wait until it finishes, stop it"),
                store.lock(),
            ):
                pass
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    with store.lock():
        assert (store.path / ".lock").read_text().startswith(f"process {os.getpid()} on {socket.gethostname()} since ")


def test_the_lock_is_let_go_of_at_the_end_and_after_an_error(store):
    with pytest.raises(KeyError), store.lock():
        raise KeyError
    with store.lock(), pytest.raises(RunFolderError, match=f"process {os.getpid()} "), store.lock():
        pass
    with store.lock():
        pass


def test_a_forked_child_that_lives_on_does_not_keep_the_lock(store):
    with store.lock():
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with store.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_lock_is_refused_if_the_folder_became_another_experiment_s(store):
    other = replace(store.experiment, seed=5)
    (store.path / "experiment.json").write_text(other.to_json())
    with pytest.raises(RunFolderError, match=r"seed \(0, not 5\)"), store.lock():
        pass


def test_a_file_system_without_locks_is_named(store, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with pytest.raises(RunFolderError, match=r"cannot lock .*\.lock.*a file system with locks"), store.lock():
        pass


# The lease, on a folder that stands for a bucket


class Bucket(Storage):
    """A bucket as far as the lock can tell: no folder of this machine."""

    def __init__(self, address):
        super().__init__(address)
        self.where, self.folder = self.folder, None

    def write(self, name, data):
        Storage(self.where).write(name, data)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    for name, seconds in {"REFRESH": 0.05, "WATCH": 0.3, "SETTLE": 0.1}.items():
        monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
    yield Bucket(tmp_path)
    signal.signal(signal.SIGINT, before)


def of_another_machine(**changed):
    return json.dumps(lock._me() | {"kernel": "another", "host": "node-7", "pid": 4, "token": "x"} | changed).encode()


def test_a_lease_is_written_again_and_given_back(bucket):
    with lock.held(bucket):
        first = json.loads(bucket.read(".lock"))
        assert (first["pid"], first["host"]) == (os.getpid(), socket.gethostname())
        deadline = time.monotonic() + 20
        while json.loads(bucket.read(".lock"))["refreshed"] == first["refreshed"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not bucket.exists(".lock")


def test_a_living_owner_s_lease_is_refused_by_name(bucket):
    with lock.held(bucket):
        owner = f"process {os.getpid()} on {socket.gethostname()} since 20"
        with (
            pytest.raises(RunFolderError, match=f"is in use by {owner}.*wait until it finishes"),
            lock.held(Bucket(bucket.where)),
        ):
            pass
        assert json.loads(bucket.read(".lock"))["pid"] == os.getpid()


OLD = (datetime.now(UTC) - timedelta(seconds=lock.STALE_SECONDS + 1)).isoformat()


@pytest.mark.parametrize("content", [of_another_machine(refreshed=OLD), of_another_machine(), b"{", b"[]", b""])
def test_an_old_lease_is_watched_and_taken_over(bucket, content):
    bucket.write(".lock", content)
    started = time.monotonic()
    with lock.held(bucket):
        assert time.monotonic() - started >= lock.WATCH_SECONDS
        assert json.loads(bucket.read(".lock"))["pid"] == os.getpid()


def test_a_young_lease_of_another_machine_is_refused_at_once(bucket, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: pytest.fail("waits"))
    young = (datetime.now(UTC) - timedelta(seconds=100)).isoformat()
    bucket.write(".lock", of_another_machine(refreshed=young))
    message = (
        r"in use by process 4 on node-7 since .*last active 10\d s ago; if it is dead, the folder is free in 3[78]\d s"
    )
    with pytest.raises(RunFolderError, match=message), lock.held(bucket):
        pass


def test_a_lease_that_looks_old_by_another_clock_and_is_written_again_is_left_alone(bucket, monkeypatch):
    bucket.write(".lock", of_another_machine(refreshed=OLD))
    sleep = lock.time.sleep

    def written_meanwhile(seconds):
        bucket.write(".lock", of_another_machine(refreshed=OLD, since="now"))
        sleep(seconds / 10)

    monkeypatch.setattr(lock.time, "sleep", written_meanwhile)
    with pytest.raises(RunFolderError, match="in use by process 4 on node-7 since now"), lock.held(bucket):
        pass


def test_an_owner_whose_store_is_away_for_too_long_gives_up_and_writes_no_more(bucket, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", lock.MARGIN_SECONDS + 0.3)
    written = []

    def away(self, name, data):
        if written:
            raise StorageError("away")
        written.append(data)
        Storage(self.where).write(name, data)

    monkeypatch.setattr(Bucket, "write", away)
    with pytest.raises(RunFolderError, match="was lost to nobody yet, but its lease is old"), lock.held(bucket):
        threading.Event().wait(20)
    assert len(written) == 1


def test_a_lease_whose_process_of_this_machine_is_dead_is_taken_over_at_once(bucket, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 1000.0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for owner in ({"pid": ended.pid}, {"pid": os.getpid(), "started": "0"}):  # gone; and its number given to another
        bucket.write(".lock", json.dumps(lock._me() | owner).encode())
        with lock.held(bucket):
            assert json.loads(bucket.read(".lock"))["started"] == lock._started(os.getpid())


def test_of_two_that_take_it_at_the_same_moment_one_gets_it(bucket, monkeypatch):
    settle = lock.time.sleep

    def another_writes(seconds):
        if seconds == lock.SETTLE_SECONDS:
            bucket.write(".lock", of_another_machine())
        settle(seconds)

    monkeypatch.setattr(lock.time, "sleep", another_writes)
    with pytest.raises(RunFolderError, match="in use by process 4 on node-7"), lock.held(bucket):
        pass
    assert json.loads(bucket.read(".lock"))["host"] == "node-7"


def test_a_driver_whose_lease_was_taken_over_stops_and_says_by_whom(bucket):
    told = pytest.raises(RunFolderError, match="was lost to process 4 on node-7 since .*what it stored is kept")
    with told, lock.held(bucket):
        for _ in range(100):  # the owner overwrites a lease that is written between its own reading and writing
            bucket.write(".lock", of_another_machine())
            threading.Event().wait(0.2)
    assert json.loads(bucket.read(".lock"))["host"] == "node-7"


def test_an_interrupt_of_the_user_stays_one(bucket):
    with pytest.raises(KeyboardInterrupt), lock.held(bucket):
        raise KeyboardInterrupt
    assert not bucket.exists(".lock")


def test_a_folder_in_which_no_lock_can_be_written_is_told_in_one_line(store):
    (store.path / ".lock").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*\.lock: "), store.lock():
        pass
