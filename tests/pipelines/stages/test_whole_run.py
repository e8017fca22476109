"""The whole pipeline through the commands, in this process: undisturbed, damaged, and interrupted in each stage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from miniature import assert_equal_tables, do, invoke, run_words, tables

from gross_ray import read_table
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from pipelines.driver import DataSource, Session
from pipelines.resources import Resources
from pipelines.stages import latencies
from pipelines.stages.pipeline import STAGES, do_all
from pipelines.watching import StageProgress


def test_every_table_is_complete(whole_run: tuple[Path, str]) -> None:
    stored = tables(whole_run[0])
    assert len(stored["networks"]) == 2
    assert len(stored["decompositions"].query("seed == 0")) == 19
    assert len(stored["configurations"]) == 2 * 252
    assert stored["configurations"].groupby("supernet")["configuration"].nunique().tolist() == [252, 252]
    assert set(stored["selections"]["budget"]) == {"16-16-16", "4-4-4"}
    assert (stored["selections"]["macs"] <= stored["selections"]["budget_macs"]).all()
    validated = set(stored["validations"]["configuration"])
    assert validated == {"16-16-16", "4-4-4", *stored["selections"]["configuration"]}
    assert set(stored["alpha_sweep"]["alpha"]) == {0.0, 4.0}


def test_pandas_alone_reads_the_tables(whole_run: tuple[Path, str]) -> None:
    run = whole_run[0]
    plain = pd.read_parquet(run / "tables" / "configurations")
    key = ["supernet", "configuration"]
    ours = tables(run)["configurations"].sort_values(key, ignore_index=True)
    pd.testing.assert_frame_equal(plain.sort_values(key, ignore_index=True), ours)


def test_the_run_ends_with_the_papers_tables(whole_run: tuple[Path, str], run: Path) -> None:
    finished, printed = whole_run
    for text in ("Table 2", "full", "fixed 16-16-16", "Table 3", "4-4-4 (fixed)", "Figure 1"):
        assert text in printed
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "run <code>gross" not in page  # nothing is missing
    report = invoke("report", run)
    assert report.exit_code == 0
    assert report.stdout.strip() == printed.strip()


def files(run: Path) -> dict[Path, int]:
    """Return the files of a run but those that every command makes anew, and when each was written."""
    anew = (".lock", "report.html")
    return {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file() and file.name not in anew}


def test_the_same_command_again_does_nothing(run: Path) -> None:
    before = files(run)
    do(*run_words(run))
    assert files(run) == before


def test_status_and_single_stages(run: Path) -> None:
    status = invoke("status", run)
    assert status.exit_code == 0
    assert "19 of 19 units" in status.stdout
    assert "waits" not in status.stdout
    before = files(run)
    for stage in STAGES:
        do(stage, run)
    assert files(run) == before


def test_a_damaged_table_and_a_lost_checkpoint_are_found_named_and_done_again(
    whole_run: tuple[Path, str], run: Path
) -> None:
    shard = sorted((run / "tables/configurations").glob("*.parquet"))[3]
    shard.write_bytes(shard.read_bytes()[:-100])
    others = {file: file.stat().st_mtime_ns for file in shard.parent.iterdir() if file != shard}
    (run / "checkpoints/decompose/conv3,g=4,seed=0.safetensors").unlink()
    ended = do(*run_words(run))
    assert f"damaged file tables/configurations/{shard.name}" in ended.stderr
    assert "decompose: left alone: conv1 (the network's first convolution)\n" in ended.stderr
    assert {file: file.stat().st_mtime_ns for file in others} == others
    assert_equal_tables(whole_run[0], run)


def test_damage_in_tables_that_no_stage_completes_is_found_by_the_next_command(
    whole_run: tuple[Path, str], run: Path, tmp_path: Path
) -> None:
    timed = invoke("latency", run, "--device", "cpu", "--repeats", "2")
    assert timed.exit_code == 0, timed.stderr
    files = [next(run.glob(f"tables/{name}/*")) for name in ("runs", "layer_latencies", "selections")]
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    early = invoke("validate", run, "--in-process")
    assert early.exit_code == 2
    assert early.stderr.strip().endswith("run `gross search` on it first")
    found = invoke("check", run)
    assert (found.exit_code, found.stdout) == (0, f"{run}: 2 damaged files\n"), found.stderr
    told = dict(re.findall(r"damaged file tables/(\w+)/[^:]*: deleted; (.*)", early.stderr + found.stderr))
    assert told == {
        "runs": "that start is on record no more",
        "layer_latencies": "measure again with `gross latency`",
        "selections": "its stage, asked for as before, makes it anew",
    }
    do(*run_words(run))
    pd.testing.assert_frame_equal(tables(run)["selections"], tables(whole_run[0])["selections"], check_exact=True)
    assert latencies.in_force(Run(RunStore.open(run))) is None
    shutil.rmtree(run / "tables/runs")
    configuration = read_table(run, "validations")["configuration"].iloc[0]
    for words in (["report"], ["export", "--configuration", configuration, "--to", tmp_path / "a.safetensors"]):
        shown = invoke(words[0], run, *words[1:])
        assert shown.exit_code == 0, shown.stderr
    assert json.loads((tmp_path / "a.safetensors.json").read_text())["versions"] is None


class Stopped(StageProgress):
    """Interrupts its stage, as Ctrl-C does, at the `number`-th report of a unit, or when so many units are done."""

    def __init__(self, name: str, total: int, done: int, event: str, number: int) -> None:
        super().__init__(name, total, done)
        self._event, self._left = event, number

    def unit_done(self, unit: str, text: str) -> None:
        super().unit_done(unit, text)
        self._count("done")

    def under_way(self, states: dict[str, tuple[float, str]]) -> None:
        self._count("report")

    def _count(self, event: str) -> None:
        self._left -= event == self._event
        if event == self._event and self._left == 0:
            raise KeyboardInterrupt


class Progress:
    """Shows nothing, and interrupts a stage."""

    def __init__(self, stage: str = "", event: str = "", number: int = 0) -> None:
        self._stopped, self._event, self._number = stage, event, number

    @contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[StageProgress]:
        stopped = name == self._stopped
        yield (Stopped(name, total, done, self._event, self._number) if stopped else StageProgress(name, total, done))

    def note(self, text: str) -> None:
        pass


MOMENTS = {
    "train": ("report", 3),  # the second network's first epoch
    "decompose": ("done", 3),
    "reconstruct": ("report", 1),
    "finetune": ("report", 1),
    "search plan": ("done", 1),
    "search": ("done", 3),
    "validate": ("report", 2),  # it is reconstructed, and fine-tuned for an epoch
    "sweep-alpha": ("report", 3),
    "sweep-alpha search": ("done", 1),
}
"""Where each stage is interrupted."""


def epochs_under_way(run: Path) -> dict[tuple[str, str], list[float]]:
    """Return the seconds of each epoch that a training under way has stored, by stage and unit."""
    states = run.glob("checkpoints/*-under-way/*.json")
    return {
        (file.parent.name.removesuffix("-under-way"), file.stem): [
            epoch["seconds"] for epoch in json.loads(file.read_text())["history"]
        ]
        for file in states
    }


def test_interrupted_in_each_stage_the_run_still_ends_with_equal_tables(
    whole_run: tuple[Path, str], tmp_path: Path
) -> None:
    experiment = RunStore.open(whole_run[0]).experiment
    store = RunStore.create(tmp_path / "run", experiment)
    stored: dict[Path, int] = {}
    epochs: dict[tuple[str, str], list[float]] = {}

    def continued(progress: Progress) -> None:
        resources = Resources(num_cpus=1, in_process=True)
        with Session.opened(store, resources, DataSource(), progress, in_process=True) as session:
            do_all(session)

    for stage, (event, number) in MOMENTS.items():
        with pytest.raises(KeyboardInterrupt):
            continued(Progress(stage, event, number))
        stored |= {file: file.stat().st_mtime_ns for file in store.path.glob("tables/*/*.parquet")}
        epochs |= epochs_under_way(store.path)
    continued(Progress())
    assert_equal_tables(whole_run[0], store.path)
    assert {file: file.stat().st_mtime_ns for file in stored} == stored  # no unit is done again
    assert {stage for stage, _ in epochs} == {
        *("train", "reconstruct", "finetune", "validate-reconstruct", "validate-finetune")
    }
    history = read_table(store.path, "history").sort_values("epoch").groupby(["stage", "unit"])["seconds"]
    for training, seconds in epochs.items():  # nor an epoch: it would have taken other seconds
        assert history.get_group(training).tolist()[: len(seconds)] == seconds, training
    assert list(store.path.rglob(".*.tmp")) == []
    assert not list(store.path.glob("checkpoints/*-under-way/*"))
