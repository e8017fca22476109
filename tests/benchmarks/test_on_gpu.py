"""The command for a GPU: all of it in miniature, limits, parts that fail, and the table in benchmarks/README.md."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gross_ray.run.store import RunStore

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
NOT_THERE = ("ray", "tensorly", "optuna", "plotly", "openvino", "moto", "botocore", "jsonschema", "tensorboardX")
"""Packages that the machine with the GPU does not have."""


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import on_gpu

    yield on_gpu
    for name in ("on_gpu", "gpu_parts", "decomposition", "search", "supernet", "training"):
        sys.modules.pop(name, None)


def test_everything_is_measured_without_what_the_machine_lacks(on_gpu: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in NOT_THERE:
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not there')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(blocked), str(ROOT)])}
    command = [sys.executable, str(FOLDER / "on_gpu.py"), "--cpu", "--out", str(tmp_path / "out"), "--minutes", "20"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stderr + log[-3000:]
    found = on_gpu.Results.of(tmp_path / "out")
    for part, (cases_of, _) in on_gpu.PARTS.items():
        assert found.ends[part].startswith("done after "), (part, found.ends[part], log[-3000:])
        for name in cases_of(on_gpu.MINIATURE):
            figure = found.figures[f"{part}/{name}"]
            assert figure["value"] is not None, (part, name, figure, log[-3000:])
            assert figure["value"] > 0 or part in ("tests", "cifar"), (part, name, figure)
    tests = found.figures["tests/tests that need a GPU"]
    assert tests["note"] == "0 passed, 0 failed, 0 error, 2 skipped, status 0"  # every file of tests was imported
    assert on_gpu.NOT_MEASURED not in (tmp_path / "out" / "results.md").read_text()
    with tarfile.open(tmp_path / "out" / "cifar.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    kept = RunStore.open(tmp_path / "cifar")
    assert len(kept.read_table("validations")) and (tmp_path / "cifar" / "checkpoints" / "train").is_dir()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "cifar.tar",
        "log.txt",
        "results.json",
        "results.md",
    ]


def run(on_gpu: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--cpu", "--out", str(folder), *words])
    on_gpu.main()
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def parts(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the parts: a limit in seconds, and by name a value, or what to call, for each case."""

    def replace(**parts: tuple[float, dict[str, Any]]) -> None:
        import gpu_parts

        def case(value: Any) -> Any:
            return gpu_parts.Case(value if callable(value) else lambda: gpu_parts.Figure(value, "s"), "a target")

        made = {
            name: (lambda _, cases=cases: {one: case(value) for one, value in cases.items()}, limit)
            for name, (limit, cases) in parts.items()
        }
        monkeypatch.setattr(on_gpu, "PARTS", made)

    return replace


def wait() -> None:
    time.sleep(3600)


def test_a_part_is_stopped_by_its_limit_and_keeps_its_figures(
    on_gpu: Any, parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts(slow=(1, {"quick": 1.0, "long": wait, "after": 2.0}), other=(60, {"one": 3.0}))
    found = run(on_gpu, monkeypatch, tmp_path)
    assert set(found["figures"]) == {"slow/quick", "other/one"}
    assert found["ends"]["slow"].startswith("stopped by its limit after ")
    assert found["ends"]["other"].startswith("done after ")
    table = (tmp_path / "results.md").read_text()
    assert "| quick | 1 s |  | a target |  |" in table and "| long | not measured |  | a target |  |" in table


def test_the_rest_is_given_up_when_the_time_is_over(
    on_gpu: Any, parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(on_gpu, "RESERVE", 0.0)
    monkeypatch.setattr(on_gpu, "STARTED", time.monotonic())
    parts(first=(60, {"quick": 1.0, "long": wait}), second=(60, {"one": 3.0}))
    found = run(on_gpu, monkeypatch, tmp_path, "--minutes", "0.3")
    assert set(found["figures"]) == {"first/quick"}
    assert found["ends"]["second"] == "given up: the time was over"


def test_a_failure_costs_neither_the_other_cases_nor_the_other_parts(
    on_gpu: Any, parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise ValueError("no such\nkernel")

    parts(
        first=(60, {"bad": fail, "good": 1.0}),
        second=(60, {"dead": lambda: os._exit(3), "never": 1.0}),
        third=(60, {"one": 2.0}),
    )
    found = run(on_gpu, monkeypatch, tmp_path)
    assert found["figures"]["first/bad"]["note"] == "failed: ValueError: no such kernel"
    assert "ValueError: no such" in (tmp_path / "log.txt").read_text()
    assert set(found["figures"]) == {"first/bad", "first/good", "third/one"}
    assert found["machine"]["device"] == "CPU"
    assert found["ends"]["second"].startswith("failed, see log.txt")
    assert "| bad | failed |" in (tmp_path / "results.md").read_text()


def test_a_part_that_dies_at_once_costs_nothing_else(
    on_gpu: Any, parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts(first=(60, {"one": 1.0}))
    monkeypatch.setattr(on_gpu, "of_machine", lambda _: os._exit(3))
    monkeypatch.setenv("PATH", "")  # nor is git there
    found = run(on_gpu, monkeypatch, tmp_path)
    assert found["figures"] == {} and found["ends"]["first"].startswith("failed, see log.txt")
    assert "commit unknown" in found["ends"]["first"]
    assert "device unknown" in (tmp_path / "results.md").read_text()


def test_a_failing_baseline_costs_the_ratio_alone(on_gpu: Any) -> None:
    import gpu_parts

    asked = []

    def fail(what: str) -> float:
        asked.append(what)
        raise OSError("no memory is left")

    for _ in range(2):
        figure = gpu_parts._against(3.0, "s", "DataLoader", fail, "loader")
        assert (figure.value, figure.ratio, figure.note) == (3.0, None, "DataLoader failed, see log.txt")
    assert asked == ["loader"]


def test_a_second_run_adds_to_the_first(
    on_gpu: Any, parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts(first=(60, {"one": 1.0}), second=(60, {"one": 2.0}))
    run(on_gpu, monkeypatch, tmp_path, "--parts", "first")
    parts(first=(60, {"one": 5.0}), second=(60, {"one": 2.0}))
    found = run(on_gpu, monkeypatch, tmp_path, "--parts", "second")
    assert {name: figure["value"] for name, figure in found["figures"].items()} == {"first/one": 1.0, "second/one": 2.0}
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="it has results of cpu; name another folder"):
        on_gpu.main()


def test_without_a_gpu_the_command_says_so(on_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="torch finds no GPU here; --cpu measures everything in miniature"):
        on_gpu.main()


def test_the_table_in_the_readme_is_that_of_the_stored_figures(on_gpu: Any) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert on_gpu.with_table(readme, on_gpu.Results.of(ROOT / "results" / "gpu")) == readme
    assert readme.count("not measured |") > 50 or (ROOT / "results" / "gpu").exists()
