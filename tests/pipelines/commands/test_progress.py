"""What is shown of a stage: plain lines where the output is a file, a bar on a terminal."""

from __future__ import annotations

import io
import re

import pytest

from pipelines.commands import terminal as terminal_module
from pipelines.commands.terminal import Reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        """What was written, without the colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    return Terminal()


def test_lines_count_the_units_and_those_done_already() -> None:
    out = io.StringIO()
    with Reporter(out).stage("train", total=3, done=1) as stage:
        stage.unit_done("seed=1", "accuracy 0.5")
        stage.note("seed=2: its worker died; trying again")
        stage.unit_done("seed=2", "accuracy 0.6")
    *lines, last = out.getvalue().splitlines()
    assert lines == [
        "train: 3 units, 1 done already",
        "train: 2/3 seed=1 accuracy 0.5",
        "train: seed=2: its worker died; trying again",
        "train: 3/3 seed=2 accuracy 0.6",
    ]
    assert re.fullmatch(r"train: finished after \d+\.\d s", last)


def test_a_stage_without_work_is_one_line() -> None:
    out = io.StringIO()
    with Reporter(out).stage("search", total=6, done=6):
        pass
    assert out.getvalue() == "search: 6 units, 6 done already\n"


def test_lines_tell_of_units_under_way_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with Reporter(out).stage("train", total=2, done=0) as stage:
        monkeypatch.setattr(terminal_module, "SECONDS_BETWEEN_LINES", 1e9)
        stage.under_way({"seed=0": (0.5, "epoch 1")})
        monkeypatch.setattr(terminal_module, "SECONDS_BETWEEN_LINES", 0.0)
        stage.under_way({"seed=0": (0.5, "epoch 2"), "seed=1": (0.1, "started")})
        stage.under_way({"seed=0": (0.6, "epoch 2"), "seed=1": (0.2, "started")})
        stage.under_way({})
        monkeypatch.setattr(terminal_module, "SECONDS_OF_SILENCE", 0.0)
        stage.under_way({"seed=0": (0.7, "epoch 2")})
        stage.under_way({"seed=0": (0.8, "epoch 2")})
    assert out.getvalue().splitlines() == [
        "train: 2 units",
        "train: seed=0 epoch 2; seed=1 started",
        "train: seed=0 epoch 2",
        "train: seed=0 epoch 2",
    ]


def test_the_bar_counts_the_units_and_those_done_already(terminal: Terminal) -> None:
    with Reporter(terminal).stage("train", total=4, done=1) as stage:
        stage.under_way({"seed=1": (0.5, "epoch 3"), "seed=2": (0.75, "epoch 4")})
        stage.unit_done("seed=1", "accuracy 0.5")
        stage.unit_done("seed=2", "accuracy 0.6")
    last = terminal.text().rstrip().splitlines()[-1]
    assert last.startswith("train")
    assert "3/4" in last
    assert "seed=2 accuracy 0.6" in last


def test_the_bar_moves_with_the_units_under_way(terminal: Terminal) -> None:
    with Reporter(terminal).stage("train", total=4, done=1) as stage:
        stage.under_way({"seed=1": (0.5, "epoch 3"), "seed=2": (0.75, "epoch 4")})
    last = terminal.text().rstrip().splitlines()[-1]
    assert "2/4" in last  # 1 + 0.5 + 0.75 units
    assert "seed=1 epoch 3; seed=2 epoch 4" in last


@pytest.mark.parametrize("text", ["folder [/runs/one] is full", "layer [bold]conv2[/bold]", "x" * 300])
def test_the_bar_writes_notes_and_states_as_they_are(terminal: Terminal, text: str) -> None:
    with Reporter(terminal).stage("train", total=2, done=0) as stage:
        stage.note(text)
        stage.unit_done("seed=0", text[:40])
    assert f"train: {text}\n" in terminal.text()
    assert text[:40] in terminal.text().rstrip().splitlines()[-1]


@pytest.mark.parametrize("out", [io.StringIO(), Terminal()])
def test_a_note_outside_a_stage_is_a_line(out: io.StringIO) -> None:
    Reporter(out).note("damaged file [tables/x]: deleted")
    assert out.getvalue() == "damaged file [tables/x]: deleted\n"
