"""The quickstart in miniature, through the real command line, and what its tables must agree in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd

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
    "validation.seeds=1",
    "validation.finetuning.epochs=2",
]
CLOCKS = ["seconds", "images_per_second"]
"""The only columns in which two runs of one experiment may differ."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), *arguments]


def run_command(out: Path | str, *more: str) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return command("run", "--preset", "quickstart", "--out", str(out), "--num-cpus", "2", *settings, *more)


def gross(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=300)


def tables(run: Path | str) -> dict[str, pd.DataFrame]:
    """Return every table of a run that its experiment alone decides, without the clocks."""
    decided = [name for name in TABLES if name not in ("runs", "latencies", "latency_models")]
    return {name: read_table(run, name).drop(columns=CLOCKS, errors="ignore") for name in decided}


def assert_equal_tables(one: Path | str, other: Path | str) -> None:
    theirs = tables(other)
    for name, frame in tables(one).items():
        assert len(frame), f"table {name} is empty"
        pd.testing.assert_frame_equal(frame, theirs[name], check_exact=True, obj=name)
