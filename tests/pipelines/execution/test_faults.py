"""Faults in each stage: afterwards the same command ends with the tables of a run that nothing disturbed.

`make test` injects the faults below `QUICK`, as soon as the stage is under way; `make test-faults` all of the matrix in
docs/reliability.md, at random moments: every second time before the stage has stored anything, where the fault may.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import test_nodes
from faults import (
    FAULTS,
    PATIENCE,
    REPEATS,
    SEED,
    STAGES,
    TAKES_NO_FILE,
    Driver,
    assert_as_undisturbed,
    assert_epochs_kept,
    assert_starting_have_ended,
    at_a_moment,
    at_a_moment_before,
    before_stage,
    checked,
    driver,
    epochs_under_way,
    fill,
    kill_driver,
    marked,
    resume,
    resume_in_process,
    stored,
)
from miniature import ROOT

from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from pipelines.stages import finetune
from pipelines.stages.pipeline import STAGES as PLANS

QUICK = [
    ("train", "driver killed"),
    ("train", "driver terminated"),
    ("search", "worker killed"),
    ("validate", "driver killed"),
    ("validate", "interrupted"),
]
"""On actors and on Tune each, a driver that is killed and one that is signalled, in the stages that take longest."""
FULL_DISK_QUICK, DIVERGED_QUICK = "decompose", "validate"
KEEPS_ALL = {"driver killed", "driver terminated", "interrupted", "worker killed", "damaged Tune files"}
"""Faults that spoil nothing stored: no finished unit and no stored epoch may be done again."""


def _cells(stages: Iterable[str], quick: str) -> list[Any]:
    """Return each stage with the numbers of its repetitions, and one for `make test`, at a set moment: number None."""
    cells = [pytest.param(quick, None, marks=pytest.mark.quick_fault)]
    return cells + [
        pytest.param(stage, repeat, marks=pytest.mark.faults) for stage in stages for repeat in range(REPEATS)
    ]


@pytest.fixture(autouse=True, scope="module")
def starting_end() -> Iterator[None]:
    yield
    assert_starting_have_ended()


def _inject(
    undisturbed: Path,
    tmp_path: Path,
    stage: str,
    fault: str,
    choices: random.Random,
    latest: float,
    moment: Callable[[Driver, Path, str, Path, float], None] = at_a_moment,
    finish: Callable[[Path, str, Path], str] = resume,
) -> None:
    """Let the fault happen at most `latest` seconds after the stage is under way, finish the run and compare."""
    run, log = before_stage(undisturbed, stage, tmp_path / "run"), tmp_path / "log"
    with driver(run, stage, log) as process:
        moment(process, run, stage, log, choices.uniform(0.0, latest))
        inject, expected = FAULTS[fault]
        status = inject(process, run, stage, choices)
        signalled = status in (0, -signal.SIGTERM, -signal.SIGINT)  # the last two: on its way out, Ray shut down
        ended_before = latest > 0 and signalled and "finished after" in log.read_text()
        assert status == expected or ended_before, log.read_text()
    kept, epochs = stored(run), epochs_under_way(run)  # after the last worker: it may end its unit meanwhile
    told = checked(run) + finish(run, stage, log) if process.damaged else finish(run, stage, log)
    assert_as_undisturbed(run, undisturbed, stage)
    for file, content in process.damaged.items():
        if file.suffix in (".parquet", ".safetensors"):  # one that nothing reads any more is written anew, untold
            named = f"damaged file {file.relative_to(run)}: deleted; " in told
            assert named or not file.exists() or file.read_bytes() != content, file
    if fault in KEEPS_ALL:
        assert stored(run).items() >= kept.items()
        assert_epochs_kept(run, epochs)
    assert list(run.rglob(".*.tmp")) == []


@pytest.mark.quick_fault
@pytest.mark.parametrize(("stage", "fault"), QUICK)
def test_as_soon_as_the_stage_is_under_way(whole_run: tuple[Path, str], tmp_path: Path, stage: str, fault: str) -> None:
    finish = resume if fault == "driver killed" else resume_in_process  # once on actors, once in Tune
    _inject(whole_run[0], tmp_path, stage, fault, random.Random(SEED), 0.0, finish=finish)


@pytest.fixture(scope="session")
def with_tune_files(whole_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run, its validations made by Ray Tune: in process there are no files of Tune."""
    folder = tmp_path_factory.mktemp("tune")
    run = before_stage(whole_run[0], "validate", folder / "run")
    resume(run, "validate", folder / "log")
    assert_as_undisturbed(run, whole_run[0], "validate")
    return run


@pytest.mark.faults
@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_matrix(
    request: pytest.FixtureRequest, whole_run: tuple[Path, str], tmp_path: Path, stage: str, fault: str, repeat: int
) -> None:
    tuned = fault == "damaged Tune files"
    undisturbed = request.getfixturevalue("with_tune_files") if tuned else whole_run[0]
    choices = random.Random(f"{SEED} {stage} {fault} {repeat}")
    before = repeat % 2 == 1 and fault in TAKES_NO_FILE
    moment, latest = (at_a_moment_before, 5.0) if before else (at_a_moment, 1.0)
    _inject(undisturbed, tmp_path, stage, fault, choices, latest, moment)


@pytest.mark.faults
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_terminated_while_ray_starts(whole_run: tuple[Path, str], tmp_path: Path, server: str) -> None:
    run, log = before_stage(whole_run[0], "train", tmp_path / "run"), tmp_path / "log"
    with driver(run, "train", log) as process:
        deadline = time.monotonic() + PATIENCE
        while not any(server in title.split(" ")[0] for _, title in marked(process.mark)):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        process.terminate()
        assert process.ended(PATIENCE) == 143, log.read_text()
    assert log.read_text().strip().splitlines()[-1].startswith("Interrupted: what is finished is stored")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize(("stage", "repeat"), _cells(STAGES, FULL_DISK_QUICK))
def test_a_full_disk(whole_run: tuple[Path, str], tmp_path: Path, stage: str, repeat: int | None) -> None:
    """From some moment on all room is taken, and whatever becomes free."""
    choices = random.Random(f"{SEED} {stage} full disk {repeat}")
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    begun = before_stage(whole_run[0], stage, tmp_path / "begun")
    kilobytes = sum(-(-file.stat().st_size // 4096) * 4 for file in begun.rglob("*") if file.is_file()) + 16 * 1024
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("cannot mount a file system here")
    try:
        run = disk / "run"
        shutil.copytree(begun, run)
        with driver(run, stage, log) as process:
            if repeat is None:
                at_a_moment(process, run, stage, log, 0.0)
            elif repeat % 2:
                at_a_moment_before(process, run, stage, log, choices.uniform(0.0, 5.0))
            else:
                at_a_moment(process, run, stage, log, choices.uniform(0.0, 1.0))
            fill(process, disk / "filler")
            status, told = process.ended(PATIENCE), log.read_text()
        if status or repeat is None:  # after the last file a full disk hurts nobody
            assert status == 1 and "No space left on device" in told, told
        assert "Traceback" not in told
        assert list(run.rglob(".*.tmp")) == []
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
        kept, epochs = stored(run), epochs_under_way(run)
        (resume_in_process if repeat is None else resume)(run, stage, log)
        assert_as_undisturbed(run, whole_run[0], stage)
        assert stored(run).items() >= kept.items()
        assert_epochs_kept(run, epochs)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def _opened(run: Path) -> Run:
    return Run(RunStore.open(run))


LEARNING_RATES = {
    "train": "training",
    "reconstruct": "reconstruction",
    "finetune": "finetuning",
    "validate": "validation.finetuning",
    "sweep-alpha": "finetuning",
}


def _anything_left_to_train(run: Path, stage: str, units: set[str]) -> bool:
    """Return whether a unit has an epoch left: one with all of them stored cannot diverge, though it is not done."""
    opened = _opened(run)
    epochs = attrgetter(LEARNING_RATES[stage])(opened.experiment).epochs
    kind = {"validate": "validate-finetune", "sweep-alpha": finetune.NAME}.get(stage, stage)
    trainings = finetune if stage == "sweep-alpha" else PLANS[stage]
    stored = epochs_under_way(run, kind)
    return any(len(stored.get(f"{kind},{unit}", ())) < epochs for unit in units - trainings.done(opened))


@pytest.mark.parametrize(("stage", "repeat"), _cells(LEARNING_RATES, DIVERGED_QUICK))
def test_a_loss_that_is_not_finite(whole_run: tuple[Path, str], tmp_path: Path, stage: str, repeat: int | None) -> None:
    """Each unit that diverges is named with step and learning rate; with the old rate the run ends as undisturbed."""
    run, log = before_stage(whole_run[0], stage, tmp_path / "run"), tmp_path / "log"
    units = {unit.name for unit in PLANS[stage].plan(_opened(run))}
    if repeat is not None and repeat % 2:  # in the middle: up to a kill the learning rate was right
        choices = random.Random(f"{SEED} {stage} diverged {repeat}")
        latest = choices.uniform(0.0, 0.3)
        for moment in (latest, latest / 4, 0.0):
            with driver(run, stage, log) as process:
                at_a_moment(process, run, stage, log, moment)
                kill_driver(process, run, stage, choices)
            if _anything_left_to_train(run, stage, units):
                break
            shutil.rmtree(run)  # all had ended by then: workers outlive their driver by a moment, short units with them
            before_stage(whole_run[0], stage, run)
    kept, epochs = stored(run), epochs_under_way(run)
    file = run / "experiment.json"
    sound = file.read_text()
    wrong = json.loads(sound)
    place = wrong
    for part in LEARNING_RATES[stage].split("."):
        place = place[part]
    place["lr"] = 1e9
    file.write_text(json.dumps(wrong))
    with driver(run, stage, log) as process:
        assert process.ended(PATIENCE) == 1, log.read_text()
    told = log.read_text()
    assert "Traceback" not in told
    missing = {unit for unit in units if f"{unit}: failed: the loss became" in told}
    assert missing and missing == units - PLANS[stage].done(_opened(run))
    assert re.search(r"the loss became (nan|inf) at step \d+ of epoch \d+ with learning rate 1e\+0[89]; lower", told)
    file.write_text(sound)
    (resume_in_process if repeat is None else resume)(run, stage, log)
    assert_as_undisturbed(run, whole_run[0], stage)
    assert stored(run).items() >= kept.items()
    assert_epochs_kept(run, epochs)


def test_the_documents_matrix_is_the_one_that_is_tested() -> None:
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0][1:] == list(STAGES)
    named = {row[0]: row[1:] for row in rows[2:]}
    assert named.keys() == {*FAULTS, "full disk", "loss not finite", "node lost"}
    quick = {fault: {stage for stage, one in QUICK if one == fault} for fault in FAULTS}
    tested = {fault: ("equal", set(STAGES), quick[fault]) for fault in FAULTS} | {
        "full disk": ("equal", set(STAGES), {FULL_DISK_QUICK}),
        "loss not finite": ("told", set(LEARNING_RATES), {DIVERGED_QUICK}),
        "node lost": ("equal", set(test_nodes.HELD), set(test_nodes.QUICK)),
    }
    for fault, (outcome, stages, in_make_test) in tested.items():
        cells = [
            "-" if stage not in stages else f"{outcome}, in `make test`" if stage in in_make_test else outcome
            for stage in STAGES
        ]
        assert named[fault] == cells, fault
