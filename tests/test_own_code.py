"""User modules with the same names as gross_ray's, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NET = "from torch import nn\ndef net():\n    return nn.Conv2d(3, 4, 3)\n"
PROGRAM = """
import sys
sys.path.append(sys.argv[1])
import cli, pipelines.{imported}
from pipelines.execution.cluster import module_of
from gross_ray.models import factory_of
from gross_ray.errors import InvalidValueError
try:
    print(type(factory_of(sys.argv[2])()).__name__, module_of(sys.argv[2]))
except InvalidValueError as error:
    print("refused:", error)
"""


def found(folder: Path, name: str, imported: str = "units", cwd: Path = ROOT) -> str:
    program = PROGRAM.format(imported=imported)
    command = [sys.executable, "-c", program, str(folder), name]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", [True, False])
def test_a_users_folder_called_pipelines_is_found_after_ours(tmp_path: Path, package: bool) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "nets.py").write_text(NET)
    if package:
        (tmp_path / "pipelines" / "__init__.py").write_text("")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.append({str(tmp_path)!r})\n"
    program += PROGRAM.format(imported="units").replace("sys.path.append(sys.argv[1])", "")
    command = [sys.executable, "-c", program, "", "pipelines.nets:net"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Conv2d", str(tmp_path / "pipelines")], done.stderr


@pytest.mark.parametrize("name", ["pipelines.units:net", "pipelines.units.deeper:net"])
def test_a_users_module_that_ours_hides_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "units.py").write_text(NET)
    printed = found(tmp_path, name)
    assert printed.startswith(
        f"refused: model '{name}': {name.partition(':')[0]} is a module of gross_ray itself, which"
    )
    assert str(tmp_path) in printed and len(printed.splitlines()) == 1


def test_a_users_module_called_cli_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "cli.py").write_text(NET)
    printed = found(tmp_path, "cli:net")
    assert f"cli is a module of gross_ray itself, which hides your {tmp_path / 'cli.py'}; rename yours" in printed
    assert len(printed.splitlines()) == 1
