from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from without_ray import without_ray


@pytest.fixture(autouse=True)
def no_ray() -> Iterator[None]:
    """What commands do is tested without Ray."""
    with without_ray():
        yield


@pytest.fixture
def run(whole_run: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished miniature, to be changed."""
    return shutil.copytree(whole_run[0], tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
