"""The members of execution are interchangeable: Ray makes the tables that one process makes without it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from miniature import assert_equal_tables, command, run_words


def threads(run: Path) -> dict[str, int]:
    """Return the threads of each kind of units."""
    files = (run / "checkpoints/threads").glob("*.json")
    return {file.stem: json.loads(file.read_text())["threads"] for file in files}


def test_a_run_on_ray_has_the_tables_of_one_in_process_bit_for_bit(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = subprocess.run(
        command(*run_words(run, "--num-cpus", "1")), capture_output=True, text=True, check=False, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    assert threads(run) == threads(whole_run[0]) == dict.fromkeys(threads(run), 1)
    assert ended.stdout == whole_run[1]
    assert_equal_tables(whole_run[0], run)
