"""The contract of executors: one suite over all members, on a made-up stage that knows nothing of networks."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import ray
import torch
from recorded import Recorded

from gross_ray.data.image_set import Splits
from gross_ray.errors import DivergedError
from gross_ray.run.opened import Run
from pipelines import execution
from pipelines.capacity import Capacity
from pipelines.execution import signals
from pipelines.execution.actors import Actors
from pipelines.execution.base import Executor
from pipelines.execution.in_process import InProcess
from pipelines.execution.tune import Trials
from pipelines.packing import pack_splits
from pipelines.units import Context, Job, Unit


@dataclass(frozen=True, kw_only=True)
class Sum(Unit):
    """A unit that stores a sum, or fails in the way that it is told."""

    number: int
    fate: str = ""
    reads: str = ""

    @property
    def name(self) -> str:
        return f"number={self.number}"

    @property
    def shared(self) -> str:
        return self.reads


def work(context: Context, unit: Sum) -> str:
    marks = context.store.path / "attempts" / unit.name
    marks.parent.mkdir(exist_ok=True)
    with marks.open("a") as file, (context.store.path / "order").open("a") as order:
        file.write("x")
        order.write(f"{unit.number}\n")
    context.report(0.5, "half", loss=1.0)
    if unit.fate == "diverges":
        raise DivergedError("the loss is not finite in epoch 3: try a lower learning rate")
    if unit.fate == "is a bug":
        raise KeyError("conv7")
    if unit.fate == "dies once" and marks.stat().st_size == 1:
        os._exit(1)
    if unit.fate == "interrupts":
        while not context.store.has_checkpoint("sums", "number=0"):  # another process may be doing it
            time.sleep(0.01)
        os.kill(int((context.store.path / "driver").read_text()), signal.SIGINT)
    if unit.reads:
        return f"shared {context.shared['array'].sum():g}"
    total = int(context.splits.train.images.sum()) + unit.number
    context.store.save_checkpoint("sums", unit.name, {}, {"sum": total})
    return f"{total} by {torch.get_num_threads()} threads on {context.device}"


class Case(NamedTuple):
    executor: Executor
    run: Run
    splits: Splits

    def do(self, units: list[Sum], threads: int = 1, **more: Any) -> tuple[dict[str, str], Recorded]:
        progress = Recorded()
        job = Job(stage="test", units=units, work=work, done=self.done, kind="test", num_equal=len(units), **more)
        return self.executor.do(job, units, threads=threads, progress=progress), progress

    def done(self) -> set[str]:
        return set(self.run.store.checkpoints("sums"))

    def attempts(self) -> dict[str, int]:
        return {file.name: file.stat().st_size for file in (self.run.store.path / "attempts").iterdir()}


def _in_process(run: Run, splits: Splits, capacity: Capacity) -> Executor:
    return InProcess(run, splits, "cpu")


def _actors(run: Run, splits: Splits, capacity: Capacity) -> Executor:
    return Actors(capacity, ray.put(pack_splits(splits)), run)


def _trials(run: Run, splits: Splits, capacity: Capacity) -> Executor:
    return Trials(capacity, ray.put(pack_splits(splits)), run)


MEMBERS: dict[str, Callable[[Run, Splits, Capacity], Executor]] = {
    "in_process": _in_process,
    "actors": _actors,
    "tune": _trials,
}


@pytest.fixture(params=MEMBERS)
def case(request: pytest.FixtureRequest, cluster: Capacity, splits: Splits, run: Run) -> Iterator[Case]:
    made = MEMBERS[request.param](run, splits, cluster)
    yield Case(made, run, splits)
    made.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_every_unit_is_stored_and_reported(case: Case, threads: int) -> None:
    failed, progress = case.do([Sum(number=number) for number in range(5)], threads=threads)
    assert failed == {}
    assert case.done() == {f"number={number}" for number in range(5)}
    total = int(case.splits.train.images.sum())
    assert progress.texts == {
        f"number={number}": f"{total + number} by {threads} threads on cpu" for number in range(5)
    }
    assert progress.done == 5
    assert set(case.attempts().values()) == {1}


def test_a_failure_is_named_with_its_reason_and_holds_up_no_other_unit(case: Case) -> None:
    units = [Sum(number=0, fate="diverges"), Sum(number=1, fate="is a bug"), Sum(number=2), Sum(number=3)]
    failed, progress = case.do(units)
    assert set(failed) == {"number=0", "number=1"}
    assert "the loss is not finite in epoch 3: try a lower learning rate" in failed["number=0"]
    assert failed["number=1"] == "KeyError: 'conv7'"
    assert case.done() == {"number=2", "number=3"}
    notes = {note.split(":")[0]: note for note in progress.notes}
    where = case.run.store.path / "tracebacks.txt"
    assert "\n" not in notes["number=0"] + notes["number=1"]
    assert notes["number=1"] == f"number=1: failed: KeyError: 'conv7'; the full traceback is in {where}"
    assert 'raise KeyError("conv7")' in where.read_text()  # the line that raised it
    assert "not finite" not in where.read_text()  # a known mistake has no traceback
    assert case.attempts() == dict.fromkeys(("number=0", "number=1", "number=2", "number=3"), 1)


def test_what_is_missing_is_done_by_the_next_call(case: Case) -> None:
    case.do([Sum(number=0), Sum(number=1, fate="diverges")])
    failed, _ = case.do([Sum(number=1)])
    assert failed == {}
    assert case.done() == {"number=0", "number=1"}
    assert case.attempts() == {"number=0": 1, "number=1": 2}


def test_a_unit_whose_process_dies_is_done_again_where_the_executor_says_so(case: Case) -> None:
    if not case.executor.survives_deaths:
        pytest.skip("this executor's units share the process of the driver")
    failed, _ = case.do([Sum(number=0, fate="dies once"), Sum(number=1)])
    assert failed == {}
    assert case.attempts() == {"number=0": 2, "number=1": 1}


def test_the_most_costly_unit_starts_first_where_the_executor_says_so(case: Case, cluster: Capacity) -> None:
    units = [Sum(number=number, cost=cost) for number, cost in enumerate([2.0, 5.0, 1.0, 4.0, 3.0])]
    case.do(units, threads=cluster.num_cpus)  # one at a time
    costs = [units[int(number)].cost for number in (case.run.store.path / "order").read_text().split()]
    assert costs == ([5.0, 4.0, 3.0, 2.0, 1.0] if case.executor.starts_the_most_costly_first else [2, 5, 1, 4, 3])


def test_an_interruption_reaches_the_caller_and_leaves_what_is_stored(case: Case) -> None:
    (case.run.store.path / "driver").write_text(str(os.getpid()))
    units = [Sum(number=0, cost=9.0), Sum(number=1, fate="interrupts", cost=1.0)]
    with pytest.raises(KeyboardInterrupt), signals.orderly():
        case.do(units)
    assert "number=0" in case.done()


@pytest.mark.parametrize("kind", ["in_process", "actors"])
def test_what_units_share_is_loaded_once_for_each_name(kind: str, cluster: Capacity, splits: Splits, run: Run) -> None:
    case = Case(MEMBERS[kind](run, splits, cluster), run, splits)
    loaded: list[str] = []

    def load(name: str) -> dict[str, np.ndarray]:
        loaded.append(name)
        return {"array": np.full(1000, {"one": 1.0, "other": 2.0}[name])}

    units = [Sum(number=number, reads=name) for number, name in enumerate(["one", "one", "other", "other"])]
    failed, progress = case.do(units, shared=load)
    case.executor.close()
    assert failed == {}
    assert loaded == ["one", "other"]
    expected = ["shared 1000", "shared 1000", "shared 2000", "shared 2000"]
    assert [progress.texts[unit.name] for unit in units] == expected


def test_in_process_restores_the_threads(splits: Splits, run: Run) -> None:
    before = torch.get_num_threads()
    _, progress = Case(InProcess(run, splits, "cpu"), run, splits).do([Sum(number=0)], threads=before + 1)
    assert f"by {before + 1} threads" in progress.texts["number=0"]
    assert torch.get_num_threads() == before


def test_the_suite_covers_every_executor() -> None:
    """So that a new member is tested: each class of pipelines.execution with `do` is made by one of MEMBERS."""
    members = {InProcess, Actors, Trials}
    names = [module.name for module in pkgutil.iter_modules(execution.__path__)]
    modules = [importlib.import_module(f"pipelines.execution.{name}") for name in names]
    found = {
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and hasattr(each, "do") and hasattr(each, "survives_deaths")
    }
    assert found - {Executor} == members
    assert len(MEMBERS) == len(members)
