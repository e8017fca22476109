"""Units of one kind are computed with one number of threads, whichever command asks for them, on whatever cluster."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.space import Configuration
from pipelines.capacity import Capacity, settled_threads
from pipelines.nodes import NodeKind
from pipelines.stages import decompose, finetune, reconstruct, search, sweep, validate
from pipelines.units import Job

FOUR_CORES = Capacity(nodes=(NodeKind(4, 0),), device="cpu")


def _cores(number: int) -> Capacity:
    return Capacity(nodes=(NodeKind(number, 0),), device="cpu")


def test_a_kind_keeps_its_threads(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", preset("quickstart"))
    large, small = _cores(8), _cores(2)
    assert small.threads(2) == 1
    assert settled_threads(store, "train", 2, large) == large.threads(2) == 4
    again = RunStore.open(tmp_path / "run")
    assert settled_threads(again, "train", 2, _cores(64)) == 4
    assert settled_threads(again, "train", 2, small) == 2  # all that a node has
    assert settled_threads(again, "train", 2, large) == 4  # and that is not what is stored
    assert settled_threads(again, "search", 1, large) == 8  # each kind has its own


def test_units_that_are_cut_for_the_workers_are_several_for_each(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", preset("quickstart"))
    assert settled_threads(store, "search", None, _cores(8)) == 1  # all cores are busy with one thread each
    alone = Capacity(nodes=(NodeKind(8, 0),), device="cpu", one_at_a_time=True)
    assert settled_threads(store, "another", None, alone) == 8


class Asked:
    """A driver on four cores that does no unit: it notes the threads of each job, by kind and by what is shown."""

    def __init__(self, run: Run) -> None:
        self.run, self.capacity = run, FOUR_CORES
        self.of_kind: dict[str, set[int]] = {}
        self.of_job: dict[str, tuple[str, int]] = {}

    def threads(self, kind: str, num_equal: int | None) -> int:
        return settled_threads(self.run.store, kind, num_equal, self.capacity)

    def do(self, job: Job) -> None:
        self.of_job[job.stage] = (job.kind, self.threads(job.kind, job.num_equal))

    def note(self, text: str) -> None:
        pass


ONE = [Configuration.parse("2-8-32")]


def _validate_by_name(driver: Asked) -> None:
    validate.do_named(driver, ONE)


def _sweep(driver: Asked) -> None:
    sweep._train(driver, sweep.plan(driver.run))


WAYS: dict[str, tuple[Callable[[Asked], None], ...]] = {
    validate.NAME: (validate.do, validate.do_fixed, _validate_by_name),
    decompose.NAME: (decompose.do, validate.do, validate.do_fixed, _validate_by_name),
    "supernets": (reconstruct.do, finetune.do, _sweep),
    search.NAME: (search.do,),
}
"""For each kind of units, all that may be the first to ask for some of them."""


@pytest.fixture
def unsettled(whole_run: tuple[Path, str], tmp_path: Path) -> Callable[[], Run]:
    """Makes copies of the finished run in which no kind has its threads yet and no decomposition is stored."""
    number = 0

    def make() -> Run:
        nonlocal number
        number += 1
        folder = shutil.copytree(whole_run[0], tmp_path / str(number), ignore=shutil.ignore_patterns(".lock"))
        shutil.rmtree(folder / "checkpoints/threads")
        for unit in folder.glob("tables/decompositions/conv2*"):
            unit.unlink()
        for unit in folder.glob("tables/validations/*"):
            unit.unlink()
        return Run(RunStore.open(folder))

    return make


@pytest.mark.parametrize(("kind", "ways"), WAYS.items(), ids=list(WAYS))
def test_the_threads_of_a_kind_do_not_depend_on_who_asks_first(
    unsettled: Callable[[], Run], monkeypatch: pytest.MonkeyPatch, kind: str, ways: tuple[Callable[[Asked], None], ...]
) -> None:
    monkeypatch.setattr(decompose, "require_all", lambda run: None)
    found = {}
    for way in ways:
        driver = Asked(unsettled())
        way(driver)
        numbers = {threads for one, threads in driver.of_job.values() if one == kind}
        assert len(numbers) == 1, driver.of_job
        found[way.__name__ + way.__module__] = numbers.pop()
    assert len(set(found.values())) == 1, found
    assert FOUR_CORES.threads(1) not in found.values()  # what one unit alone would have had


def test_the_search_of_other_supernets_has_the_threads_of_the_search(unsettled: Callable[[], Run]) -> None:
    driver = Asked(unsettled())
    search.evaluate(driver, "sweep-alpha search", sweep.plan(driver.run))
    again = Asked(driver.run)
    search.do(again)
    assert {*driver.of_job.values(), *again.of_job.values()} == {(search.NAME, 1)}
