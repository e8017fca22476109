"""Commands load only the large packages that they need: torch alone takes more than a second."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gross_ray
from gross_ray.presets import preset
from gross_ray.run.progress import STORED, store_plans
from gross_ray.run.store import RunStore

ROOT = Path(gross_ray.__file__).parents[1]
LARGE = ("torch", "torchvision", "pandas", "ray", "scipy", "plotly", "rich")
CHECK = f"""
import sys
from cli import main
try:
    main(sys.argv[1:], prog_name="gross")
except SystemExit as end:
    print("status", end.code)
print("loaded", *[name for name in {LARGE!r} if name in sys.modules])
"""


def loaded_by(*arguments: str) -> set[str]:
    """Return which of the large packages a command has loaded when it ends, in a fresh interpreter."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    *_, status, loaded = done.stdout.splitlines()
    assert status in ("status 0", "status None"), done.stderr
    return set(loaded.split()[1:])


@pytest.fixture
def new_run(tmp_path: Path) -> str:
    return str(RunStore.create(tmp_path / "run", preset("quickstart")).path)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["search", "--help"], ["presets"]], ids=" ".join)
def test_help_and_presets_load_no_large_package(arguments: list[str]) -> None:
    assert loaded_by(*arguments) == set()


def test_status_counts_files_and_loads_no_large_package(new_run: str) -> None:
    assert "torch" in loaded_by("status", new_run)  # nothing has planned this run yet
    store_plans(RunStore.open(new_run), dict.fromkeys(STORED) | {"train": [["seed=0"], ["seed=1"]]})
    assert loaded_by("status", new_run) == set()


def test_a_table_is_printed_without_torch_and_ray(new_run: str) -> None:
    assert loaded_by("show", new_run, "networks") & {"torch", "ray"} == set()


def test_the_checks_above_can_fail() -> None:
    assert "torch" in loaded_by("inspect", "--model", "four-conv")


def test_the_library_alone_loads_no_large_package() -> None:
    code = f"import sys, gross_ray; print(*[name for name in {LARGE!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
