"""Comparing times on a machine whose speed changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gross_ray.search import timing
from gross_ray.search.timing import Work, cpu_clock, typical_ms, undisturbed_logs

MS = {"a": 2.0, "b": 0.5, "c": 7.0, "d": 1.0}


def named(name: str) -> Work:
    return lambda: name


def disturbed(
    monkeypatch: pytest.MonkeyPatch, disturbance: Callable[[int, int], float]
) -> tuple[dict[str, Work], list[str]]:
    """Let each sample take its call's time in `MS`, times the disturbance of its round and place."""
    seen: list[str] = []

    def sample(work: Work, clock: object) -> float:
        name = str(work())
        turn, place = divmod(len(seen), len(MS))
        seen.append(name)
        return MS[name] * disturbance(turn, place)

    monkeypatch.setattr(timing, "_sample_ms", sample)
    return {name: named(name) for name in MS}, seen


def no_clock(work: Work) -> float:
    raise AssertionError


def test_the_machine_s_changing_speed_and_single_disturbances_are_divided_out(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    rounds = 21
    speeds = random.uniform(0.5, 2.0, timing._WARM_UP_ROUNDS + rounds)
    hit = random.random((len(speeds), len(MS))) < 0.1
    works, seen = disturbed(monkeypatch, lambda turn, place: speeds[turn] * (7.0 if hit[turn, place] else 1.0))
    times = typical_ms(works, rounds, no_clock)
    usual = np.median(speeds[timing._WARM_UP_ROUNDS :])
    assert times == pytest.approx({name: ms * usual for name, ms in MS.items()})
    assert seen == list(MS) * len(speeds)


def test_warm_up_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    works, _ = disturbed(monkeypatch, lambda turn, place: 1.0 if turn >= 2 else 50.0 + turn + place)
    assert typical_ms(works, 3, no_clock) == pytest.approx(MS)


def test_each_round_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    works, _ = disturbed(monkeypatch, lambda turn, place: 1.25 if (turn, place) == (3, 1) else 1.0)
    logs = undisturbed_logs(works, 4, no_clock)
    expected = np.tile(np.log(list(MS.values())), (4, 1))
    expected[1, 1] += np.log(1.25)  # after two rounds of warm-up
    np.testing.assert_allclose(logs, expected)


def test_a_sample_is_the_fastest_call_after_an_untimed_one() -> None:
    times = iter([1.0, 5.0, 3.0, 4.0])
    assert timing._sample_ms(lambda: None, lambda _: next(times)) == 3.0
    assert not list(times)


@pytest.mark.parametrize(("threads", "expected_ms"), [(1, 75), (2, 750)])
def test_one_thread_is_timed_by_cpu_time_and_more_by_wall_time(
    monkeypatch: pytest.MonkeyPatch, threads: int, expected_ms: float
) -> None:
    now = SimpleNamespace(s=100.0)

    def work() -> None:
        now.s += 0.75

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now.s, process_time=lambda: now.s / 10))
    assert cpu_clock(threads)(work) == pytest.approx(expected_ms)


def test_device_name_is_the_processor_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    monkeypatch.setattr(timing, "Path", lambda path: listed)
    monkeypatch.setattr(timing.platform, "processor", lambda: "")
    monkeypatch.setattr(timing.platform, "machine", lambda: "riscv64")
    assert timing.device_name(torch.device("cpu")) == "riscv64"
    listed.write_text("processor\t: 0\n")
    assert timing.device_name(torch.device("cpu")) == "riscv64"
    listed.write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nprocessor\t: 1\nmodel name\t: Other\n")
    assert timing.device_name(torch.device("cpu")) == "Some CPU: 3 GHz"


def test_threads_are_restored_after_an_error(two_threads: None) -> None:
    with pytest.raises(ValueError), timing.threads(1):
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == 2
