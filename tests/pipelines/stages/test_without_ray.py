"""The tests of stages and commands need no Ray, and would fail if what they test did."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from without_ray import ON_RAY

FOLDERS = (Path(__file__).parent, Path(__file__).parents[1] / "commands")
SOURCES = Path(__file__).parents[3]


def imports(file: Path) -> set[str]:
    """Return the modules that a file imports, and what it imports from each as if that were a module too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_an_import_of_ray_fails_here() -> None:
    with pytest.raises(AssertionError, match="Ray is imported, by an import of ray.tune"):
        import ray.tune  # noqa: F401
    with pytest.raises(AssertionError, match="Ray is imported, by an import of pipelines.execution"):
        from pipelines.execution import cluster  # noqa: F401


def test_these_tests_do_not_import_it_themselves() -> None:
    files = [file for folder in FOLDERS for file in folder.glob("*.py") if file != Path(__file__)]
    assert len(files) > 10
    for file in files:
        assert not {name for name in imports(file) if name.split(".")[0] == "ray" or name in ON_RAY}, file


def test_the_modules_that_import_ray_are_all_known() -> None:
    """At their top: an import in a function is met when the function is called."""
    found = set()
    for file in (SOURCES / "pipelines").rglob("*.py"):
        top = ast.parse(file.read_text(encoding="utf-8")).body
        names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
        if any(name.split(".")[0] == "ray" for name in names):
            found.add(".".join(file.relative_to(SOURCES).with_suffix("").parts))
    assert found == ON_RAY
