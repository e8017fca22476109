"""What can go wrong with a run, done to it on purpose, and what must hold afterwards."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from miniature import CLOCKS, ROOT, command, do

from gross_ray import read_table
from gross_ray.run.opened import Run
from gross_ray.run.progress import progress
from gross_ray.run.store import RunStore
from pipelines.stages.pipeline import plans

MARK = "GROSS_RAY_TEST_RUN"
"""Environment variable by which all processes of one driver are known: children inherit it."""
REPEATS = int(os.environ.get("GROSS_RAY_FAULT_REPEATS", "1"))
SEED = int(os.environ.get("GROSS_RAY_FAULT_SEED", "0"))
"""What decides the moments of faults."""
PATIENCE = 600.0
"""Seconds after which a test gives up what it waits for; where all is well, and the machine busy, it takes a part."""

_STARTING = re.compile(r"ray::(DashboardAgent|RuntimeEnvAgent|IDLE)\b")
"""Ray's agents, and workers that have done nothing yet: they try for a minute to reach a Ray that is gone."""
_killed: list[str] = []
"""Marks of the drivers that were killed."""


@dataclass(frozen=True)
class StageFiles:
    """What a stage stores: patterns below the run folder, and a file that is there while it is under way."""

    own: tuple[str, ...]
    sign: str


def _training(stage: str, prefix: str = "") -> StageFiles:
    own = (f"checkpoints/{stage}/{prefix}*", f"tables/history/{stage},{prefix}*")
    return StageFiles(own, f"checkpoints/{stage}-under-way/{prefix}*.safetensors")


_SWEPT = "alpha=4,"
STAGES = {
    "train": StageFiles((*_training("train").own, "tables/networks/*"), _training("train").sign),
    "decompose": StageFiles(("checkpoints/decompose/*", "tables/decompositions/*"), "tables/decompositions/*.parquet"),
    "reconstruct": _training("reconstruct"),
    "finetune": _training("finetune"),
    "search": StageFiles(
        ("tables/configurations/*", "tables/selections/*", "checkpoints/search-plan/*"),
        "tables/configurations/*.parquet",
    ),
    "validate": StageFiles(
        ("checkpoints/validate/*", "tables/validations/*", "tables/history/validate-*", "tables/history/validate,*"),
        "checkpoints/validate-finetune-under-way/*.safetensors",
    ),
    "sweep-alpha": StageFiles(
        (
            *_training("reconstruct", _SWEPT).own,
            *_training("finetune", _SWEPT).own,
            f"tables/configurations/{_SWEPT}*",
            "tables/alpha_sweep/*",
        ),
        _training("finetune", _SWEPT).sign,
    ),
}


def before_stage(undisturbed: Path, stage: str, run: Path) -> Path:
    """Copy a finished run without what `stage` stored."""
    shutil.copytree(undisturbed, run)
    removed = [file for pattern in STAGES[stage].own for file in run.glob(pattern)]
    assert removed, f"{stage}: nothing to remove"
    for file in removed:
        file.unlink()
    return run


class Driver(subprocess.Popen[bytes]):
    """`gross STAGE RUN` in a process group of its own, with the mark of its processes and what it prints."""

    def __init__(self, run: Path | str, stage: str, log: Path, *more: str) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        self.started = time.time()
        self.damaged: dict[Path, bytes] = {}
        with log.open("ab") as output:
            super().__init__(
                command(stage, str(run), *([] if "--address" in more else ["--num-cpus", "2"]), *more),
                stdout=output,
                stderr=output,
                env=os.environ | {MARK: self.mark, "PYTHONFAULTHANDLER": "1"},
                start_new_session=True,
                cwd=ROOT,
            )

    def ended(self, seconds: float) -> int:
        """Return the exit status; one that has not ended by then is shown with the stacks of its threads."""
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGABRT)  # Python's fault handler writes the stacks
            self.wait(60)
            raise AssertionError(f"not ended after {seconds:g} s:\n{self.log.read_text()}") from None


@contextmanager
def driver(run: Path | str, stage: str, log: Path, *more: str) -> Iterator[Driver]:
    """Start `gross STAGE RUN`, killed at the end; nothing of it may be left then."""
    process = Driver(run, stage, log, *more)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        if process.wait() == -signal.SIGKILL:
            _killed.append(process.mark)
            assert_nothing_left(process.mark, but_starting=True)
        else:
            assert_nothing_left(process.mark)


def resume(run: Path | str, stage: str, log: Path, *more: str) -> str:
    """Run the same command to its end; return what it printed."""
    place = log.stat().st_size if log.exists() else 0
    with driver(run, stage, log, *more) as process:
        assert process.ended(PATIENCE) == 0, log.read_text()
    return log.read_bytes()[place:].decode()


def resume_in_process(run: Path | str, stage: str, log: Path) -> str:
    """The same without Ray and in this process: its tables must be equal too, and nothing has to start."""
    told = do(stage, run).stderr
    with log.open("a") as file:
        file.write(told)
    return told


def checked(run: Path) -> str:
    """Run `gross check RUN`, for what its stage does not read itself; return what it printed."""
    ended = subprocess.run(command("check", str(run)), capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def at_a_moment(process: Driver, run: Path, stage: str, log: Path, moment: float) -> None:
    """Wait until the stage is under way, and so many seconds more, or until the driver has ended."""
    deadline = time.monotonic() + PATIENCE
    while not any(run.glob(STAGES[stage].sign)):
        assert process.poll() is None, f"{stage}: ended before:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"{stage}: no sign of it:\n{log.read_text()}"
        time.sleep(0.01)
    time.sleep(moment)


def at_a_moment_before(process: Driver, run: Path, stage: str, log: Path, moment: float) -> None:
    """Wait until Ray starts, and so many seconds more, but not beyond the first thing that the stage stores."""
    deadline = time.monotonic() + PATIENCE
    while not any("gcs_server" in title.split(" ")[0] for _, title in marked(process.mark)):
        assert process.poll() is None and time.monotonic() < deadline, f"{stage}: no Ray:\n{log.read_text()}"
        time.sleep(0.02)
    end = time.monotonic() + moment
    while time.monotonic() < end and not any(run.glob(STAGES[stage].sign)) and process.poll() is None:
        time.sleep(0.01)


def workers(mark: str) -> list[int]:
    """Return the processes of a driver in which Ray does its work now."""
    return [pid for pid, title in marked(mark) if re.match(r"ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent)", title)]


def assert_nothing_left(mark: str, seconds: float = 180.0, *, but_starting: bool = False) -> None:
    deadline = time.monotonic() + seconds
    while left := [each for each in marked(mark) if not (but_starting and _STARTING.match(each[1]))]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def assert_starting_have_ended() -> None:
    """What was starting as its driver was killed ends by itself, a minute later."""
    while _killed:
        assert_nothing_left(_killed.pop())


def marked(mark: str) -> list[tuple[int, str]]:
    """Return the living processes of a driver, and their command lines."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if title:  # a zombie has none
                        found.append((int(folder.name), title))
            except OSError:
                continue  # it has just ended
    return found


def stored(run: Path) -> dict[Path, int]:
    """Return the finished units of a run, and when each was written."""
    return {file: file.stat().st_mtime_ns for file in run.glob("tables/*/[!.]*.parquet")}


def epochs_under_way(run: Path, stage: str = "*", unit: str = "*") -> dict[str, list[float]]:
    """Return the seconds of each epoch that a unit under way has stored, by `STAGE,UNIT`."""
    found = {}
    for file in run.glob(f"checkpoints/{stage}-under-way/{unit}.json"):
        name = f"{file.parent.name.removesuffix('-under-way')},{file.stem}"
        with suppress(FileNotFoundError):  # it has just ended
            found[name] = [epoch["seconds"] for epoch in json.loads(file.read_text())["history"]]
    return found


def assert_epochs_kept(run: Path, before: dict[str, list[float]]) -> None:
    """Each epoch stored before a fault is in the history as it was: done again, it would have taken other seconds."""
    history = read_table(run, "history")
    for name, seconds in before.items():
        stage, unit = name.split(",", 1)
        rows = history[(history["stage"] == stage) & (history["unit"] == unit)].sort_values("epoch")
        assert rows["seconds"].tolist()[: len(seconds)] == seconds, name


def assert_as_undisturbed(run: Path | str, undisturbed: Path, stage: str) -> None:
    """Every unit of the stage is finished, and all that is stored equals what the undisturbed run stored."""
    store, other = RunStore.open(run), RunStore.open(undisturbed)
    done = {name: (finished, planned) for name, finished, planned in progress(store, plans(Run(store)))}
    assert done[stage][0] == done[stage][1], done
    assert_stored_as_undisturbed(store, other)


def assert_stored_as_undisturbed(store: RunStore, other: RunStore) -> None:
    """What is stored is whole, and equals what the undisturbed run stored of the same units."""
    for table in (
        "networks",
        "history",
        "decompositions",
        "configurations",
        "selections",
        "validations",
        "alpha_sweep",
    ):
        units = sorted(store.units(table))
        assert set(units) <= other.finished_units(table)
        ours, theirs = (each.read_units(table, units).drop(columns=CLOCKS, errors="ignore") for each in (store, other))
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True, obj=table)
    assert store.damaged == []


# Faults. Each is given the driver's process, the run folder, the stage and a generator for its choices; it returns the
# status with which the driver ended.


def kill_driver(process: Driver, run: Path, stage: str, choices: random.Random) -> int:
    process.kill()
    return process.ended(PATIENCE)


def terminate_driver(process: Driver, run: Path, stage: str, choices: random.Random) -> int:
    process.terminate()
    return process.ended(PATIENCE)


def interrupt_all(process: Driver, run: Path, stage: str, choices: random.Random) -> int:
    """As Ctrl-C on a terminal does: the whole process group gets it."""
    os.killpg(process.pid, signal.SIGINT)
    return process.ended(PATIENCE)


def kill_worker(process: Driver, run: Path, stage: str, choices: random.Random) -> int:
    while not (victims := workers(process.mark)) and process.poll() is None:  # the first one is still starting, say
        time.sleep(0.02)
    if victims:
        os.kill(choices.choice(sorted(victims)), signal.SIGKILL)
    status = process.ended(PATIENCE)
    assert victims or "finished after" in process.log.read_text(), "there was no worker to kill"
    return status


def damage_tables(process: Driver, run: Path, stage: str, choices: random.Random) -> int:
    return _damage(process, lambda: _own_files(run, stage, ".parquet"), choices)


def damage_checkpoints(process: Driver, run: Path, stage: str, choices: random.Random) -> int:
    return _damage(process, lambda: _own_files(run, stage, ".safetensors"), choices)


def damage_tune(process: Driver, run: Path, stage: str, choices: random.Random) -> int:
    def files() -> list[Path]:
        found = [file for file in run.glob("tune/**/*") if file.is_file() and file.stat().st_size]
        ours = [file for file in found if file.stat().st_mtime >= process.started]
        return sorted(ours if stage in ("validate", "sweep-alpha") else found)

    return _damage(process, files, choices)


def _own_files(run: Path, stage: str, ending: str) -> list[Path]:
    """Return what the stage has stored: others are done again by their own commands."""
    patterns = (*STAGES[stage].own, STAGES[stage].sign)
    found = {file for pattern in patterns for file in run.glob(pattern)}
    return sorted(file for file in found if file.name.endswith(ending) and not file.name.startswith("."))


def _damage(process: Driver, files: Callable[[], list[Path]], choices: random.Random) -> int:
    """Kill the driver as soon as there is something to damage, and do so when no process of it writes any more."""
    while not files() and process.poll() is None:
        time.sleep(0.01)
    status = kill_driver(process, Path(), "", choices)
    assert_nothing_left(process.mark, but_starting=True)
    there = files()
    assert there, f"nothing to damage:\n{process.log.read_text()}"
    for file in choices.sample(there, min(3, len(there))):
        content = bytearray(file.read_bytes())
        for place in choices.sample(range(len(content)), min(20, len(content))):
            content[place] ^= 0xFF
        file.write_bytes(bytes(content))
        process.damaged[file] = bytes(content)
    return status


def fill(process: Driver, file: Path) -> None:
    """Take all room that there is on a disk, and what becomes free, until the driver ends."""
    with file.open("wb", buffering=0) as filler:
        while process.poll() is None:
            try:
                filler.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                time.sleep(0.002)


Fault = Callable[[Driver, Path, str, random.Random], int]
FAULTS: dict[str, tuple[Fault, int]] = {
    "driver killed": (kill_driver, -signal.SIGKILL),
    "driver terminated": (terminate_driver, 143),
    "interrupted": (interrupt_all, 130),
    "worker killed": (kill_worker, 0),
    "damaged tables": (damage_tables, -signal.SIGKILL),
    "damaged checkpoints": (damage_checkpoints, -signal.SIGKILL),
    "damaged Tune files": (damage_tune, -signal.SIGKILL),
}
"""Each fault, and the exit status of a driver that it meets."""
TAKES_NO_FILE = ("driver killed", "driver terminated", "interrupted", "worker killed")
"""Faults that may come before the stage has stored anything."""
