"""A driver on Ray, killed in each stage: the same command ends the run with the tables of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from miniature import assert_equal_tables, run_command

pytestmark = pytest.mark.faults

STAGE_SIGNS = {
    "train": "checkpoints/train-under-way/*.safetensors",
    "decompose": "tables/decompositions/*.parquet",
    "reconstruct": "checkpoints/reconstruct-under-way/*.safetensors",
    "finetune": "checkpoints/finetune-under-way/*.safetensors",
    "search": "tables/configurations/*.parquet",
    "validate": "checkpoints/validate-finetune-under-way/*.safetensors",
    "sweep-alpha": "checkpoints/finetune-under-way/alpha=4*.safetensors",
}
"""A file that is there while the stage is under way: the first unit or epoch of it is stored."""


def test_killed_in_each_stage_the_run_still_ends_with_equal_tables(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    stored: dict[Path, int] = {}
    for stage, sign in STAGE_SIGNS.items():
        _kill_at(run, stage, sign)
        stored |= {file: file.stat().st_mtime_ns for file in run.glob("tables/*/[!.]*.parquet")}
    ended = subprocess.run(run_command(run), capture_output=True, text=True, check=False, timeout=400)
    assert ended.returncode == 0, ended.stderr
    assert_equal_tables(whole_run[0], run)
    assert {file: file.stat().st_mtime_ns for file in stored} == stored  # what was stored is not done again
    assert list(run.rglob(".*.tmp")) == []


def _kill_at(run: Path, stage: str, sign: str) -> None:
    log = run.parent / f"{stage}.log"
    with log.open("w") as output:
        process = subprocess.Popen(run_command(run), stdout=output, stderr=output)
        deadline = time.monotonic() + 200
        while not any(run.glob(sign)):
            assert process.poll() is None, f"{stage}: ended before it was killed:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"{stage}: no sign of it:\n{log.read_text()}"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
