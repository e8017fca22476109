"""Files and functions stay short enough to read at once."""

import ast
from pathlib import Path

import gross_ray

ROOT = Path(gross_ray.__file__).parents[1]
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
APART = {"tests", "benchmarks", "build", "dist", "runs"}
"""Top folders that are not checked; hidden folders are not either."""


def too_long(root: Path) -> dict[str, int]:
    """Return the files and functions above the limits, with their lines."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if path.parts[0] in APART or any(part.startswith(".") for part in path.parts):
            continue
        text = file.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            found[path.as_posix()] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found[f"{path.as_posix()}: {node.name}"] = lines
    return found


def test_files_and_functions_are_short() -> None:
    assert too_long(ROOT) == {}


def test_the_check_above_can_fail(tmp_path: Path) -> None:
    def function(lines: int) -> str:
        return "def function():\n" + "    pass\n" * (lines - 1)

    (tmp_path / "tests").mkdir()
    (tmp_path / "library").mkdir()
    for folder in ("tests", "library"):
        (tmp_path / folder / "short.py").write_text(function(60) + "\n" * 390)
        (tmp_path / folder / "long.py").write_text("\n" * 451)
        (tmp_path / folder / "inner.py").write_text(
            "class A:\n    async " + function(61).replace("\n    ", "\n        ")
        )
    assert too_long(tmp_path) == {"library/long.py": 451, "library/inner.py: function": 61}
