from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))  # miniature.py
# Ray gives its workers the niceness 15: beside any busy process on the machine their tests would take minutes.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The miniature, run once from end to end in this process, and what it printed. Tests that change it copy it.

    It is the oracle of the runs on Ray of 2 cores too, so its space is cut as two workers cut it. All processes of
    pytest-xdist share one, which the first that asks for it makes.
    """
    from miniature import do, run_words
    from without_ray import without_ray

    from pipelines.stages import search

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out, printed = shared / "whole" / "run", shared / "whole" / "printed"
    with FileLock(shared / "whole.lock"), pytest.MonkeyPatch.context() as patch, without_ray():
        if not printed.exists():
            patch.setattr(search, "SHARDS_A_WORKER", 2 * search.SHARDS_A_WORKER)
            out.parent.mkdir()
            printed.write_text(do(*run_words(out)).stdout)
    return out, printed.read_text()


@pytest.fixture
def run(whole_run: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished miniature, to be changed."""
    return shutil.copytree(whole_run[0], tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
