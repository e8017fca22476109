"""Ray out of reach: what the tests of stages and commands do must not need it."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

_MODULES = ("actors", "addresses", "cluster", "fetching", "tune", "versions")
ON_RAY = {f"pipelines.execution.{name}" for name in _MODULES}
"""The modules that import Ray when they are imported."""


@contextmanager
def without_ray() -> Iterator[None]:
    """Let every import of Ray, or of a module that imports it, fail within the block.

    It fails even where another test of this process has imported Ray before.
    """
    real = builtins.__import__

    def guarded(
        name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] | None = (), level: int = 0
    ) -> Any:
        asked = {name, *(f"{name}.{member}" for member in fromlist or ())}
        assert name.split(".")[0] != "ray" and not asked & ON_RAY, f"Ray is imported, by an import of {name}"
        return real(name, globals, locals, fromlist, level)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "__import__", guarded)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(autouse=True)
def no_ray() -> Iterator[None]:
    """What stages and commands do is tested without Ray: their conftest.py files import this."""
    with without_ray():
        yield
