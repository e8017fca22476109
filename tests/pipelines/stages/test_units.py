"""What a unit says of itself: its name is its own within its stage, and its fields go wherever it is done."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from inspect import isabstract
from pathlib import Path

import pytest

from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.space import Configuration
from pipelines.stages import decompose, rounds, search, supernets, train, validate
from pipelines.stages.decompose import Chain, Decomposition
from pipelines.stages.pipeline import STAGES
from pipelines.stages.rates import FindRates
from pipelines.stages.rounds import RoundPart
from pipelines.stages.search import Planning, Shard
from pipelines.stages.supernets import supernet_of
from pipelines.stages.train import BaseNetwork
from pipelines.stages.validate import Validation
from pipelines.units import Unit, grouped

SUPERNET = supernet_of(4.0, "normalised", 1)
CONFIGURATION = Configuration([2, 8, 64])
UNITS: list[Unit] = [
    BaseNetwork(seed=3),
    Decomposition(layer="features.0", group_size=4, seed=1),
    Decomposition(layer="features.0", group_size=4, seed=1, nested=True),
    Chain(layer="features.0", group_sizes=(1, 2, 4), seed=1),
    SUPERNET,
    Shard(supernet=SUPERNET, start=0, stop=7),
    Planning(supernet=SUPERNET, workers=2, threads=1, units_on_a_device=1),
    RoundPart(supernet=SUPERNET, round=1, number=2, configurations=(CONFIGURATION,)),
    Validation(configuration=CONFIGURATION, kind="fixed", seed=0),
    FindRates(schedules=("validation.reconstruction", "validation.finetuning"), of=SUPERNET),
    *grouped([SUPERNET, supernet_of(0.0, "index", 0)], 2),
]


def _subclasses(of: type[Unit]) -> set[type[Unit]]:
    return {of}.union(*(_subclasses(each) for each in of.__subclasses__()))


def test_every_kind_of_unit_is_tested_here() -> None:
    ours = {one for one in _subclasses(Unit) if one.__module__.startswith("pipelines.") and not isabstract(one)}
    assert {type(unit) for unit in UNITS} == ours


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: type(unit).__name__)
def test_a_unit_is_its_fields_wherever_it_is_done(unit: Unit) -> None:
    there = pickle.loads(pickle.dumps(unit))
    assert there == unit and hash(there) == hash(unit)
    assert (there.name, there.shared, there.values()) == (unit.name, unit.shared, unit.values())
    assert replace(unit, cost=99.0) == unit  # the cost decides the order, not what is done
    assert set(unit.values()) == {field.name for field in fields(unit)} - {"cost"}


def test_units_that_differ_in_a_field_are_other_units() -> None:
    assert len(set(UNITS)) == len(UNITS)
    for unit in UNITS:
        for name, value in vars(unit).items():
            if isinstance(value, int) and not isinstance(value, bool):
                assert replace(unit, **{name: value + 1}) != unit, name


@pytest.mark.parametrize("stage", STAGES)
def test_names_are_unique_in_a_stage(whole_run: tuple[Path, str], stage: str) -> None:
    run = Run(RunStore.open(whole_run[0]))
    planned = STAGES[stage].plan(run)
    assert planned
    assert len({unit.name for unit in planned}) == len(set(planned)) == len(planned)
    assert {unit.name for unit in planned} <= STAGES[stage].done(run)
    assert pickle.loads(pickle.dumps(list(planned))) == list(planned)


def test_names_are_unique_in_every_form_of_a_stage(whole_run: tuple[Path, str]) -> None:
    """Of the searches, the sweep's shards too; of a search by a strategy, all rounds; of the decompositions, chains."""
    run = Run(RunStore.open(whole_run[0]))
    both = [*supernets.searched(run), *[unit for unit in supernets.swept(run) if unit not in supernets.searched(run)]]
    assert len(both) == 2
    shards = search.parts(run, both)
    configurations = run.space[:9]
    drawn = [part for unit in both for number in range(3) for part in rounds.units(unit, number, configurations)]
    assert sorted(one for part in drawn[:3] for one in part.configurations_of(run.space)) == sorted(configurations)
    links = [link for chain in UNITS if isinstance(chain, Chain) for link in chain.links]
    alone = decompose.plan(run)
    for units in (shards, drawn, [*alone, *links], train.plan(run), validate.plan(run)):
        assert len({unit.name for unit in units}) == len(units)
