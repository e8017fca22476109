"""What the stages of one session share, and a store that is away when Ray Tune starts."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pipelines.tuning import Tuning
from s3_server import Door, uri

from gross_ray.errors import DamagedFileError, StorageError, UnitsFailedError
from gross_ray.presets import preset
from gross_ray.run import storage
from gross_ray.run.store import RunStore
from pipelines import trials
from pipelines.commands.terminal import Reporter
from pipelines.driver import DataSource, Session
from pipelines.execution.cluster import Cluster, Resources
from pipelines.units import Context, Unit
from pipelines.watching import StageProgress

UNITS = [Unit(f"seed={seed}") for seed in range(11)]
EXPERIMENT = preset("quickstart").override(["data.limit_train=4", "data.limit_validation=2", "data.limit_test=2"])


class Quiet(Reporter):
    @contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[StageProgress]:
        yield StageProgress(name, total, done)


@pytest.fixture
def session(cluster: Cluster, door: Door) -> Iterator[Session]:
    store = RunStore.create(uri(door.port, "session"), EXPERIMENT)
    with Session.opened(store, Resources(num_cpus=2, device="cpu"), DataSource(), Quiet()) as opened:
        yield opened
    for unit in UNITS:
        store.delete_checkpoint("done", unit.name)


def work(context: Context, unit: Unit) -> str:
    context.store.save_checkpoint("done", unit.name, {}, {"process": os.getpid()})
    return "done"


def _finished(session: Session) -> set[str]:
    return set(session.store.checkpoints("done"))


def _processes(session: Session) -> set[int]:
    return {session.store.load_checkpoint("done", unit)[1]["process"] for unit in _finished(session)}


def test_stages_on_actors_share_their_processes(session: Session) -> None:
    session.run("train", UNITS[:4], work, lambda: _finished(session))
    first = _processes(session)
    assert os.getpid() not in first
    for unit in UNITS[:4]:
        session.store.delete_checkpoint("done", unit.name)
    session.run("decompose", UNITS[4:8], work, lambda: _finished(session))
    assert _finished(session) == {unit.name for unit in UNITS[4:8]}
    assert _processes(session) & first  # not <=: one that was slow to start may have done nothing at first


def test_damage_that_is_found_after_the_last_stage_is_told(tmp_path: Path) -> None:
    told = io.StringIO()
    store = RunStore.create(tmp_path / "run", EXPERIMENT)
    with Session.opened(store, Resources(num_cpus=1, device="cpu"), DataSource(), Reporter(told)):
        RunStore.open(tmp_path / "run").write_table("history", "train,seed=0", [])
        (tmp_path / "run/tables/history/train,seed=0.parquet").write_bytes(b"")
        with pytest.raises(DamagedFileError):
            store.read_table("history")
        assert store.finished_units("history") == set()
    line = "damaged file tables/history/train,seed=0.parquet: deleted; its stage, asked for as before, makes it anew"
    assert line in told.getvalue()


def test_units_that_do_not_end_are_all_named(session: Session) -> None:
    with pytest.raises(UnitsFailedError, match="validate: 11 of 11 units did not end: ") as told:
        session.run("validate", UNITS, work, set)
    assert all(f"{unit.name}," in str(told.value) or f"{unit.name} (" in str(told.value) for unit in UNITS)


def test_a_store_that_is_away_when_tune_starts_is_asked_again(
    session: Session, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[list[str]] = []

    def run_trials(stage: str, work: Any, store: RunStore, units: list[Unit], **rest: Any) -> dict[str, str]:
        starts.append([unit.name for unit in units])
        if len(starts) == 1:
            door.refusals += [(503, "SlowDown")] * 1000
        return REAL(stage, work, store, units, **rest)

    monkeypatch.setattr(trials, "run_trials", run_trials)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: door.refusals.clear())
    session.run("validate", UNITS[:2], work, lambda: _finished(session), tuning=Tuning())
    assert starts == [["seed=0", "seed=1"]] * 2
    assert _finished(session) == {"seed=0", "seed=1"}


def test_a_store_that_refuses_tune_is_not_asked_again(
    session: Session, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_trials(*given: Any, **rest: Any) -> dict[str, str]:
        door.refusals += [(403, "AccessDenied")] * 3
        return REAL(*given, **rest)

    monkeypatch.setattr(trials, "run_trials", run_trials)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: pytest.fail("asked again"))
    with pytest.raises(StorageError, match="cannot write s3://runs/session/tune: .*ACCESS_DENIED"):
        session.run("validate", UNITS[:2], work, lambda: _finished(session), tuning=Tuning())


REAL = trials.run_trials
