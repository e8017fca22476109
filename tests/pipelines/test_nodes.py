"""Several nodes: the code travels, and a node that is lost in mid-search or mid-sweep changes no table."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import ray
from miniature import tables

from gross_ray.presets import preset
from gross_ray.results.store import RunStore
from pipelines import decompose, search, supernet, sweep, train, validate
from pipelines.cluster import Resources
from pipelines.progress import Reporter, StageProgress
from pipelines.session import DataSource, Session
from pipelines.units import Context, Unit

FAST_FAILOVER = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 2,
}
SETTINGS = [
    "data.limit_train=128",
    "data.limit_validation=40",
    "data.limit_test=40",
    "training.epochs=1",
    "training.milestones=[]",
    "training.seeds=1",
    "decomposition.max_steps=3",
    "decomposition.group_sizes=[1,4,16]",
    "search.form=dense",
    "validation.seeds=1",
]


class Nodes:
    """A head without cores and two nodes with one core each; one can be lost, and another one come."""

    def __init__(self) -> None:
        from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
        from ray.cluster_utils import Cluster as Machines

        ensure_token_if_auth_enabled()
        memory = 80 * 2**20
        self._worker = {"num_cpus": 1, "object_store_memory": memory}
        head = {"num_cpus": 0, "object_store_memory": memory, "include_dashboard": False}
        self._machines = Machines(initialize_head=True, head_node_args={**head, "_system_config": FAST_FAILOVER})
        self.address: str = self._machines.address
        self.restore()

    def restore(self, **environment: str) -> None:
        """Have two nodes again, new ones with `environment` for their processes."""
        while len(self._machines.worker_nodes) < 2:
            self._machines.add_node(**self._worker, env_vars=environment)

    def lose(self, node_id: str) -> None:
        """Kill a node whole."""
        (node,) = (one for one in self._machines.worker_nodes if one.node_id == node_id)
        self._machines.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._machines.shutdown()


@pytest.fixture(scope="module")
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    ray.cloudpickle.register_pickle_by_value(request.module)
    there = Nodes()
    yield there
    there.close()
    ray.cloudpickle.unregister_pickle_by_value(request.module)


class Quiet(Reporter):
    @contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[StageProgress]:
        yield StageProgress(name, total, done)


def _work_on(store: RunStore, nodes: Nodes, *stages: Callable[[Session], None]) -> None:
    resources = Resources(address=nodes.address, device="cpu")
    with Session.opened(store, resources, DataSource(), Quiet()) as session:
        for stage in stages:
            stage(session)


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run as it stands before its search, and the same at its end."""
    store = RunStore.create(tmp_path_factory.mktemp("nodes") / "run", preset("quickstart").override(SETTINGS))
    before = store.path.with_name("before")

    def copy(_: Session) -> None:
        shutil.copytree(store.path, before)

    first = (train.run, decompose.run, supernet.run_reconstruct, supernet.run_finetune, validate.run_fixed)
    _work_on(store, nodes, *first, copy, search.run, sweep.run)
    return before, store.path


def _mark_start(context: Context, unit: Unit) -> None:
    """Note on which node a unit was started, each time that it was."""
    marks = context.store.path.parent / "starts" / unit.name
    marks.parent.mkdir(exist_ok=True)
    with marks.open("a") as file:
        file.write(ray.get_runtime_context().get_node_id() + "\n")


def _starts(run: Path) -> dict[str, list[str]]:
    return {file.name: file.read_text().split() for file in (run.parent / "starts").iterdir()}


def slow_shard(context: Context, unit: Unit) -> str:
    _mark_start(context, unit)
    time.sleep(0.3)
    return SHARD(context, unit)


def slow_trial(context: Context, unit: Unit) -> str:
    _mark_start(context, unit)
    report = context.report

    def slow_report(share: float, text: str, **metrics: float) -> object:
        time.sleep(0.3)
        return report(share, text, **metrics)

    context.report = slow_report
    return TRIAL(context, unit)


SHARD, TRIAL = search.work, sweep.work


class Loss(threading.Thread):
    """Loses the node on which a unit is under way, as soon as there is one."""

    def __init__(self, nodes: Nodes, run: Path, under_way: Callable[[], list[str]]) -> None:
        super().__init__(daemon=True)
        self._nodes, self._run, self._under_way = nodes, run, under_way
        self.lost = ""

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not self.lost:
            if units := self._under_way():
                node = _starts(self._run)[units[0]][-1]
                self._nodes.lose(node)
                self.lost = node
            time.sleep(0.01)


@contextmanager
def _loss(nodes: Nodes, run: Path, under_way: Callable[[], list[str]]) -> Iterator[Loss]:
    loss = Loss(nodes, run, under_way)
    loss.start()
    yield loss
    loss.join()
    assert loss.lost, "no unit was seen under way"


def test_nodes_lost_in_mid_search_and_in_mid_sweep_change_no_table(
    nodes: Nodes, undisturbed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, expected = undisturbed
    run = tmp_path / "run"
    shutil.copytree(before, run)
    shards, epochs = run / "tables/configurations", run / "checkpoints/finetune-under-way"

    def under_way_in_search() -> list[str]:
        done = {file.stem for file in shards.glob("*.parquet")}
        return [unit for unit in _starts(run) if "start=" in unit and unit not in done] if done else []

    def under_way_in_sweep() -> list[str]:
        return [file.stem for file in epochs.glob("alpha=*.safetensors")]

    monkeypatch.setattr(search, "work", slow_shard)
    monkeypatch.setattr(sweep, "work", slow_trial)
    with _loss(nodes, run, under_way_in_search) as first:
        _work_on(RunStore.open(run), nodes, search.run)
    starts = _starts(run)
    assert len(starts) == len(list(shards.glob("*.parquet"))) >= 4
    (where,) = (where for where in starts.values() if len(where) > 1)  # what the lost node was doing, and nothing else
    assert where[0] == first.lost
    assert where[1:] == [next(each for each in sum(starts.values(), []) if each != first.lost)]

    nodes.restore()
    with _loss(nodes, run, under_way_in_sweep) as second:
        _work_on(RunStore.open(run), nodes, sweep.run)
    (where,) = (where for unit, where in _starts(run).items() if "start=" not in unit)
    assert len(where) == 2
    assert where[0] == second.lost != where[1]

    found = tables(run)
    for name, table in tables(expected).items():
        assert len(table), f"table {name} is empty"
        pd.testing.assert_frame_equal(found[name], table, check_exact=True, obj=name)
