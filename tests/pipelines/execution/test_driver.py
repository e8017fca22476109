"""The driver: who does which job, what the jobs of one session share, and a store that is away when Ray Tune starts."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from miniature import ROOT
from s3_server import Door, uri

from gross_ray import storage
from gross_ray.errors import DamagedFileError, StorageError, UnitsFailedError
from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from pipelines.capacity import Capacity
from pipelines.commands.terminal import Reporter
from pipelines.driver import DataSource, Session, redone_after_damage
from pipelines.execution.actors import Actors
from pipelines.execution.in_process import InProcess
from pipelines.execution.tune import Trials
from pipelines.resources import Resources
from pipelines.units import Context, Job, Unit
from pipelines.watching import StageProgress

EXPERIMENT = preset("quickstart").override(["data.limit_train=4", "data.limit_validation=2", "data.limit_test=2"])
RESOURCES = Resources(num_cpus=2, device="cpu")


@dataclass(frozen=True, kw_only=True)
class Mark(Unit):
    """A unit that stores the process in which it is done."""

    seed: int

    @property
    def name(self) -> str:
        return f"seed={self.seed}"


UNITS = [Mark(seed=seed) for seed in range(11)]


class Quiet(Reporter):
    @contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[StageProgress]:
        yield StageProgress(name, total, done)


@pytest.fixture
def session(cluster: Capacity, door: Door) -> Iterator[Session]:
    store = RunStore.create(uri(door.port, "session"), EXPERIMENT)
    with Session.opened(store, RESOURCES, DataSource(), Quiet()) as opened:
        yield opened
        door.refusals.clear()
    for unit in UNITS:
        store.delete_checkpoint("done", unit.name)


@pytest.fixture
def local(cluster: Capacity, tmp_path: Path) -> Iterator[Session]:
    store = RunStore.create(tmp_path / "run", EXPERIMENT)
    with Session.opened(store, RESOURCES, DataSource(), Quiet()) as opened:
        yield opened


@pytest.fixture
def in_process(tmp_path: Path) -> Iterator[Session]:
    store = RunStore.create(tmp_path / "alone", EXPERIMENT)
    with Session.opened(store, RESOURCES, DataSource(), Quiet(), in_process=True) as opened:
        yield opened


def work(context: Context, unit: Mark) -> str:
    context.store.save_checkpoint("done", unit.name, {}, {"process": os.getpid()})
    return "done"


def _job(session: Session, units: list[Mark], stage: str = "validate", **more: Any) -> Job:
    settled = {"stage": stage, "work": work, "done": lambda: _finished(session), "kind": stage, "num_equal": len(units)}
    return Job(**{"units": units, **settled, **more})


def _finished(session: Session) -> set[str]:
    return set(session.run.store.checkpoints("done"))


def _processes(session: Session) -> set[int]:
    store = session.run.store
    return {store.load_checkpoint("done", unit)[1]["process"] for unit in _finished(session)}


# Who does it


@pytest.fixture
def who(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The executors that were asked to do anything."""
    asked: list[str] = []

    def watched(member: type, do: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
        def noted(self: Any, *given: Any, **named: Any) -> dict[str, str]:
            asked.append(member.__name__)
            return do(self, *given, **named)

        return noted

    for member in (InProcess, Actors, Trials):
        monkeypatch.setattr(member, "do", watched(member, member.do))
    return asked


def test_plain_units_are_done_by_actors_and_trials_by_tune(local: Session, who: list[str]) -> None:
    local.do(_job(local, UNITS[:2], "train"))
    local.do(_job(local, UNITS[2:4], trials=True))
    local.do(_job(local, UNITS[4:5], "decompose"))
    assert who == ["Actors", "Trials", "Actors"]
    assert _finished(local) == {unit.name for unit in UNITS[:5]}
    assert os.getpid() not in _processes(local)
    assert [name.split("-")[0] for name in local.run.store.storage.folders("tune")] == ["validate"]


def test_everything_is_done_in_process_when_that_is_asked_for(in_process: Session, who: list[str]) -> None:
    in_process.do(_job(in_process, UNITS[:2], "train"))
    in_process.do(_job(in_process, UNITS[2:4], trials=True))
    assert who == ["InProcess", "InProcess"]
    assert _finished(in_process) == {unit.name for unit in UNITS[:4]}
    assert _processes(in_process) == {os.getpid()}
    assert in_process.run.store.storage.folders("tune") == []


JOB = """
from dataclasses import dataclass

from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from pipelines.driver import DataSource, Session, redone_after_damage
from pipelines.resources import Resources
from pipelines.units import Job, Unit
from pipelines.commands.terminal import Reporter


@dataclass(frozen=True, kw_only=True)
class Mark(Unit):
    @property
    def name(self):
        return "one"


def work(context, unit):
    context.store.save_checkpoint("done", unit.name, {{}}, {{}})
    return "done"


settings = ["data.limit_train=4", "data.limit_validation=2", "data.limit_test=2"]
store = RunStore.create({run!r}, preset("quickstart").override(settings))
with Session.opened(store, Resources(num_cpus=1), DataSource(), Reporter(), in_process=True) as session:
    for trials in (False, True):
        done = lambda: set(store.checkpoints("done"))
        session.do(Job(stage="s", units=[Mark()], work=work, done=done, kind="s", num_equal=1, trials=trials))
        assert done() == {{"one"}}
        store.delete_checkpoint("done", "one")
"""
CHECK = '\nimport sys\nsys.exit("Ray was imported" if "ray" in sys.modules else 0)\n'


@pytest.mark.parametrize("imported", [False, True])
def test_in_process_never_imports_ray(tmp_path: Path, imported: bool) -> None:
    """The second time shows that the check can fail."""
    program = ("import ray\n" if imported else JOB.format(run=str(tmp_path / "run"))) + CHECK
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert ended.returncode == imported, ended.stderr
    assert ("Ray was imported" in ended.stderr) == imported


# What is shared


def test_jobs_on_actors_share_their_processes(local: Session) -> None:
    """Of one slot: with num_equal=1 a unit takes both cores, so that each job has one actor."""
    store = local.run.store
    local.do(_job(local, UNITS[:4], "train", num_equal=1))
    (first,) = _processes(local)
    assert first != os.getpid()
    for unit in UNITS[:4]:
        store.delete_checkpoint("done", unit.name)
    local.do(_job(local, UNITS[4:8], "decompose", num_equal=1))
    assert _finished(local) == {unit.name for unit in UNITS[4:8]}
    assert _processes(local) == {first}


def test_damage_that_is_found_after_the_last_stage_is_reported(tmp_path: Path) -> None:
    shown = io.StringIO()
    store = RunStore.create(tmp_path / "run", EXPERIMENT)
    with Session.opened(store, Resources(num_cpus=1, device="cpu"), DataSource(), Reporter(shown)):
        RunStore.open(tmp_path / "run").write_table("history", "train,seed=0", [])
        (tmp_path / "run/tables/history/train,seed=0.parquet").write_bytes(b"")
        assert store.read_sound("history").empty
    line = "damaged file tables/history/train,seed=0.parquet: deleted; its stage, asked for as before, makes it anew"
    assert line in shown.getvalue()


def _read(context: Context, unit: Mark) -> str:
    context.store.load_checkpoint("input", "one")
    return work(context, unit)


@pytest.mark.parametrize("executor", ["in process", "actors", "tune"])
@pytest.mark.parametrize("repaired", [True, False])
def test_a_unit_that_finds_damage_is_done_again(
    executor: str, repaired: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input is made anew before, as a stage does; where it is damaged again, the units fail."""
    session: Session = request.getfixturevalue("in_process" if executor == "in process" else "local")
    store = session.run.store
    rounds: list[bool] = []
    shown: list[str] = []
    monkeypatch.setattr(session._progress, "note", shown.append)

    def make_input_and_do() -> None:
        rounds.append(store.has_checkpoint("input", "one"))
        if not rounds[-1]:
            store.save_checkpoint("input", "one", {}, {"anew": True})
            if not repaired:
                (store.path / "checkpoints/input/one.safetensors").write_bytes(b"damaged")
        session.do(_job(session, UNITS[:1], work=_read, trials=executor == "tune"))

    store.save_checkpoint("input", "one", {}, {})
    (store.path / "checkpoints/input/one.safetensors").write_bytes(b"damaged")
    if repaired:
        redone_after_damage(session, make_input_and_do)
        assert _finished(session) == {"seed=0"}
    else:
        with pytest.raises(DamagedFileError, match=r"seed=0: .*damaged checkpoint .*input/one.safetensors: "):
            redone_after_damage(session, make_input_and_do)
    assert rounds == [True, False]
    line = "damaged file checkpoints/input/one.safetensors: deleted; its stage, asked for as before, makes it anew"
    assert shown == [line]


@pytest.mark.parametrize(("number", "named"), [(5, " ("), (6, " and 1 more ("), (11, " and 6 more (")])
def test_the_first_units_that_do_not_end_are_named(in_process: Session, number: int, named: str) -> None:
    with pytest.raises(UnitsFailedError) as failed:
        in_process.do(_job(in_process, UNITS[:number], done=set))
    start = (
        f"validate: {number} of {number} units did not end: seed=0, seed=1, seed=2, seed=3, seed=4{named}seed=0: it was"
    )
    assert str(failed.value).startswith(start)


# A store that is away


def _clock(sleep: Callable[[float], object]) -> Any:
    """Stand in for `time` in the storage alone: Ray's threads sleep, too."""
    return SimpleNamespace(monotonic=time.monotonic, sleep=sleep)


def test_a_store_that_is_away_when_tune_starts_is_asked_again(
    session: Session, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[list[str]] = []
    do = Trials.do

    def away_at_first(self: Trials, job: Job, units: list[Mark], **more: Any) -> dict[str, str]:
        starts.append([unit.name for unit in units])
        if len(starts) == 1:
            door.refusals += [(503, "SlowDown")] * 1000
        return do(self, job, units, **more)

    monkeypatch.setattr(Trials, "do", away_at_first)
    monkeypatch.setattr(storage, "time", _clock(lambda seconds: door.refusals.clear()))
    session.do(_job(session, UNITS[:2], trials=True))
    assert starts == [["seed=0", "seed=1"]] * 2
    assert _finished(session) == {"seed=0", "seed=1"}


def test_a_store_that_refuses_tune_is_not_asked_again(
    session: Session, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    do = Trials.do

    def refused(self: Trials, *given: Any, **more: Any) -> dict[str, str]:
        door.refusals += [(403, "AccessDenied")] * 1000
        return do(self, *given, **more)

    monkeypatch.setattr(Trials, "do", refused)
    monkeypatch.setattr(storage, "time", _clock(lambda seconds: pytest.fail("asked again")))
    with pytest.raises(StorageError, match="cannot write s3://runs/session/tune: .*ACCESS_DENIED"):
        session.do(_job(session, UNITS[:2], trials=True))
