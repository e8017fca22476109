"""The reading of images into files goes on where it was interrupted, and happens once."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_errors import dataset_error
from made_datasets import A_PART, in_files, in_memory, make, pictures
from torch.utils.data import _utils

from gross_ray.data import image_files, reading
from gross_ray.data.decoding import decoded
from gross_ray.data.identity import identity_of
from gross_ray.data.image_files import ImageFiles, all_files
from gross_ray.data.images import load_dataset
from gross_ray.errors import DatasetError
from gross_ray.experiment import DataOptions

NUM_IMAGES = 60
DAMAGED = 13
FORK = multiprocessing.get_context("fork")


class Decodes:
    """What replaces `decoded`: it counts the images in a file, of all processes, and does something at one of them."""

    def __init__(self, file: Path) -> None:
        self._file, self._at, self._act = file, 0, lambda: None

    def at(self, number: int, act: Callable[[], object]) -> None:
        """At the next image that is the `number`-th, call `act`."""
        self._at, self._act = number, act

    def __call__(self, source: Path | bytes) -> object:
        with open(self._file, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{source}\n")
            file.flush()
            number = len(self.images())
        if number == self._at:
            self._act()
        return decoded(source)

    def images(self) -> list[str]:
        return self._file.read_text().splitlines() if self._file.exists() else []

    def forget(self) -> None:
        self.at(0, lambda: None)
        self._file.unlink()


@pytest.fixture
def decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Decodes:
    """Reading in this process, part by part in the journal."""
    decodes = Decodes(tmp_path / "decodes")
    monkeypatch.setattr(reading, "decoded", decodes)
    monkeypatch.setattr(reading, "processes", lambda: 0)
    monkeypatch.setattr(image_files, "_SECONDS_TO_FLUSH", -1.0)
    return decodes


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of images, one of them damaged."""
    images = pictures(0, NUM_IMAGES)
    images[DAMAGED] = (b"no image", images[DAMAGED][1])
    return make("folder", {"train": images}, tmp_path / "source", monkeypatch)


def load(name: str, root: Path) -> str:
    return identity_of(in_files(name, root, skip_damaged=True)).hash


def expected(name: str, decodes: Decodes) -> str:
    hash = identity_of(in_memory(name, skip_damaged=True)).hash
    decodes.forget()
    return hash


def assert_goes_on(name: str, root: Path, decodes: Decodes, whole: str, read: int) -> None:
    """Assert that the next load gives the same images, and decodes only those that are not `read`."""
    decodes.forget()
    assert load(name, root) == whole
    assert len(decodes.images()) == NUM_IMAGES - read


def interrupt() -> None:
    raise KeyboardInterrupt


def in_another_process(act: Callable[[], object]) -> int:
    """Call `act` in a forked process, and return its exit code."""
    process = FORK.Process(target=act)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def kill_this() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("killed", [False, True], ids=["interrupted", "killed"])
@pytest.mark.parametrize("at", [1, A_PART, A_PART + 1, 3 * A_PART + 2, NUM_IMAGES])
def test_parts_that_were_read_are_not_read_again(
    killed: bool, at: int, name: str, tmp_path: Path, decodes: Decodes
) -> None:
    whole = expected(name, decodes)
    if killed:
        decodes.at(at, kill_this)
        assert in_another_process(lambda: load(name, tmp_path)) == -signal.SIGKILL
    else:
        decodes.at(at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(name, tmp_path)
    (files,) = all_files(str(tmp_path))
    read = (at - 1) // A_PART * A_PART
    assert not files.complete()
    assert files.progress() == (name, read, NUM_IMAGES)
    before = decodes.images()
    assert len(before) == at
    decodes.forget()
    assert load(name, tmp_path) == whole
    assert sorted({*before[:read]} ^ {*decodes.images()}) == sorted({*before} | {*decodes.images()})
    assert len(decodes.images()) == NUM_IMAGES - read
    assert files.verify() and not (files.folder / "read.jsonl").exists()


def test_a_killed_process_with_workers(
    name: str, tmp_path: Path, decodes: Decodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = expected(name, decodes)
    monkeypatch.setattr(reading, "processes", lambda: 2)
    monkeypatch.setattr(_utils.worker, "MP_STATUS_CHECK_INTERVAL", 0.2)  # how soon workers notice that they are orphans

    def main() -> None:
        reader = os.getpid()
        decodes.at(40, lambda: os.kill(reader, signal.SIGKILL))
        load(name, tmp_path)

    assert in_another_process(main) == -signal.SIGKILL
    (files,) = all_files(str(tmp_path))
    with files.locked():  # the workers have ended
        read = files.progress()[1]
    assert_goes_on(name, tmp_path, decodes, whole, read)


def test_a_killed_worker_is_one_line(
    name: str, tmp_path: Path, decodes: Decodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = expected(name, decodes)
    monkeypatch.setattr(reading, "processes", lambda: 2)
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # how long the other worker is waited for
    decodes.at(40, kill_this)
    dataset_error(lambda: load(name, tmp_path), f"{name}: a process that reads images was killed (")
    (files,) = all_files(str(tmp_path))
    read = files.progress()[1]
    assert_goes_on(name, tmp_path, decodes, whole, read)


def test_an_error_ends_the_processes_and_frees_the_lock(
    name: str, tmp_path: Path, decodes: Decodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while somebody keeps the error, and with it the frames in which it was raised."""
    monkeypatch.setattr(reading, "processes", lambda: 2)
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    decodes.at(10, kill_this)
    with pytest.raises(DatasetError, match="was killed") as caught:
        load(name, tmp_path)
    assert caught.value.__traceback__ is not None and multiprocessing.active_children() == []
    (files,) = all_files(str(tmp_path))
    with files.locked(pytest.fail):
        assert not files.complete()


@pytest.mark.parametrize("left", [0, 1, 20, -1])
def test_a_line_that_was_cut_off_costs_its_part_only(left: int, name: str, tmp_path: Path, decodes: Decodes) -> None:
    whole = expected(name, decodes)
    decodes.at(4 * A_PART + 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(name, tmp_path)
    (files,) = all_files(str(tmp_path))
    journal = files.folder / "read.jsonl"
    *lines, last = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    journal.write_text("".join(lines) + last[:left])  # -1: only the end of the line is missing
    lost = 0 if left == -1 else 1
    decodes.forget()
    decodes.at(2 * A_PART + 1, interrupt)
    with pytest.raises(KeyboardInterrupt):  # the line is followed by others
        load(name, tmp_path)
    assert files.progress()[1] == (4 - lost + 2) * A_PART
    decodes.forget()
    assert load(name, tmp_path) == whole
    assert len(decodes.images()) == NUM_IMAGES - (4 - lost + 2) * A_PART


def test_an_interruption_after_the_last_part(
    name: str, tmp_path: Path, decodes: Decodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that were moved, because one is damaged, are read again; others are not."""
    whole = expected(name, decodes)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for stop in ("rearrange", "finish"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ImageFiles, stop, fail)
            load(name, tmp_path)
        assert len(decodes.images()) == NUM_IMAGES  # all of them, or, when all were read, nothing
        if stop == "finish":
            decodes.forget()
    assert load(name, tmp_path) == whole
    assert len(decodes.images()) == NUM_IMAGES


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_interruption_while_files_are_replaced(
    number: int, name: str, tmp_path: Path, decodes: Decodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, replaced, replace = expected(name, decodes), list[str](), os.replace

    def stop(source: Path, target: Path) -> None:
        if Path(source).name.startswith("new-"):
            replaced.append(str(source))
            if len(replaced) > number:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        load(name, tmp_path)
    assert load(name, tmp_path) == whole
    (files,) = all_files(str(tmp_path))
    assert files.verify()
    assert sorted(path.suffix for path in files.folder.iterdir()) == [".json", ".u8", ".u8", ".u8"]


def test_two_processes_at_once_read_once(name: str, tmp_path: Path, decodes: Decodes) -> None:
    whole, start, found = expected(name, decodes), FORK.Barrier(2), FORK.SimpleQueue()

    def main() -> None:
        start.wait(60)
        found.put(load(name, tmp_path))

    processes = [FORK.Process(target=main) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert {found.get(), found.get()} == {whole}
    assert set(Counter(decodes.images()).values()) == {1}
    assert len(decodes.images()) == NUM_IMAGES


def test_who_waits_says_so(name: str, tmp_path: Path, decodes: Decodes) -> None:
    load(name, tmp_path)
    (files,) = all_files(str(tmp_path))
    notes: list[str] = []
    options = DataOptions(name=name, memory=1, skip_damaged=True)
    loading = threading.Thread(target=lambda: load_dataset(options, root=tmp_path, note=notes.append))
    with files.locked():
        loading.start()
        while not notes and loading.is_alive():
            time.sleep(0.01)
    loading.join(60)
    assert not loading.is_alive()
    assert notes == [f"waiting for another process, which reads the same images into {files.folder}"]


def test_without_semaphores_this_process_reads(
    name: str, tmp_path: Path, decodes: Decodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    readers = set()

    def decode(source: Path) -> object:
        readers.add(os.getpid())
        return decoded(source)

    def no_semaphore(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    assert reading.processes() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(multiprocessing, "Semaphore", no_semaphore)
    monkeypatch.setattr(reading, "decoded", decode)
    assert reading.processes() == 0
    load(name, tmp_path)
    assert readers == {os.getpid()}
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert reading.processes() == 0
