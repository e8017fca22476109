"""A start of Ray that cannot succeed any more ends at once, not when Ray gives up."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gross_ray.errors import ResourcesError
from pipelines.execution import cluster, signals, starting
from pipelines.execution.cluster import connected
from pipelines.execution.starting import StartFailedError, watched
from pipelines.resources import Resources

LONG = 300.0


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(starting, "dead_servers", dict)


def _stubborn() -> None:
    """Wait as Ray does, which takes every Exception for one that may pass."""
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        try:
            time.sleep(LONG)
        except Exception:
            continue


def test_the_death_of_a_server_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([{"7": "raylet"}, {"7": "raylet"}])  # that one died before
    monkeypatch.setattr(starting, "dead_servers", lambda: next(states, {"7": "raylet", "8": "gcs_server"}))
    with pytest.raises(StartFailedError, match="its server gcs_server ended"), watched(LONG):
        _stubborn()


def test_a_start_is_bounded_in_time() -> None:
    with pytest.raises(StartFailedError, match="not done after 0.01 s"), watched(0.01):
        _stubborn()


def test_nothing_is_left_of_the_watch() -> None:
    before = signal.getsignal(signal.SIGALRM), threading.active_count()
    with watched(LONG):
        assert threading.active_count() == before[1] + 1
    assert (signal.getsignal(signal.SIGALRM), threading.active_count()) == before


def test_other_threads_start_unwatched() -> None:
    ended = []

    def start() -> None:
        with watched(0.0):
            ended.append(True)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert ended == [True]


def test_a_failed_start_is_one_line_with_its_logs_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        _stubborn()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster, "START_SECONDS", 0.01)
    monkeypatch.setattr(signals, "_half_started", False)
    with pytest.raises(ResourcesError) as error, connected(Resources(num_cpus=1)):
        pass
    line = str(error.value)
    assert line.startswith("Ray does not start on this machine: not done after 0.01 s; its logs are in /")
    assert line.endswith("/ray/session_latest/logs; use --in-process, which needs no Ray")
    assert signals._half_started  # Ray's threads may be alive: the process leaves without Python's clean-up


def test_an_error_of_ray_is_one_line_with_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(ResourcesError) as error, connected(Resources(num_cpus=1)):
        pass
    line = str(error.value)
    assert "\n" not in line and "--address" not in line
    assert line.startswith("Ray does not start on this machine: Exception: The current node timed out during startup.")
    (file,) = tmp_path.iterdir()
    assert f"; the full traceback is in {file}; " in line
    assert "This could happen" in file.read_text()
