"""The quickstart in miniature: run in this process or on Ray, and the tables in which two runs of it must agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
from click.testing import CliRunner, Result

from cli import main
from gross_ray import read_table
from gross_ray.run.tables import TABLES

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "data.limit_train=200",
    "data.limit_validation=60",
    "data.limit_test=60",
    "training.epochs=2",
    "training.milestones=[1]",
    "training.seeds=2",
    "decomposition.max_steps=15",
    "reconstruction.epochs=2",
    "finetuning.epochs=2",
    "search.form=dense",
    "search.memory_budget=67108864",
    "validation.seeds=1",
    "validation.finetuning.epochs=2",
]
"""The form of the layers and the memory of the search are fixed, so that no number in the tables depends on a timing.

Every kind has at least 2 units, or several for each worker, so that each unit gets 1 thread: in this process with
`--num-cpus 1`, and on Ray with 1 or 2 cores. With the same threads sums round alike: all these runs have equal tables.
"""
CLOCKS = ["seconds", "images_per_second"]
"""The only columns in which two runs of one experiment may differ."""


def run_words(out: Path | str, *more: str) -> list[str]:
    """Return the words after `gross` that run the miniature."""
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["run", "--preset", "quickstart", "--out", str(out), *settings, *more]


def invoke(*words: str | Path) -> Result:
    """Run `gross` in this process; what is not the exit of a command is raised."""
    result = CliRunner().invoke(main, [str(word) for word in words], prog_name="gross")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def do(*words: str | Path) -> Result:
    """Run a command that does units, in this process on one core; it must succeed."""
    result = invoke(*words, "--in-process", "--num-cpus", "1")
    assert result.exit_code == 0, result.stderr
    return result


def command(*arguments: str) -> list[str]:
    """Return the command line of `gross` in a process of its own."""
    return [sys.executable, str(ROOT / "cli.py"), *arguments]


def run_command(out: Path | str, *more: str) -> list[str]:
    """Return the command line that runs the miniature on Ray."""
    return command(*run_words(out, "--num-cpus", "2", *more))


def gross(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `gross` in a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=300)


def tables(run: Path | str) -> dict[str, pd.DataFrame]:
    """Return every table of a run that its experiment alone decides, without the clocks."""
    # Latencies are clocks, and the miniature leaves no learning rate open for a range test.
    undecided = ("runs", "layer_latencies", "runtime_latencies", "range_tests")
    decided = [name for name in TABLES if name not in undecided]
    return {name: read_table(run, name).drop(columns=CLOCKS, errors="ignore") for name in decided}


def assert_equal_tables(one: Path | str, other: Path | str) -> None:
    """Compare all that the experiment alone decides, bit for bit; no table may be empty."""
    theirs = tables(other)
    for name, frame in tables(one).items():
        assert len(frame), f"table {name} is empty"
        pd.testing.assert_frame_equal(frame, theirs[name], check_exact=True, obj=name)
