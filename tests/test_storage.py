"""Run folders in a bucket, against a real server of the S3 protocol on loopback; and what is told where one refuses."""

from __future__ import annotations

import os
import pickle
import subprocess
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import fs
from s3_server import SECRET, Door, free_port, uri

from gross_ray import storage as storage_module
from gross_ray.errors import DamagedFileError, InvalidValueError, RunFolderError, StorageError
from gross_ray.experiment import Experiment
from gross_ray.run import lock
from gross_ray.run.store import RunStore, read_table
from gross_ray.storage import Storage

NETWORK = {
    "seed": 0,
    "val_correct": 8,
    "val_total": 10,
    "val_accuracy": 0.8,
    "test_accuracy": 0.7,
    "macs": 1000,
    "parameters": 100,
}


def test_a_run_folder_in_a_bucket_is_made_written_read_and_read_by_pandas_alone(s3_port: int) -> None:
    address = uri(s3_port, "deep/run=1")
    with pytest.raises(RunFolderError, match=r"s3://.*deep/run=1.* is not a run folder") as caught:
        RunStore.open(address)
    assert SECRET not in str(caught.value)
    store = RunStore.create(address, Experiment(name="test"))
    worker = pickle.loads(pickle.dumps(store))
    for seed in (10, 2):
        worker.write_table("networks", f"seed={seed}", [NETWORK | {"seed": seed}])
    assert RunStore.create(address, Experiment(name="test")).finished_units("networks") == {"seed=2", "seed=10"}
    frame = read_table(address, "networks")
    assert frame["seed"].tolist() == [2, 10]
    filesystem = store.storage.filesystem
    plain = pd.read_parquet(store.storage.path("tables/networks"), filesystem=filesystem)
    pd.testing.assert_frame_equal(plain.sort_values("seed", ignore_index=True), frame)
    with pytest.raises(RunFolderError, match=r"seed \(3, not 0\)"):
        RunStore.create(address, Experiment(name="test", seed=3))
    store.delete_unit("networks", "seed=2")
    store.delete_unit("networks", "seed=2")
    assert not store.has_unit("networks", "seed=2")


def test_a_bucket_is_locked(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.1)
    store = RunStore.create(uri(s3_port, "locked"), Experiment(name="test"))
    with store.lock(), pytest.raises(RunFolderError, match="is in use by process"), store.lock():
        pass
    with store.lock():
        pass


def test_checkpoints_and_damaged_files_in_a_bucket(s3_port: int) -> None:
    store = RunStore.create(uri(s3_port, "checkpoints"), Experiment(name="test"))
    tensors = {"a": torch.arange(300_000.0), "b": torch.tensor([True])}
    for unit in ("seed=0", "seed=1"):
        store.save_checkpoint("train", unit, tensors, {"epoch": 3})
        store.write_table("networks", unit, [NETWORK])
    loaded, about = store.load_checkpoint("train", "seed=0")
    assert about == {"epoch": 3}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    file = "checkpoints/train/seed=1.safetensors"
    store.storage.write(file, store.storage.read(file)[:-1] + b"x")
    store.storage.write("tables/networks/seed=0.parquet", b"PAR1")
    for attempt in (lambda: store.load_checkpoint("train", "seed=1"), lambda: store.read_table("networks")):
        with pytest.raises(DamagedFileError):
            attempt()
    assert store.damaged == [], "deleted by one that does not hold the lock"
    with store.lock():
        for attempt in (lambda: store.load_checkpoint("train", "seed=1"), lambda: store.read_table("networks")):
            with pytest.raises(DamagedFileError):
                attempt()
        assert store.finished_units("networks") == {"seed=1"}
    assert store.damaged == [file, "tables/networks/seed=0.parquet"]
    assert not store.has_checkpoint("train", "seed=1")


def test_an_unfinished_write_leaves_the_old_file(door: Door, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 0.0)
    storage = Storage(uri(door.port, "unfinished"))
    storage.write("tables/a", b"old")
    door.refusals += [(500, "InternalError")] * 100
    with pytest.raises(StorageError, match="cannot write .*unfinished/tables/a: no answer for 0 s"):
        storage.write("tables/a", b"new" * 5_000_000)
    door.refusals.clear()
    assert storage.read("tables/a") == b"old"


def test_a_store_that_fails_for_a_while_is_asked_again(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(storage_module.time, "sleep", lambda seconds: (pauses.append(seconds), sleep(seconds / 50)))
    store = RunStore.create(uri(door.port, "moody"), Experiment(name="test"))
    door.refusals += [(503, "SlowDown")] * 50
    store.write_table("networks", "seed=0", [NETWORK])
    assert door.refusals == []
    assert pauses, "pyarrow's own repetitions were enough: this tests nothing"
    assert all(later > earlier / 2 for earlier, later in zip(pauses, pauses[1:], strict=False))
    door.refusals += [(503, "SlowDown")] * 50
    assert store.read_table("networks")["seed"].tolist() == [0]
    assert door.refusals == []


def test_a_store_that_is_away_for_longer_is_named_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(storage_module, "FIRST_PAUSE_SECONDS", 0.1)
    port = free_port()
    with pytest.raises(RunFolderError, match="no answer for 1 s .*same command again") as caught:
        RunStore.create(uri(port, "away"), Experiment(name="test"))
    assert "EXAMPLE" not in str(caught.value)


def test_a_store_that_refuses_says_what_it_refused_at_once(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module.time, "sleep", lambda seconds: pytest.fail("asked again"))
    storage = Storage(uri(door.port, "closed"))
    door.refusals += [(403, "AccessDenied")] * 10
    with pytest.raises(StorageError, match=r"cannot write s3://runs/closed/tables/a: .*ACCESS_DENIED") as caught:
        storage.write("tables/a", b"x")
    assert "EXAMPLE" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_bucket_that_is_not_there_is_named(s3_port: int) -> None:
    with pytest.raises(RunFolderError, match="cannot make the run folder .*nowhere/run") as caught:
        RunStore.create(uri(s3_port, "run", bucket="nowhere"), Experiment(name="test"))
    assert "EXAMPLE" not in str(caught.value)


@pytest.mark.parametrize("address", ["nonsense://bucket/run", "s3://", "gs:///run"])
def test_an_address_that_pyarrow_does_not_know_is_refused(address: str) -> None:
    with pytest.raises(InvalidValueError, match=f"cannot use {address}.*like s3://bucket/folder"):
        Storage(address)


@pytest.mark.parametrize(
    "address",
    [
        f"s3://AKIDEXAMPLE:{SECRET}@runs/x",  # its slash unescaped: no parser of URIs finds the @
        f"s3://AKIDEXAMPLE:{SECRET.replace('/', '%2F')}@runs/x?region=eu",
        f"gs://runs/x?access_token={SECRET}",
        f"s3://runs/x?region=eu&secret_key={SECRET}",
    ],
)
def test_an_address_with_credentials_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises(InvalidValueError, match="holds credentials.*AWS_ACCESS_KEY_ID") as caught:
        Storage(address)
    assert "EXAMPLEKEY" not in str(caught.value)
    Storage("gs://anonymous@runs/x")


def test_secrets_of_the_environment_are_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from-the-environment")
    refused = Storage("/tmp/x").refused("write", "a", OSError("bad from-the-environment\nmore"))
    assert str(refused).startswith("cannot write /tmp/x/a: bad ***; ")


def test_a_pickled_store_holds_no_secret(s3_port: int) -> None:
    storage = Storage(uri(s3_port, "pickled"))
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    for pickled in (pickle.dumps(storage), pickle.dumps(storage.filesystem)):
        assert SECRET.encode() not in pickled


def test_a_region_that_cannot_be_looked_up_is_no_wrong_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def no_answer(address: str) -> None:
        asked.append(address)
        raise OSError("When resolving region for bucket 'runs': AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(storage_module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(storage_module, "_filesystem", no_answer)
    with pytest.raises(StorageError, match="cannot reach s3://runs/x.*no answer for 0.5 s"):
        Storage("s3://runs/x")
    assert len(asked) > 2


# Local folders


def test_a_file_uri_is_a_local_folder(tmp_path: Path) -> None:
    store = RunStore.create(f"file://{tmp_path}/a%20run", Experiment(name="test"))
    assert store.path == tmp_path / "a run"
    assert str(store.storage) == str(tmp_path / "a run")


@pytest.mark.parametrize("begin", ["FILE://", "file://localhost", "file://LOCALHOST"])
@pytest.mark.parametrize("name", ["run", "a#b", "a?b=c"])
def test_a_scheme_has_no_case_and_this_host_is_no_other(begin: str, name: str, tmp_path: Path) -> None:
    assert Storage(f"{begin}{tmp_path}/{name}").folder == tmp_path / name


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("file://runs/a", r"'runs' is read as a host.* like file:///.*/runs/a$"),
        ("file://nas/exports/a", "'nas' is read as a host"),
        ("file:runs/a", "a URI has :// after its scheme: write runs/a, or ./file:runs/a for a folder"),
        ("file:/runs/a", "write file:///runs/a,"),
        ("s3:/bucket/x", "write s3://bucket/x, or ./s3:/bucket/x for a folder"),
        ("S3:bucket/x", "write s3://bucket/x,"),
        ("file:", r"write \., or ./file: for a folder"),
    ],
)
def test_what_is_nearly_a_uri_is_refused(
    address: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidValueError, match=remedy):
        RunStore.create(address, Experiment(name="test"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["s3:/AKIA:HUSH@bucket/x", "s3:bucket/x?secret_key=HUSH", "file:/u:HUSH@h/x"])
def test_what_is_nearly_a_uri_with_a_secret_does_not_show_it(address: str) -> None:
    with pytest.raises(InvalidValueError, match="holds credentials") as refused:
        Storage(address)
    assert "HUSH" not in str(refused.value)


@pytest.mark.parametrize("name", ["lr:0.1", "a:b/c", "./s3:x", "x/file:y", "runs:/a"])
def test_a_colon_is_a_colon_in_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage(name).folder == tmp_path / name


def test_a_bucket_is_no_path(s3_port: int) -> None:
    store = RunStore(Storage(uri(s3_port, "no-path")), Experiment())
    with pytest.raises(InvalidValueError, match="is no folder of this machine"):
        store.path  # noqa: B018


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_is_named_and_keeps_what_is_stored(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode()}")
    try:
        store = RunStore.create(disk / "run", Experiment(name="test"))
        store.write_table("networks", "seed=0", [NETWORK])
        store.save_checkpoint("train", "seed=0", {"a": torch.ones(10)}, {})
        for unit in ("seed=0", "seed=1"):
            with pytest.raises(StorageError, match=f"cannot write .*{unit}.safetensors: .*No space left.*free space"):
                store.save_checkpoint("train", unit, {"a": torch.ones(100_000)}, {})
        assert torch.equal(store.load_checkpoint("train", "seed=0")[0]["a"], torch.ones(10))
        assert not store.has_checkpoint("train", "seed=1")
        assert [file for file in disk.rglob("*.tmp")] == []
        store.save_checkpoint("train", "seed=1", {"a": torch.ones(20)}, {})
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# Work of any length that writes to a store


class Clock:
    """A clock that only the work and the pauses move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pauses = 0.0, 0
        monkeypatch.setattr(storage_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(storage_module.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.pauses += 1
        self.now += seconds


def in_a_bucket() -> Storage:
    """A storage that is in no local folder, and asks no server."""
    storage = object.__new__(Storage)
    vars(storage).update(_address="s3://runs/x", folder=None, root="runs/x")
    return storage


AWAY = "When writing: AWS Error NETWORK_CONNECTION during PutObject operation"


@pytest.mark.parametrize("seconds", [0.0, 10.0, 360.0, 36_000.0])
def test_the_patience_begins_with_the_first_failure(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, attempts = Clock(monkeypatch), []

    def work() -> str:
        clock.now += seconds
        attempts.append(clock.now)
        if len(attempts) < 3:
            raise OSError(AWAY)
        return "done"

    assert in_a_bucket().patiently("write", "tune", work) == "done"
    assert len(attempts) == 3


@pytest.mark.parametrize("first", [0.0, 3600.0])
def test_a_streak_of_failures_ends_after_the_patience(first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ends = Clock(monkeypatch), []

    def work() -> None:
        clock.now += 0.0 if ends else first
        ends.append(clock.now)
        raise OSError(AWAY)

    with pytest.raises(StorageError, match="cannot write s3://runs/x/tune: no answer for 300 s"):
        in_a_bucket().patiently("write", "tune", work)
    assert 200 < ends[-1] - ends[0] <= 300


def errors_of_something_else() -> list[Exception]:
    from urllib.error import URLError

    from ray.exceptions import GetTimeoutError

    return [
        GetTimeoutError("Get timed out"),
        TimeoutError("timed out"),
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionRefusedError("refused"),
        BrokenPipeError(32, "Broken pipe"),
        URLError("no host"),
        FileNotFoundError(2, "No such file or directory", "/home/me/callback.log"),
        OSError(28, "No space left on device", "/home/me/callback.log"),
        PermissionError(13, "Permission denied", "/home/me/callback.log"),
        pa.ArrowInvalid("no number"),
    ]


@pytest.mark.parametrize("place", range(len(errors_of_something_else())))
@pytest.mark.parametrize("local", [True, False])
def test_what_else_the_work_meets_is_not_the_store_s(
    place: int, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, error = Clock(monkeypatch), errors_of_something_else()[place]

    def work() -> None:
        raise error

    storage = Storage(tmp_path) if local else in_a_bucket()
    with pytest.raises(type(error)) as caught:
        storage.patiently("write", "tune", work)
    assert caught.value is error
    assert clock.pauses == 0


def test_what_pyarrow_s_filesystem_raises_is_the_store_s(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    filesystem = fs.LocalFileSystem()
    with pytest.raises(StorageError, match="cannot write .*/run/tune: "):
        storage.patiently("write", "tune", lambda: filesystem.create_dir(storage.path("tune")))
    with pytest.raises(StorageError, match="cannot write .*/run/tune: "):
        storage.patiently("write", "tune", lambda: filesystem.open_output_stream(storage.path("tune/a")).close())


def test_a_lack_of_memory_is_not_the_store_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def no_memory(*_: object) -> None:
        raise pa.ArrowMemoryError("no memory")

    storage = in_a_bucket()
    storage.filesystem = type("NoMemory", (), {"get_file_info": no_memory})()
    with pytest.raises(pa.ArrowMemoryError):
        storage.exists("a")
    assert clock.pauses == 0
