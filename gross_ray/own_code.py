"""Functions of the user's own, named like package.module:function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gross_ray.errors import GrossRayError, one_line


def own_function(name: str, form: str, error: Callable[[str], GrossRayError]) -> Callable[..., Any]:
    """Return what `name` names, written as `form` says; raises `error` of a sentence where it is no function."""
    module_name, _, attribute = name.partition(":")
    if (hidden := hidden_module(module_name)) is not None:
        raise error(f"{module_name} is a module of gross_ray itself, which hides your {hidden}; rename yours")
    try:
        function: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as reason:
        raise error(f"{reason}; write {form}, from a folder that Python finds (PYTHONPATH)") from None
    except Exception as reason:  # whatever the user's own code raises
        raise error(f"{module_name} fails: {one_line(reason)}") from reason
    if not callable(function):
        raise error(f"{attribute} is no function; write {form}")
    return function


def hidden_module(module_name: str) -> Path | None:
    """Return the user's file or folder that a module of gross_ray's own of the same name hides, if there is one.

    Our top-level modules and packages come first; a package of ours that has the user's folder of the same name in its
    `__path__` hides only those of its modules that both have.
    """
    first, *rest = module_name.split(".")
    ours = sys.modules.get(first)
    if first not in _OURS or ours is None or ours.__file__ is None:
        return None
    if not hasattr(ours, "__path__"):
        places = (Path(place, f"{first}.py").absolute() for place in (os.getcwd(), *sys.path))
        return next((file for file in places if file.is_file() and not file.samefile(ours.__file__)), None)
    own, *theirs = map(Path, ours.__path__)
    if not rest or not _has(own, rest[0]):
        return None
    return next((folder / rest[0] for folder in theirs if _has(folder, rest[0])), None)


def own_place(module_name: str) -> Path | None:
    """Return the user's folder in the `__path__` of a package of ours that has a module; None where it is elsewhere."""
    first, *rest = module_name.split(".")
    package = sys.modules.get(first)
    places = list(map(Path, getattr(package, "__path__", ()))) if first in _OURS and rest else []
    return next((folder for folder in places[1:] if _has(folder, rest[0]) and not _has(places[0], rest[0])), None)


_OURS = ("cli", "pipelines")


def _has(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name).is_dir()
