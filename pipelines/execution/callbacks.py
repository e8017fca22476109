"""The user's callbacks for Ray Tune, imported by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gross_ray.errors import InvalidValueError, one_line
from gross_ray.own_code import hidden_module


def load_callbacks(names: Sequence[str]) -> list[Any]:
    """Return a `ray.tune.Callback` for each MODULE:NAME of a subclass, a function that makes one, or an instance.

    Modules are searched on Python's path and in the current folder. Raises InvalidValueError for any other name.
    """
    return [_load(name) for name in names]


def _load(name: str) -> Any:
    module_name, separator, attribute = name.partition(":")
    if not (module_name and separator and attribute):
        raise InvalidValueError(f"callback {name!r}: write MODULE:NAME, like my_callbacks:Notify")
    found = _attribute(_module(module_name, name), attribute, name)
    from ray.tune import Callback

    if isinstance(found, Callback):
        return found
    if not callable(found):
        raise InvalidValueError(
            f"callback {name!r}: is {found!r}; name a ray.tune.Callback or a function that makes one"
        )
    try:
        made = found()
    except Exception as error:
        raise InvalidValueError(
            f"callback {name!r}: cannot be made without arguments: {one_line(error)}; name a function that makes it"
        ) from error
    if not isinstance(made, Callback):
        raise InvalidValueError(f"callback {name!r}: makes {made!r}, which is no ray.tune.Callback; derive it from one")
    return made


def _module(module_name: str, name: str) -> Any:
    folder = str(Path.cwd())
    if folder not in sys.path:  # a console script does not search it
        sys.path.append(folder)
    if (hidden := hidden_module(module_name)) is not None:
        raise InvalidValueError(
            f"callback {name!r}: {module_name} is a module of gross_ray itself, which hides your {hidden}; rename yours"
        )
    try:
        exists = find_spec(module_name) is not None
    except (ImportError, ValueError):  # its package is missing, or is not a package
        exists = False
    if not exists:
        raise InvalidValueError(
            f"callback {name!r}: there is no module {module_name!r} in the current folder or among the installed "
            "packages; look at its spelling, or set PYTHONPATH"
        )
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise InvalidValueError(
            f"callback {name!r}: importing {module_name!r} fails: {one_line(error)}; correct that first"
        ) from error


def _attribute(module: Any, attribute: str, name: str) -> Any:
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InvalidValueError(
                f"callback {name!r}: {module.__name__!r} has no {attribute!r}; look at the spelling"
            )
        found = getattr(found, part)
    return found
