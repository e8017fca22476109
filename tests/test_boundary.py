import os
import subprocess
import sys
from pathlib import Path

import pytest

import gross_ray

FORBIDDEN = ("ray", "click", "rich")
ROOT = Path(gross_ray.__file__).parents[1]
CHECK = f"""
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
modules = [found.name for found in pkgutil.walk_packages(package.__path__, sys.argv[1] + ".")]
for name in modules:
    importlib.import_module(name)
print("imported", len(modules))
print(*[name for name in {FORBIDDEN!r} if name in sys.modules])
"""


def forbidden_imports(package: str, folder: Path) -> tuple[int, list[str]]:
    """Return how many modules a fresh interpreter imported, and which of the forbidden packages came with them."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", CHECK, package]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported, found = done.stdout.splitlines()[-2:]
    return int(imported.split()[1]), found.split()


def test_library_imports_neither_ray_nor_click_nor_rich() -> None:
    num_modules, found = forbidden_imports("gross_ray", ROOT)
    files = [file for file in (ROOT / "gross_ray").rglob("*.py") if file.name != "__init__.py"]
    assert num_modules >= len(files)
    assert found == []


@pytest.mark.parametrize("forbidden", ["click", "rich"])
def test_the_check_above_can_fail(tmp_path: Path, forbidden: str) -> None:
    inner = tmp_path / "offender" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").touch()
    (inner / "__init__.py").touch()
    assert forbidden_imports("offender", tmp_path) == (1, [])
    (inner / "deep.py").write_text(f"import {forbidden}\n")
    assert forbidden_imports("offender", tmp_path) == (2, [forbidden])
