"""The driver's record of versions: what differs is refused, naming both sides."""

from __future__ import annotations

import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gross_ray
from gross_ray.errors import VersionMismatchError
from pipelines.execution import versions
from pipelines.execution.versions import Versions


def test_a_worker_like_the_driver_is_taken() -> None:
    pickle.loads(pickle.dumps(Versions.here())).check()


def test_what_a_torch_was_built_for_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.0+cu128")
    record = Versions.here()
    monkeypatch.setattr(torch, "__version__", "2.9.0+cpu")
    record.check()
    assert record.torch == "2.9.0"
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(VersionMismatchError, match=r"runs torch 2\.9\.1, the driver 2\.9\.0; it imports"):
        record.check()


def test_all_that_differs_is_named_in_one_picklable_line() -> None:
    here = Versions.here()
    driver = replace(here, torch="1.0.0", python="3.9")
    with pytest.raises(VersionMismatchError) as refused:
        driver.check()
    message = str(pickle.loads(pickle.dumps(refused.value)))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"torch {here.torch}, the driver 1.0.0 and python {python}, the driver 3.9" in message
    assert "gross_ray 0" not in message  # that is the same
    assert str(Path(gross_ray.__file__).parent) in message
    assert "\n" not in message


@pytest.mark.parametrize("change", ["edited", "added", "removed", "renamed", "none", "not source"])
def test_a_change_of_the_sources_is_a_difference(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Versions.here()
    copies = []
    for package in versions.PACKAGES:
        copies.append(tmp_path / package.name)
        shutil.copytree(package, copies[-1], ignore=shutil.ignore_patterns("*.parquet", "__pycache__"))
    file = copies[1] / "execution" / "actors.py"
    if change == "edited":
        file.write_text(file.read_text() + "# edited\n")
    elif change == "added":
        (copies[0] / "new.py").touch()
    elif change == "removed":
        file.unlink()
    elif change == "renamed":
        file.rename(file.with_name("workers.py"))
    elif change == "not source":
        (copies[0] / "notes.txt").write_text("notes")
    monkeypatch.setattr(versions, "PACKAGES", tuple(copies))
    versions._hash_of_sources.cache_clear()
    try:
        if change in ("none", "not source"):
            driver.check()
        else:
            with pytest.raises(
                VersionMismatchError, match=r"runs gross_ray .* \(sources \w{12}\), the driver .* \(sou"
            ):
                driver.check()
    finally:
        versions._hash_of_sources.cache_clear()
