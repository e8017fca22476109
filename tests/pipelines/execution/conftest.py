from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from pipelines.capacity import Capacity
from pipelines.execution.cluster import connected  # before Ray: it sets Ray's environment
from pipelines.resources import Resources


@pytest.fixture(scope="session")
def splits() -> Splits:
    """A few images: what is done with them is made up."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return ImageSet(pixels, torch.randint(0, 2, (count,), generator=generator))

    return Splits("tiny", images(6), images(4), images(5), ("one", "other"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(RunStore.create(tmp_path / "run", preset("quickstart").override(["seed=7"])))


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
def stopped_ray(shared_ray: SharedRay) -> None:
    shared_ray.stop()


@pytest.fixture(scope="session")
def whole_run(stopped_ray: None, whole_run: tuple[Path, str]) -> tuple[Path, str]:
    """The same run, made while no Ray is in this process: Ray's threads may import what its making must not."""
    return whole_run
