"""Configurations drawn evenly over the MACs are trained on their own, beside the fixed and the selected ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from miniature import do, invoke

from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.cost import LayerCosts
from gross_ray.space import SearchSpace
from pipelines.stages import rounds, validate


def with_drawn(run: Path, num: int, seeds: int = 1, **other: int) -> Run:
    experiment = json.loads((run / "experiment.json").read_text())
    experiment["validation"] |= {"drawn": num, "drawn_seeds": seeds}
    experiment |= other
    (run / "experiment.json").write_text(json.dumps(experiment))
    return Run(RunStore.open(run))


@pytest.mark.parametrize("num", [1, 5, 12])
def test_one_is_drawn_from_each_of_equal_ranges_of_macs(run: Path, num: int) -> None:
    opened = with_drawn(run, num)
    macs = rounds.additive_cost(opened, "macs")
    others = [*validate.fixed_configurations(opened), *validate.selected_configurations(opened)]
    drawn = validate.drawn_configurations(opened, num, others)
    assert len(set(drawn)) == len(drawn) == num and not set(drawn) & set(others)
    width = (macs.maximum - macs.minimum) / num
    assert [min(int((macs.of_one(one) - macs.minimum) / width), num - 1) for one in drawn] == list(range(num))
    assert drawn == validate.drawn_configurations(opened, num, others)
    assert drawn != validate.drawn_configurations(with_drawn(run, num, seed=1), num, others)


def test_the_most_expensive_of_a_deep_network_are_drawn_too() -> None:
    """Of all configurations of 20 layers, nearly all have middling MACs."""
    sizes = {f"layer{place}": (1, 4, 16, 0) for place in range(20)}
    macs = LayerCosts("macs", 1000, {layer: {1: 10, 4: 20, 16: 50, 0: 90} for layer in sizes})
    generator = np.random.default_rng(0)
    edges = np.linspace(macs.minimum, macs.maximum, 13)
    for least, most in itertools.pairwise(edges):
        found = validate._between(SearchSpace(sizes), macs, float(least), float(most), generator)
        assert found and all(least <= macs.of_one(one) <= most for one in found)


def test_without_configurations_in_a_range_none_is_drawn_from_it(run: Path) -> None:
    opened = with_drawn(run, 400)  # of 252 configurations
    everything = list(opened.space)
    drawn = validate.drawn_configurations(opened, 400, [])
    assert 100 < len(set(drawn)) == len(drawn) < 252
    assert validate.drawn_configurations(opened, 400, everything) == []


def test_the_drawn_ones_are_trained_and_ranked(run: Path) -> None:
    before = RunStore.open(run).read_table("validations")
    opened = with_drawn(run, 3, seeds=2)
    planned = {(str(unit.configuration), unit.seed) for unit in validate.plan(opened) if unit.kind == "drawn"}
    assert len(planned) == 6
    assert len(validate.plan(opened)) == len(before) + 6
    do("search", run)  # it stores the plans anew
    assert "missing: 6 of 6 trainings of drawn configurations (run `gross validate`)" in invoke("report", run).stdout
    shown = do("validate", run).stdout
    after = RunStore.open(run).read_table("validations")
    drawn = after[after["kind"] == "drawn"]
    assert set(drawn[["configuration", "seed"]].itertuples(index=False, name=None)) == planned
    assert len(after) == len(before) + 6
    assert "Also trained on their own" in shown
    ranked = after["configuration"].nunique()
    assert f"rank correlation of {ranked} configurations" in shown
    assert all(name in shown for name, _ in planned)
