"""Functions of the user's own, named like package.module:function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from gross_ray.errors import GrossRayError, one_line


def own_function(name: str, form: str, error: Callable[[str], GrossRayError]) -> Callable[..., Any]:
    """Return what `name` names, written as `form` says; raises `error` of a sentence where it is no function."""
    module_name, _, attribute = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as reason:
        raise error(f"{reason}; write {form}, from a folder that Python finds (PYTHONPATH)") from None
    except Exception as reason:  # whatever the user's own code raises
        raise error(f"{module_name} fails: {one_line(reason)}") from reason
    if not callable(function):
        raise error(f"{attribute} is no function; write {form}")
    return function
