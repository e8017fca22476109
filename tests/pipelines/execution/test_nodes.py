"""Several nodes: the code travels, and a node that is lost in the middle of any stage changes no table."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import faults
import pandas as pd
import pytest
import ray
from faults import (
    FAULTS,
    MARK,
    PATIENCE,
    REPEATS,
    SEED,
    STAGES,
    assert_as_undisturbed,
    assert_epochs_kept,
    assert_stored_as_undisturbed,
    at_a_moment,
    before_stage,
    driver,
    epochs_under_way,
    resume,
    stored,
    workers,
)
from miniature import ROOT, tables

from gross_ray.errors import ResourcesError
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from pipelines.commands.terminal import Reporter
from pipelines.driver import DataSource, Session
from pipelines.execution.cluster import connected
from pipelines.resources import Resources
from pipelines.stages import decompose, finetune, reconstruct, search, sweep, train, validate
from pipelines.stages.pipeline import STAGES as PLANS
from pipelines.units import Context, Unit
from pipelines.watching import StageProgress

FAST_FAILOVER = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 20_000,
    "health_check_failure_threshold": 3,
}
"""A node that is gone refuses each check at once, and is missed soon; one on a busy machine has a minute to answer."""
SETTINGS = [
    "data.limit_train=128",
    "data.limit_validation=40",
    "data.limit_test=40",
    "training.epochs=2",
    "training.milestones=[]",
    "training.seeds=1",
    "decomposition.max_steps=3",
    "decomposition.group_sizes=[1,4,16]",
    "reconstruction.epochs=3",
    "search.form=dense",
    "validation.seeds=1",
]


SIGNALS = ("driver killed", "driver terminated", "interrupted")


class Nodes:
    """A head without cores and two nodes with one core each; one can be lost, and another one come."""

    def __init__(self) -> None:
        from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
        from ray.cluster_utils import Cluster as Machines

        ensure_token_if_auth_enabled()
        self.mark = uuid.uuid4().hex
        """By which its processes are known."""
        self._environment = pytest.MonkeyPatch()
        self._environment.setenv(MARK, self.mark)
        self._environment.setenv("RAY_AUTH_MODE", "token" if is_token_auth_enabled() else "disabled")  # drivers too
        memory = 80 * 2**20
        self._worker = {"num_cpus": 1, "object_store_memory": memory}
        head = {"num_cpus": 0, "object_store_memory": memory, "include_dashboard": False}
        self._machines = Machines(initialize_head=True, head_node_args={**head, "_system_config": FAST_FAILOVER})
        self.address: str = self._machines.address
        self.restore()

    def restore(self, count: int = 2, **environment: str) -> None:
        """Have so many nodes again, new ones with `environment` for their processes."""
        while len(self._machines.worker_nodes) < count:
            self._machines.add_node(**self._worker, env_vars=environment)

    def lose(self, node_id: str) -> None:
        """Kill a node whole."""
        (node,) = (one for one in self._machines.worker_nodes if one.node_id == node_id)
        self._machines.remove_node(node, allow_graceful=False)

    def lose_all(self) -> None:
        for node in list(self._machines.worker_nodes):
            self._machines.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._environment.undo()
        self._machines.shutdown()


@pytest.fixture(scope="module")
def nodes(request: pytest.FixtureRequest, no_ray: None) -> Iterator[Nodes]:
    modules = (request.module, faults)
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    there = Nodes()
    yield there
    there.close()
    for module in modules:
        ray.cloudpickle.unregister_pickle_by_value(module)


class Quiet(Reporter):
    @contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[StageProgress]:
        yield StageProgress(name, total, done)


def _work_on(store: RunStore, nodes: Nodes, *stages: Callable[[Session], None]) -> None:
    resources = Resources(address=nodes.address, device="cpu")
    with Session.opened(store, resources, DataSource(), Quiet()) as session:
        for stage in stages:
            stage(session)


def _work_alone(store: RunStore, *stages: Callable[[Session], None]) -> None:
    """Do stages in this process, with the one thread that a node's core gives."""
    resources = Resources(num_cpus=1, device="cpu")
    with Session.opened(store, resources, DataSource(), Quiet(), in_process=True) as session:
        for stage in stages:
            stage(session)


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run as it is before its search, and the same at its end.

    How the search cuts the space depends on how many workers there are: what comes before it is done in this process.
    """
    store = RunStore.create(tmp_path_factory.mktemp("nodes") / "run", preset("quickstart").override(SETTINGS))
    before = store.path.with_name("before")
    _work_alone(store, train.do, decompose.do, reconstruct.do, finetune.do, validate.do_fixed)
    shutil.copytree(store.path, before, ignore=shutil.ignore_patterns(".lock"))
    _work_on(store, nodes, search.do, sweep.do)
    return before, store.path


@pytest.fixture(scope="module")
def validated(undisturbed: tuple[Path, Path]) -> Path:
    """The same with all that the stage `validate` trains, not the fixed configurations alone."""
    run = undisturbed[1].with_name("validated")
    shutil.copytree(undisturbed[1], run, ignore=shutil.ignore_patterns(".lock"))
    _work_alone(RunStore.open(run), validate.do)
    return run


def _mark_start(context: Context, unit: Unit) -> None:
    """Note on which node a unit was started, each time that it was."""
    marks = context.store.path.parent / "starts" / unit.name
    marks.parent.mkdir(exist_ok=True)
    with marks.open("a") as file:
        file.write(ray.get_runtime_context().get_node_id() + "\n")


def _starts(run: Path) -> dict[str, list[str]]:
    return {file.name: file.read_text().split() for file in (run.parent / "starts").iterdir()}


def held_work(stage: str, epochs: str, after: int, context: Context, unit: Unit) -> str:
    """Do a unit of `stage`: once `after` of its epochs, or units, are stored, it is held until a node is lost."""
    _mark_start(context, unit)
    held, report = HELD[stage], context.report

    def held_report(share: float, text: str, **metrics: float) -> object:
        if sum(map(len, epochs_under_way(context.store.path, epochs, unit.name).values())) >= after:
            _hold(context, unit, stage)
        return report(share, text, **metrics)

    if held.table:
        if len(context.store.finished_units(held.table)) >= after:
            _hold(context, unit, stage)
    else:
        context.report = held_report
    return held.module.work(context, unit)


def _hold(context: Context, unit: Unit, stage: str) -> None:
    folder = context.store.path.parent
    (folder / f"held-in-{stage}" / f"{unit.name} {os.getpid()}").touch()
    deadline = time.monotonic() + PATIENCE
    while not (folder / f"lost-in-{stage}").exists():
        assert time.monotonic() < deadline, "no node was lost"
        time.sleep(0.01)


@dataclass(frozen=True)
class Held:
    """A stage, and when its work is held: after 1 to `most` epochs of a unit, or units of a table."""

    module: ModuleType
    most: int
    epochs: tuple[str, ...] = ("",)
    """Trainings, the epochs of one of which count."""
    table: str = ""

    def do(self, session: Session) -> None:
        """Do the stage; of `validate`, what does not wait for the search."""
        (validate.do_fixed if self.module is validate else self.module.do)(session)


HELD = {
    "train": Held(train, 2, epochs=("train",)),
    "decompose": Held(decompose, 5, table="decompositions"),
    "reconstruct": Held(reconstruct, 1, epochs=("reconstruct",)),
    "finetune": Held(finetune, 2, epochs=("finetune",)),
    "search": Held(search, 3, table="configurations"),
    "validate": Held(validate, 2, epochs=("validate-*",)),
    "sweep-alpha": Held(sweep, 1, epochs=("reconstruct", "finetune")),
}
QUICK = ("search", "sweep-alpha")
"""The stages in which a node is lost in `make test` too."""


class Loss(threading.Thread):
    """Loses the node on which a unit is held, as soon as there is one; then the others are let go."""

    def __init__(self, nodes: Nodes, run: Path, stage: str) -> None:
        super().__init__(daemon=True)
        self._nodes, self._run = nodes, run
        self._held, self._sign = (run.parent / f"{what}-in-{stage}" for what in ("held", "lost"))
        self._held.mkdir()
        self.lost = self.unit = ""
        self.epochs: dict[str, list[float]] = {}
        """What was stored of the units under way."""

    def run(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not self.lost:
            for file in self._held.iterdir():
                self.unit, _, pid = file.name.rpartition(" ")
                node = _starts(self._run)[self.unit][-1]
                self.epochs = epochs_under_way(self._run)
                self._nodes.lose(node)
                with suppress(ProcessLookupError):  # its workers outlive Ray's own processes by a moment
                    os.kill(int(pid), signal.SIGKILL)
                self.lost = node
                self._sign.touch()
                break
            time.sleep(0.01)


@contextmanager
def _loss(nodes: Nodes, run: Path, stage: str) -> Iterator[Loss]:
    loss = Loss(nodes, run, stage)
    loss.start()
    yield loss
    loss.join()
    assert loss.lost, "no unit was seen under way"


def _hold_back(monkeypatch: pytest.MonkeyPatch, stage: str, choices: random.Random | None = None) -> None:
    """Have the work of a stage held at a moment of `choices`, or as soon as its last training has stored anything."""
    held = HELD[stage]
    epochs, after = (choices.choice(held.epochs), choices.randint(1, held.most)) if choices else (held.epochs[-1], 1)
    monkeypatch.setattr(held.module, "work", partial(held_work, stage, epochs, after))


@pytest.mark.faults
@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize("stage", HELD)
def test_a_node_lost_in_mid_stage_changes_no_table(
    nodes: Nodes,
    undisturbed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    repeat: int,
) -> None:
    held, (_, expected) = HELD[stage], undisturbed
    run = before_stage(expected, stage, tmp_path / "run")
    _hold_back(monkeypatch, stage, random.Random(f"{SEED} {stage} {repeat}"))
    nodes.restore()
    with _loss(nodes, run, stage) as loss:
        _work_on(RunStore.open(run), nodes, held.do)
    starts = _starts(run)
    assert [unit for unit, where in starts.items() if len(where) > 1] == [loss.unit]  # no other is done again
    assert starts[loss.unit][0] == loss.lost != starts[loss.unit][1]
    assert loss.epochs or held.table
    assert_epochs_kept(run, loss.epochs)
    store = RunStore.open(run)
    assert set(starts) <= PLANS[stage].done(Run(store))
    assert_stored_as_undisturbed(store, RunStore.open(expected))


@pytest.mark.quick_fault
def test_nodes_lost_in_mid_search_and_in_mid_sweep_change_no_table(
    nodes: Nodes, undisturbed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, expected = undisturbed
    run = tmp_path / "run"
    nodes.restore()
    shutil.copytree(before, run)
    _hold_back(monkeypatch, "search")
    _hold_back(monkeypatch, "sweep-alpha")
    with _loss(nodes, run, "search") as first:
        _work_on(RunStore.open(run), nodes, search.do)
    starts = _starts(run)
    assert len(starts) == len(RunStore.open(run).finished_units("configurations")) >= 4
    assert [unit for unit, where in starts.items() if len(where) > 1] == [first.unit]  # no other is done again
    assert starts[first.unit][0] == first.lost != starts[first.unit][1]

    nodes.restore()
    with _loss(nodes, run, "sweep-alpha") as second:
        _work_on(RunStore.open(run), nodes, sweep.do)
    where = _starts(run)[second.unit]
    assert len(where) == 2
    assert where[0] == second.lost != where[1]

    _assert_as(expected, run)


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        pytest.param("train", "driver killed", marks=pytest.mark.quick_fault),
        *(pytest.param(stage, fault, marks=pytest.mark.faults) for stage in STAGES for fault in SIGNALS),
    ],
)
def test_a_driver_that_joined_ends_its_work_on_the_nodes(
    nodes: Nodes, validated: Path, tmp_path: Path, stage: str, fault: str
) -> None:
    """Killed or signalled: its workers end, those of others and the cluster stay, the same command finishes the run."""
    run, log = before_stage(validated, stage, tmp_path / "run"), tmp_path / "log"
    choices = random.Random(f"{SEED} {stage} {fault} joined")
    nodes.restore()
    joining = ("--address", nodes.address)
    with driver(run, stage, log, *joining) as process:
        at_a_moment(process, run, stage, log, choices.uniform(0.0, 0.2))
        inject, status = FAULTS[fault]
        ended = inject(process, run, stage, choices)
        finished = ended in (0, -signal.SIGTERM, -signal.SIGINT) and "finished after" in log.read_text()
        assert ended == status or finished, log.read_text()
    deadline = time.monotonic() + PATIENCE
    while there := workers(nodes.mark):
        assert time.monotonic() < deadline, f"still at work: {there}"
        time.sleep(0.1)
    kept, epochs = stored(run), epochs_under_way(run)
    resume(run, stage, log, *joining)
    assert stored(run).items() >= kept.items()
    assert_epochs_kept(run, epochs)
    assert_as_undisturbed(run, validated, stage)


def _assert_as(expected: Path, run: Path) -> None:
    found = tables(run)
    for name, table in tables(expected).items():
        assert len(table), f"table {name} is empty"
        pd.testing.assert_frame_equal(found[name], table, check_exact=True, obj=name)


DRIVER = """
import sys
import ray
from pipelines.execution.cluster import connected
from pipelines.execution.actors import Actors
from pipelines.resources import Resources
from pipelines.watching import StageProgress
from pipelines.packing import pack_splits
from pipelines.units import Job, Unit
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore


class One(Unit):
    name = "one"


def work(context, unit):
    import gross_ray
    (context.store.path / "done").touch()
    return gross_ray.__file__


class Printed(StageProgress):
    def unit_done(self, unit, text):
        print("done", text)


address, folder, travels = sys.argv[1:]
if travels == "no":
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
with connected(Resources(address=address, device="cpu")) as capacity:
    run = Run(RunStore.create(folder, preset("quickstart")))
    packed = ray.put(pack_splits(load_dataset(DataOptions(name="sample", limit_train=2))))
    job = Job(stage="one", units=[One()], work=work, done=set, kind="one", num_equal=1)
    Actors(capacity, packed, run).do(job, job.units, threads=1, progress=Printed("one", 1, 0))
"""


def test_the_code_travels_to_the_nodes_and_where_it_does_not_another_one_is_refused(
    nodes: Nodes, tmp_path: Path
) -> None:
    stale, run, driver = tmp_path / "stale", tmp_path / "run", tmp_path / "driver" / "driver.py"
    for package in ("gross_ray", "pipelines"):
        shutil.copytree(ROOT / package, stale / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (stale / "gross_ray/seeds.py").open("a") as file:
        file.write("# changed\n")
    driver.parent.mkdir()
    driver.write_text(DRIVER)
    nodes.lose_all()
    nodes.restore(1, PYTHONPATH=str(stale))

    def ended(travels: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, str(driver), nodes.address, str(run), travels]
        return subprocess.run(
            words, cwd=driver.parent, env=environment, capture_output=True, text=True, check=False, timeout=600
        )

    without = ended("no")
    assert without.returncode == 1
    message = without.stderr.strip().splitlines()[-1]
    assert message.startswith("gross_ray.errors.VersionMismatchError: the worker on node ")
    assert f"it imports gross_ray from {stale / 'gross_ray'}: install the same versions there" in message
    assert message.count("(sources ") == 2
    assert not (run / "done").exists()

    travelled = ended("yes")
    assert travelled.returncode == 0, travelled.stderr
    (line,) = (line for line in travelled.stdout.splitlines() if line.startswith("done "))
    assert "py_modules_files" in line
    assert (run / "done").exists()


def test_a_unit_that_fits_on_no_node_is_refused_at_once(nodes: Nodes) -> None:
    asked = Resources(address=nodes.address, device="cuda", gpus_per_unit=1.0)
    with pytest.raises(ResourcesError, match="1 CPU core and 1 GPU on one node; the cluster has"), connected(asked):
        pass
