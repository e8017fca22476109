"""The names of supernets: each alpha its own, exactly."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from gross_ray.storage import Storage
from gross_ray.training.sampling import sampling_probabilities, settled_scaling
from pipelines.stages.supernets import supernet_of

ALPHAS = st.floats(0, 1e6, allow_subnormal=False)
SCALINGS = st.sampled_from(["index", "normalised"])


@given(ALPHAS, SCALINGS, st.integers(0, 99))
def test_a_name_gives_alpha_back_exactly(alpha: float, scaling: str, seed: int) -> None:
    unit = supernet_of(alpha, scaling, seed)
    found = dict(part.split("=") for part in unit.name.split(","))
    assert float(found["alpha"]) == alpha == unit.alpha
    assert int(found["seed"]) == seed == unit.seed
    assert found["scaling"] == unit.scaling == (scaling if alpha else "index")


@pytest.mark.parametrize(("alpha", "written"), [(0.0, "0"), (4.0, "4"), (0.5, "0.5"), (2.718, "2.718")])
def test_ordinary_alphas_keep_their_short_names(alpha: float, written: str) -> None:
    assert supernet_of(alpha, "index", 0).name == f"alpha={written},scaling=index,seed=0"


@given(ALPHAS)
def test_every_name_can_be_a_file(tmp_path_factory: pytest.TempPathFactory, alpha: float) -> None:
    store = RunStore(Storage(tmp_path_factory.getbasetemp()), preset("quickstart"))
    assert not store.has_unit("history", f"reconstruct,{supernet_of(alpha, 'normalised', 10).name}")


@given(ALPHAS, SCALINGS, SCALINGS, st.integers(1, 9))
def test_two_supernets_share_a_name_only_where_they_sample_alike(
    alpha: float, one: str, other: str, num_group_sizes: int
) -> None:
    assume(supernet_of(alpha, one, 0).name == supernet_of(alpha, other, 0).name)
    first, second = (sampling_probabilities(num_group_sizes, alpha, scaling=scaling) for scaling in (one, other))
    assert first.equal(second)
    assert sampling_probabilities(num_group_sizes, alpha, scaling=settled_scaling(alpha, one)).equal(first)
