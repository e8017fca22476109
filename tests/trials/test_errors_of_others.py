"""Errors that no one foresaw, from any library: one line, an exit status, and a file with the traceback."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cli import main
from gross_ray.presets import preset
from gross_ray.run import tracebacks
from gross_ray.run.store import RunStore

BEFORE = "Error: RuntimeError: CUDA error: an illegal access; the full traceback is in "


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return RunStore.create(tmp_path / "run", preset("quickstart")).path


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have a temporary folder of the test's own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv(tracebacks.VARIABLE, raising=False)
    return folder


def words_of(command: click.Command, run: Path | str) -> list[str]:
    """Return words with which click accepts a command: its required parameters have any value, RUN and --out `run`."""
    words = [command.name or ""]
    for parameter in command.params:
        if parameter.required:
            words += [] if isinstance(parameter, click.Argument) else [parameter.opts[0]]
            words.append({"run": str(run), "out": str(run), "budgets": "macs=60%"}.get(parameter.name or "", "4-8-64"))
    return words


def failing(monkeypatch: pytest.MonkeyPatch, words: list[str], error: BaseException) -> Result:
    """Run a command whose body raises `error`."""

    def body(**_: Any) -> None:
        raise error

    monkeypatch.setattr(main.commands[words[0]], "callback", body)
    return CliRunner().invoke(main, words, prog_name="gross")


def cuda() -> RuntimeError:
    return RuntimeError("CUDA error: an illegal access\nCompile with TORCH_USE_CUDA_DSA\n")


@pytest.mark.parametrize("name", main.commands)
def test_any_command_ends_in_one_line(name: str, run: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing(monkeypatch, words_of(main.commands[name], run), cuda())
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(BEFORE)
    file = Path(line.removeprefix(BEFORE))
    needs_run = any(parameter.name in ("run", "out") for parameter in main.commands[name].params)
    assert file == run / "tracebacks.txt" if needs_run else file.parent == temporary
    text = file.read_text()
    assert "Traceback (most recent call last)" in text and "raise error" in text
    assert "Compile with TORCH_USE_CUDA_DSA" in text


def test_tracebacks_are_appended_and_the_run_folder_stays_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (cuda(), KeyError("conv7")):
        failing(monkeypatch, ["status", str(run)], error)
    text = (run / "tracebacks.txt").read_text()
    assert text.count("Traceback (most recent call last)") == 2
    assert "KeyError: 'conv7'" in text
    assert RunStore.create(run, preset("quickstart")).path == run


@pytest.mark.parametrize("run_folder", ["s3://bucket/run", "missing", "not a run", "read-only"])
def test_without_a_run_folder_to_write_it_is_in_the_temporary_folder(
    run_folder: str, run: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Path | str = run_folder if "://" in run_folder else tmp_path / run_folder
    if run_folder == "not a run":
        (tmp_path / run_folder).mkdir()
    elif run_folder == "read-only":
        place = run
        (run / "tracebacks.txt").mkdir()  # no file can be opened there: permissions do not stop root
    result = failing(monkeypatch, ["status", str(place)], cuda())
    (line,) = result.stderr.splitlines()
    (file,) = temporary.iterdir()
    assert line == f"{BEFORE}{file}"
    assert "TORCH_USE_CUDA_DSA" in file.read_text()
    assert run_folder != "not a run" or list((tmp_path / run_folder).iterdir()) == []


def test_a_run_folder_by_its_uri_has_it_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing(monkeypatch, ["status", f"file://{run}"], cuda())
    assert result.stderr == f"{BEFORE}{run / 'tracebacks.txt'}\n"


def test_where_nothing_can_be_written_the_traceback_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    result = failing(monkeypatch, ["presets"], cuda())
    *shown, line = result.stderr.splitlines()
    assert line == "Error: RuntimeError: CUDA error: an illegal access; the full traceback is above"
    assert "Traceback (most recent call last):" in shown


def test_the_environment_variable_shows_it_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROSS_RAY_TRACEBACK", "1")
    result = failing(monkeypatch, ["status", str(run)], cuda())
    assert "Traceback (most recent call last):" in result.stderr.splitlines()
    assert result.stderr.splitlines()[-1] == f"{BEFORE}{run / 'tracebacks.txt'}"


@pytest.mark.parametrize(
    ("error", "line", "kept"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.onnx"),
            "Error: a.onnx: No such file or",
            False,
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.onnx"),
            "Error: a.onnx: No space left on device; make",
            False,
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "a.onnx"),
            "Error: OSError: [Errno 24] Too many open files: ",
            True,
        ),
        (OSError("no answer"), "Error: OSError: no answer; the full traceback is in ", True),
        (EOFError(), "Error: EOFError; the full traceback is in ", True),  # click takes it for an interruption
        (MemoryError(), "Error: MemoryError; the full traceback is in ", True),
        (AssertionError(), "Error: AssertionError; the full traceback is in ", True),
    ],
)
def test_the_line_names_kind_and_reason(
    error: BaseException, line: str, kept: bool, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = failing(monkeypatch, ["status", str(run)], error)
    assert result.exit_code == 1
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1
    assert (run / "tracebacks.txt").exists() == kept


@pytest.mark.parametrize("error", [click.Abort(), KeyboardInterrupt()])
def test_an_interruption_stays_one(error: BaseException, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing(monkeypatch, ["status", str(run)], error)
    assert result.exit_code == 130
    assert result.stderr.strip().startswith("Interrupted: ")


def test_a_reader_that_closes_the_pipe_is_no_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing(monkeypatch, ["status", str(run)], BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))
    assert result.stderr == ""
    assert not (run / "tracebacks.txt").exists()
