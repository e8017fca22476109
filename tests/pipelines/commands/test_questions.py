"""Commands that only answer: they take no lock, write nothing into the run, and work beside a driver that does."""

from __future__ import annotations

from pathlib import Path

import pytest
from miniature import invoke

from gross_ray.errors import RunFolderError
from gross_ray.run.store import RunStore

QUESTIONS = {
    "search --budget": ["search", "RUN", "--budget", "macs=2.5M"],
    "search --pareto": ["search", "RUN", "--pareto", "--costs", "macs,parameters"],
    "status": ["status", "RUN"],
    "show": ["show", "RUN", "selections"],
    "report": ["report", "RUN", "--markdown"],
    "export": ["export", "RUN", "--configuration", "4-4-4", "--to", "FILE"],
}


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_is_answered_while_another_driver_works(run: Path, tmp_path: Path, question: list[str]) -> None:
    words = [str({"RUN": run, "FILE": tmp_path / "a.safetensors"}.get(word, word)) for word in question]
    alone = invoke(*words)
    assert alone.exit_code == 0, alone.stderr
    store = RunStore.open(run)
    with store.lock():
        with pytest.raises(RunFolderError, match="is in use"), RunStore.open(run).lock():
            pass  # what a command that takes the lock meets
        before = contents(run)
        beside = invoke(*words)
        assert beside.exit_code == 0, beside.stderr
        assert beside.stdout == alone.stdout
        assert contents(run) == before


def test_a_question_to_a_run_that_was_never_worked_on_leaves_no_lock(run: Path, tmp_path: Path) -> None:
    (run / ".lock").unlink(missing_ok=True)
    before = contents(run)
    for question in ("search --budget", "search --pareto", "status"):
        words = [str(run) if word == "RUN" else word for word in QUESTIONS[question]]
        assert invoke(*words).exit_code == 0
    assert contents(run) == before


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"train": []}'])
def test_plans_that_cannot_be_read_are_made_anew(run: Path, content: str) -> None:
    plans = (run / "plans.json").read_text()
    told = invoke("status", str(run)).stdout
    (run / "plans.json").write_text(content)
    assert invoke("status", str(run)).stdout == told
    assert (run / "plans.json").read_text() == content  # a question writes nothing
    assert invoke("train", str(run), "--in-process").exit_code == 0
    assert (run / "plans.json").read_text() == plans
