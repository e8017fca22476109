"""What was evaluated, read in parts: every row once, all supernets' rows of a configuration together, names unread."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gross_ray.errors import RunFolderError
from gross_ray.presets import preset
from gross_ray.run.searched import evaluated_accuracies, evaluated_parts, evaluated_units
from gross_ray.run.store import RunStore
from gross_ray.space import SearchSpace

SPACE = SearchSpace({"conv2": (1, 2, 4), "conv3": (1, 2, 4, 16)})
SUPERNETS = [(0.0, "index", 0), (0.0, "index", 1), (0.0, "index", 2), (4.0, "index", 0), (4.0, "normalised", 0)]


def row(supernet: tuple[float, str, int], place: int, correct: int) -> dict[str, Any]:
    alpha, scaling, seed = supernet
    configuration = SPACE[place]
    return {
        **{"supernet": "s", "alpha": alpha, "scaling": scaling, "seed": seed, "configuration": str(configuration)},
        **{f"layer {layer}": size for layer, size in zip(SPACE.layers, configuration, strict=True)},
        **{"macs": place, "macs_paper": 2 * place, "parameters": 3 * place, "latency_ms": place + seed / 4},
        **{"val_correct": correct, "val_total": 100, "val_accuracy": correct / 100, "val_loss": 1.0},
    }


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.permutations(range(len(SPACE))),
    st.sets(st.integers(1, len(SPACE) - 1), max_size=4),
    st.lists(st.sampled_from(SUPERNETS), min_size=1, unique=True),
    st.randoms(use_true_random=False),
)
def test_each_row_is_in_one_part_with_those_of_the_other_seeds(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: set[int], supernets: list[Any], random: Any
) -> None:
    bounds = [0, *sorted(cuts), len(SPACE)]
    shards = [order[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
    units = [(supernet, shard) for supernet in supernets for shard in shards]
    random.shuffle(units)
    units = units[: random.randint(1, len(units))]  # a search that is unfinished
    store = RunStore.create(tmp_path_factory.mktemp("run") / "run", preset("quickstart"))
    rows = []
    for number, (supernet, shard) in enumerate(units):
        ours = [row(supernet, place, random.randint(0, 100)) for place in shard]
        store.write_table("configurations", f"unit-{number}", ours, layers=SPACE.layers)
        rows += ours
    key = ("alpha", "scaling", "seed", "configuration")
    expected = sorted(tuple(one[name] for name in (*key, "val_correct")) for one in rows)
    parts = list(evaluated_parts(store, (*key, "val_correct")))
    found = [tuple(one) for part in parts for one in part.itertuples(index=False)]
    assert sorted(found) == expected
    owners = [one for part in parts for one in {(a, s, name) for a, s, _, name, _ in part.itertuples(index=False)}]
    assert len(owners) == len(set(owners))
    heads = evaluated_units(store)
    assert {(one.alpha, one.scaling, one.seed, one.first, one.unit) for one in heads.itertuples()} == {
        (*supernet, str(SPACE[shard[0]]), f"unit-{number}") for number, (supernet, shard) in enumerate(units)
    }
    ours = heads[(heads["alpha"] == 0) & (heads["scaling"] == "index")]
    accuracies: dict[str, list[float]] = {}
    for one in rows:
        if one["alpha"] == 0:
            accuracies.setdefault(one["configuration"], []).append(one["val_accuracy"])
    medians = [one for part in evaluated_accuracies(store, ours) for one in part.itertuples()]
    assert len(medians) == len(accuracies)
    for one in medians:
        assert one.supernet_accuracy == pytest.approx(statistics.median(accuracies[one.configuration]))
        assert 3 * one.macs == one.parameters


def test_no_units_have_no_parts(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", preset("quickstart"))
    assert list(evaluated_parts(store, ("configuration",))) == []
    assert list(evaluated_units(store).columns) == ["alpha", "scaling", "seed", "first", "unit"]


def test_a_unit_that_is_damaged_or_missing_is_named(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", preset("quickstart"))
    store.write_table("configurations", "one", [row(SUPERNETS[0], 0, 1)], layers=SPACE.layers)
    with pytest.raises(RunFolderError, match=r"configurations/two\.parquet"):
        evaluated_units(store, ["one", "two"])
    store.write_table("configurations", "none", [], layers=SPACE.layers)
    with pytest.raises(RunFolderError, match=r"configurations/none\.parquet: it has no rows"):
        evaluated_units(store)


def test_a_file_with_the_rows_of_several_supernets_is_refused(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", preset("quickstart"))
    rows = [row(supernet, 0, 50) for supernet in SUPERNETS[:2]]
    store.write_table("configurations", "all", rows, layers=SPACE.layers)
    with pytest.raises(RunFolderError, match=r"unit all.* rows of several supernets"):
        list(evaluated_parts(store, ("configuration", "val_accuracy")))
