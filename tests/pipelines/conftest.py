from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster import Cluster, Resources, connected  # before Ray: it sets Ray's environment

sys.path.insert(0, str(Path(__file__).parent))  # miniature.py


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The real Ray, whose workers get the test module's functions by value: they do not see the folder of the tests."""
    import ray

    ray.cloudpickle.register_pickle_by_value(request.module)
    with connected(Resources(num_cpus=2, device="cpu")) as joined:
        yield joined
    ray.cloudpickle.unregister_pickle_by_value(request.module)
