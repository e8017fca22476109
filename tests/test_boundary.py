"""Modules import only what the table of layers below allows, checked on every import statement of the sources."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import gross_ray

FORBIDDEN = ("ray", "click", "rich")
ROOT = Path(gross_ray.__file__).parents[1]

LAYERS = (
    ("gross_ray.errors",),
    (
        "gross_ray.atomic",
        "gross_ray.efforts",
        "gross_ray.fields",
        "gross_ray.model_names",
        "gross_ray.own_code",
        "gross_ray.seeds",
        "gross_ray.version",
    ),
    ("gross_ray.storage", "gross_ray.weights_file"),
    ("gross_ray.space", "gross_ray.data", "gross_ray.weights"),
    ("gross_ray.nn", "gross_ray.btd"),
    ("gross_ray.own_network",),
    ("gross_ray.models", "gross_ray.supernet"),
    ("gross_ray.export",),
    ("gross_ray.search", "gross_ray.training"),
    ("gross_ray.experiment",),
    ("gross_ray.defaults", "gross_ray.presets", "gross_ray.run"),
    ("gross_ray.compression", "gross_ray.report"),
    ("gross_ray",),  # gross_ray/__init__.py alone: the public names
    ("pipelines",),  # pipelines/__init__.py alone
    ("pipelines.home", "pipelines.nodes", "pipelines.watching", "pipelines.resources", "pipelines.units"),
    ("pipelines.capacity", "pipelines.packing"),
    ("pipelines.stages", "pipelines.execution"),
    ("pipelines.driver",),
    ("pipelines.commands",),
    ("cli",),
)
"""Folders and files from the bottom up. Each imports itself and lower layers, but not its neighbours."""
NEVER = {(f"gross_ray.{folder}", "gross_ray.data") for folder in ("nn", "btd", "supernet")}
"""Imports that are forbidden although the layers allow them: code on networks knows no datasets."""
OWNERS = {
    "ray": ("pipelines.execution",),
    "click": ("pipelines.commands", "cli"),
    "rich": ("pipelines.commands", "cli"),
}
"""Packages that only these folders and files may import."""


class Source(NamedTuple):
    """A module of the sources and all that it imports, also inside functions."""

    path: Path
    imports: tuple[str, ...]
    """Dotted modules; `from a import b` counts as a.b if that is a module of the sources, else as a."""


def module_of(path: Path) -> str:
    """Return the dotted name of a relative path."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path) -> dict[str, Source]:
    """Return the modules of the library, the pipelines and the commands, by their dotted names."""
    files = sorted([*root.glob("gross_ray/**/*.py"), *root.glob("pipelines/**/*.py"), *root.glob("cli.py")])
    known = {module_of(file.relative_to(root)): file for file in files}
    found = {}
    for name, file in known.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        imports = _imports(ast.parse(file.read_text(encoding="utf-8")), package, set(known))
        found[name] = Source(file.relative_to(root), tuple(imports))
    return found


def _imports(tree: ast.Module, package: str, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in known else base


def unit_of(module: str) -> str:
    """Return the folder or file of the table that a module of the sources belongs to."""
    return ".".join(module.split(".")[:2])


def upward_imports(found: dict[str, Source]) -> list[str]:
    """Return a line for each import that LAYERS does not allow, and each module that is not in LAYERS."""
    rank = {unit: height for height, units in enumerate(LAYERS) for unit in units}
    lines = []
    for name, source in found.items():
        unit = unit_of(name)
        if unit not in rank:
            lines.append(f"{source.path}: {unit} has no layer: give it one in LAYERS")
            continue
        for imported in source.imports:
            top, other = imported.split(".")[0], unit_of(imported)
            if top in OWNERS and unit not in OWNERS[top]:
                lines.append(f"{source.path} imports {imported}, which only {' and '.join(OWNERS[top])} may do")
            if imported not in found:
                continue
            if other not in rank:
                lines.append(f"{source.path} imports {imported}, which has no layer")
            elif other != unit and (rank[other] >= rank[unit] or (unit, other) in NEVER):
                lines.append(f"{source.path} imports {imported}, which is not below it")
    return lines


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the circles, each once, as the nodes along it."""
    found: dict[frozenset[str], list[str]] = {}
    for start in arrows:
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop(0)
            for other in sorted(arrows.get(path[-1], ())):
                if other == start:
                    found.setdefault(frozenset(path), path)
                    paths = []
                    break
                if other not in seen:
                    seen.add(other)
                    paths.append([*path, other])
    return list(found.values())


def circles_between_files(found: dict[str, Source]) -> list[list[str]]:
    """Return the circles of imports between single modules."""
    return circles({name: {one for one in source.imports if one in found} for name, source in found.items()})


def circles_between_folders(found: dict[str, Source]) -> list[list[str]]:
    """Return the circles of imports between the folders and files of the table."""
    arrows: dict[str, set[str]] = {}
    for name, source in found.items():
        others = {unit_of(one) for one in source.imports if one in found} - {unit_of(name)}
        arrows.setdefault(unit_of(name), set()).update(others)
    return circles(arrows)


def test_imports_run_down_only() -> None:
    assert upward_imports(sources(ROOT)) == []


def test_no_circle_of_imports_between_files_nor_folders() -> None:
    found = sources(ROOT)
    assert len(found) > 60
    assert circles_between_files(found) == []
    assert circles_between_folders(found) == []


def tree(root: Path, files: dict[str, str]) -> dict[str, Source]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return sources(root)


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("gross_ray/nn/a.py", "from gross_ray.supernet.b import c", "imports gross_ray.supernet.b, which is not below"),
        (
            "gross_ray/nn/a.py",
            "def f():\n    import gross_ray.supernet.b",
            "imports gross_ray.supernet.b, which is not",
        ),
        ("gross_ray/nn/a.py", "if TYPE_CHECKING:\n    from ..supernet import b", "imports gross_ray.supernet.b, which"),
        ("gross_ray/search/a.py", "from gross_ray.training.c import d", "imports gross_ray.training.c, which is not"),
        ("gross_ray/supernet/a.py", "from gross_ray.data import e", "imports gross_ray.data.e, which is not below"),
        ("gross_ray/run/a.py", "from gross_ray import read_table", "imports gross_ray, which is not below"),
        ("gross_ray/new/a.py", "", "gross_ray.new has no layer"),
        ("gross_ray/report/a.py", "import rich.table", "which only pipelines.commands and cli may do"),
        ("pipelines/stages/a.py", "from ray import tune", "which only pipelines.execution may do"),
        ("pipelines/stages/a.py", "from pipelines.execution import f", "imports pipelines.execution.f, which is not"),
        ("pipelines/execution/a.py", "from pipelines.stages import g", "imports pipelines.stages.g, which is not"),
        ("pipelines/execution/a.py", "import click", "which only pipelines.commands and cli may do"),
    ],
)
def test_an_import_that_runs_up_is_found(tmp_path: Path, file: str, text: str, line: str) -> None:
    others = ("supernet/b", "training/c", "data/e", "__init__")
    files = {f"gross_ray/{name}.py": "" for name in others} | {
        f"pipelines/{name}.py": "" for name in ("execution/f", "stages/g")
    }
    assert upward_imports(tree(tmp_path, files)) == []
    [found] = upward_imports(tree(tmp_path, {file: text}))
    assert found.startswith(file)
    assert line in found


def test_imports_that_run_down_are_allowed(tmp_path: Path) -> None:
    files = {
        "gross_ray/errors.py": "import json",
        "gross_ray/nn/modes.py": "from gross_ray.errors import E",
        "gross_ray/search/a.py": "from . import b\nfrom ..nn import modes",
        "gross_ray/search/b.py": "import gross_ray.errors",
        "pipelines/stages/s.py": "from gross_ray.search import a",
        "pipelines/execution/e.py": "import ray",
        "pipelines/commands/c.py": "import click\nfrom pipelines.stages import s\nfrom pipelines.execution import e",
        "cli.py": "import rich\nfrom pipelines.commands import c",
    }
    found = tree(tmp_path, files)
    assert found["gross_ray.search.a"].imports == ("gross_ray.search.b", "gross_ray.nn.modes")
    assert upward_imports(found) == circles_between_files(found) == circles_between_folders(found) == []


def test_circles_are_found(tmp_path: Path) -> None:
    files = {
        "gross_ray/nn/a.py": "from gross_ray.nn import b",
        "gross_ray/nn/b.py": "def late():\n    from gross_ray.nn.c import d",
        "gross_ray/nn/c.py": "from .a import e",
    }
    found = tree(tmp_path / "files", files)
    assert circles_between_files(found) == [["gross_ray.nn.a", "gross_ray.nn.b", "gross_ray.nn.c"]]
    assert circles_between_folders(found) == []
    files = {
        "gross_ray/nn/a.py": "from gross_ray.btd import b",
        "gross_ray/btd/b.py": "",
        "gross_ray/btd/c.py": "from gross_ray.nn import d",
        "gross_ray/nn/d.py": "",
    }
    found = tree(tmp_path / "folders", files)
    assert circles_between_files(found) == []
    assert circles_between_folders(found) == [["gross_ray.btd", "gross_ray.nn"]]


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
    """Import a package in a fresh interpreter; return its number of modules and the forbidden packages imported."""
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
