"""Import the user's own functions, named like package.module:function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gross_ray.errors import GrossRayError, one_line


def own_function(name: str, form: str, error: Callable[[str], GrossRayError]) -> Callable[..., Any]:
    """Import the function `name`, of the form `form`; raises `error(reason)` if there is no such function."""
    module_name, _, attribute = name.partition(":")
    if (hidden := hidden_module(module_name)) is not None:
        raise error(f"{module_name} is a module of gross_ray itself, which hides your {hidden}; rename yours")
    try:
        function: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as reason:
        raise error(f"{reason}; write {form}, from a folder that Python finds (PYTHONPATH)") from None
    except Exception as reason:  # of any kind: this is the user's own code
        raise error(f"{module_name} fails: {one_line(reason)}") from reason
    if not callable(function):
        raise error(f"{attribute} is not a function; write {form}")
    return function


def hidden_module(module_name: str) -> Path | None:
    """Return the user's file or folder that a gross_ray module of the same name hides, or None.

    Our top-level modules come first in the search order. A package of ours whose `__path__` contains the user's folder
    of the same name hides only the modules that both have.
    """
    first, *rest = module_name.split(".")
    ours = sys.modules.get(first)
    if first not in _OURS or ours is None or ours.__file__ is None:
        return None
    if not hasattr(ours, "__path__"):
        files = (Path(folder, f"{first}.py").absolute() for folder in (os.getcwd(), *sys.path))
        return next((file for file in files if file.is_file() and not file.samefile(ours.__file__)), None)
    own, *theirs = map(Path, ours.__path__)
    if not rest or not _has(own, rest[0]):
        return None
    return next((folder / rest[0] for folder in theirs if _has(folder, rest[0])), None)


def own_folder(module_name: str) -> Path | None:
    """Return the user's folder, in the `__path__` of a package of ours, that contains a module; None if none does."""
    first, *rest = module_name.split(".")
    package = sys.modules.get(first)
    folders = list(map(Path, getattr(package, "__path__", ()))) if first in _OURS and rest else []
    return next((folder for folder in folders[1:] if _has(folder, rest[0]) and not _has(folders[0], rest[0])), None)


_OURS = ("cli", "pipelines")


def _has(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name).is_dir()
