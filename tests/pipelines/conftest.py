from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock

from pipelines.capacity import Capacity
from pipelines.execution.cluster import connected  # before Ray: it sets Ray's environment
from pipelines.resources import Resources

sys.path.insert(0, str(Path(__file__).parent))  # miniature.py
# Ray gives its workers the niceness 15: beside any busy process on the machine their tests would take minutes.
os.environ.setdefault("RAY_worker_niceness", "0")


class SharedRay:
    """The Ray of two cores that the tests of one pytest process share: started for the first test that asks for it."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._capacity: Capacity | None = None

    def start(self) -> Capacity:
        """Start it, unless it runs."""
        if self._capacity is None:
            with pytest.MonkeyPatch.context() as environment:
                # Neither a test nor torch would choose 3 threads: a worker that has them was not given its number.
                environment.setenv("OMP_NUM_THREADS", "3")
                self._capacity = self._open.enter_context(connected(Resources(num_cpus=2, device="cpu")))
        return self._capacity

    def stop(self) -> None:
        """End it, if it runs; the next test that asks for it starts it again."""
        self._open.close()
        self._capacity = None


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[SharedRay]:
    shared = SharedRay()
    yield shared
    shared.stop()


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, shared_ray: SharedRay) -> Iterator[Capacity]:
    """The shared Ray, whose workers get the module's functions by value: they do not see the folder of the tests."""
    import ray

    ray.cloudpickle.register_pickle_by_value(request.module)
    yield shared_ray.start()
    ray.cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture(scope="module")
def no_ray(shared_ray: SharedRay) -> None:
    """For a module whose tests start a Ray of their own, or join one: `connected` would take the shared one."""
    import ray

    shared_ray.stop()
    assert not ray.is_initialized()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, shared_ray: SharedRay) -> tuple[Path, str]:
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
    if not printed.exists():
        shared_ray.stop()  # its threads in this process may import what they need of Ray
    with FileLock(shared / "whole.lock"), pytest.MonkeyPatch.context() as patch, without_ray():
        if not printed.exists():
            patch.setattr(search, "SHARDS_A_WORKER", 2 * search.SHARDS_A_WORKER)
            out.parent.mkdir()
            printed.write_text(do(*run_words(out)).stdout)
    return out, printed.read_text()
