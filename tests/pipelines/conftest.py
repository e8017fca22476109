from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.capacity import Capacity
from pipelines.execution.cluster import connected  # before Ray: it sets Ray's environment
from pipelines.resources import Resources

sys.path.insert(0, str(Path(__file__).parent))  # miniature.py


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Capacity]:
    """The real Ray, whose workers get the test module's functions by value: they do not see the folder of the tests."""
    import ray

    ray.cloudpickle.register_pickle_by_value(request.module)
    with connected(Resources(num_cpus=2, device="cpu")) as joined:
        yield joined
    ray.cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The miniature, run once from end to end with nothing disturbing it, and what it printed."""
    from miniature import run_command

    out = tmp_path_factory.mktemp("whole") / "run"
    ended = subprocess.run(run_command(out), capture_output=True, text=True, check=False, timeout=400)
    assert ended.returncode == 0, ended.stderr
    return out, ended.stdout
