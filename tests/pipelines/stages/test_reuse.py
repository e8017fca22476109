"""gross run --reuse: what another run folder has is not done again, nor changed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from miniature import SETTINGS, do, invoke, run_words

from gross_ray.errors import InvalidValueError
from gross_ray.presets import quickstart
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from pipelines.stages import search
from pipelines.stages.reuse import PARTS, check_reusable, take_evaluations, take_over
from pipelines.units import Context

ANOTHER_SEARCH = ["search.strategy=random", "search.evaluations=12", "sweep.alphas=[]"]


@pytest.fixture
def other(whole_run: tuple[Path, str]) -> RunStore:
    return RunStore.open(whole_run[0])


def test_another_search_trains_nothing_again(other: RunStore, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in other.path.rglob("*") if file.is_file()}
    settings = [part for setting in ANOTHER_SEARCH for part in ("--set", setting)]
    ended = do(*run_words(tmp_path / "run", "--reuse", str(other.path), *settings))
    for stage in ("train", "decompose", "reconstruct", "finetune"):
        units = f"{len(other.checkpoints(stage))} units"
        assert any(
            line.startswith(f"{stage}: ") and line.endswith("done already") for line in ended.stderr.splitlines()
        ), f"{stage} ({units}) was done again:\n{ended.stderr}"
    store = RunStore.open(tmp_path / "run")
    for table in ("networks", "decompositions"):
        pd.testing.assert_frame_equal(store.read_table(table), other.read_table(table), check_exact=True)
    evaluated = store.read_table("configurations").merge(
        other.read_table("configurations"), on=["supernet", "configuration"], suffixes=("", " there")
    )
    assert len(evaluated) == len(store.read_table("configurations")) == 12 + 2  # and the fixed ones
    assert (evaluated["val_correct"] == evaluated["val_correct there"]).all()
    fixed = store.read_table("validations").query("kind == 'fixed'").reset_index(drop=True)
    there = other.read_table("validations").query("kind == 'fixed'").reset_index(drop=True)
    pd.testing.assert_frame_equal(fixed, there, check_exact=True)
    assert {file: file.stat().st_mtime_ns for file in other.path.rglob("*") if file.is_file()} == before


def two_searches(other: RunStore, tmp_path: Path) -> tuple[RunStore, RunStore]:
    """Return a run that has searched, and one of another strategy and more budgets that has not."""
    drawn = [*SETTINGS, "search.strategy=random", "search.evaluations=12", "sweep.alphas=[]"]
    first = RunStore.create(tmp_path / "first", quickstart().override(drawn))
    assert take_over(first, other)["finetune"] > 0
    do("search", first.path)
    ours = [
        *SETTINGS,
        "search.strategy=surrogate",
        "search.evaluations=8",
        "sweep.alphas=[]",
        "search.budgets=[16,4,2]",
    ]
    second = RunStore.create(tmp_path / "second", quickstart().override(ours))
    take_over(second, other)
    return first, second


def test_a_strategy_goes_on_from_what_another_search_evaluated(other: RunStore, tmp_path: Path) -> None:
    first, second = two_searches(other, tmp_path)
    known = first.read_table("configurations")
    assert take_evaluations(Run(second), first) == len(known) == 12 + 2
    taken = second.read_table("configurations")
    assert 0 < len(taken) < len(known)  # a part of round 0 holds 2-2-2, which was not evaluated there
    assert take_evaluations(Run(second), first) == 0  # the search has begun
    do("search", second.path)
    rows = second.read_table("configurations")
    assert len(rows) == len(set(rows["configuration"])) == 12 + 3 + 8  # nothing twice, and all evaluations its own
    assert set(rows["configuration"]) >= {*known["configuration"], "2-2-2"}
    both = rows.merge(known, on=["supernet", "configuration"], suffixes=("", " there"))
    assert len(both) == len(known) and (both["val_correct"] == both["val_correct there"]).all()
    whole = other.read_table("configurations")
    same = rows.merge(whole, on=["supernet", "configuration"], suffixes=("", " there"))
    assert len(same) == len(rows) and (same["val_correct"] == same["val_correct there"]).all()


@pytest.mark.parametrize("loss", ["deleted", "damaged"])
def test_evaluations_outlive_the_list_of_the_first_round(
    other: RunStore, tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_searches(other, tmp_path)
    take_evaluations(Run(second), first)

    def lose() -> None:
        file = second.path / "checkpoints/search-rounds/round=0.safetensors"
        if loss == "deleted":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-9])

    evaluated: list[str] = []
    work = search.work

    def counted(context: Context, unit: search.Part) -> str:
        evaluated.extend(map(str, unit.configurations_of(context.run.space)))
        return work(context, unit)

    monkeypatch.setattr(search, "work", counted)
    taken = set(second.read_table("configurations")["configuration"])
    lose()  # before the search has evaluated the part with the new fixed configuration
    do("search", second.path)
    assert "2-2-2" in evaluated and len(taken.difference(evaluated)) > len(taken) / 2
    rows = second.read_table("configurations").sort_values("configuration", ignore_index=True)
    evaluated.clear()
    lose()
    if loss == "deleted":
        shown = invoke("search", second.path, "--budget", "macs=2.5M")
        assert shown.exit_code == 2 and "is not finished: run `gross search" in shown.stderr
    do("search", second.path)
    assert evaluated == []
    again = second.read_table("configurations").sort_values("configuration", ignore_index=True)
    pd.testing.assert_frame_equal(again, rows, check_exact=True)


def test_evaluations_that_would_differ_are_refused(other: RunStore, tmp_path: Path) -> None:
    for number, (setting, told) in enumerate(
        (
            ("search.top=1", "search.strategy = 'exhaustive': it evaluates all, and learns from none"),
            ("search.precision=bfloat16", "search.precision is 'bfloat16' here and 'float32' there"),
        )
    ):
        settings = [] if setting == "search.top=1" else ["search.strategy=random", "search.evaluations=4"]
        store = RunStore.create(tmp_path / str(number), quickstart().override([*SETTINGS, setting, *settings]))
        with pytest.raises(InvalidValueError, match=told):
            take_evaluations(Run(store), other)
        assert store.units("configurations") == []
    alone = invoke("run", "--preset", "quickstart", "--out", str(tmp_path / "run"), "--reuse-evaluations")
    assert alone.exit_code == 2
    assert "--reuse-evaluations without --reuse" in alone.stderr


@pytest.mark.parametrize(
    ("setting", "taken"),
    [
        ("search.top=2", [part.stage for part in PARTS]),
        ("engine.parallel_seeds=2", [part.stage for part in PARTS]),  # another rounding, as on another machine
        ("engine.capture=true", [part.stage for part in PARTS]),
        ("finetuning.epochs=3", ["train", "decompose", "latency", "reconstruct", "validate"]),
        ("supernet.alpha=2", ["train", "decompose", "latency", "validate"]),
        ("validation.seeds=3", ["train", "decompose", "latency", "reconstruct", "finetune"]),
        ("engine.recalibrate=false", ["train", "decompose", "latency", "reconstruct", "finetune"]),
        ("decomposition.max_steps=16", ["train"]),
    ],
)
def test_what_a_setting_decides_is_not_taken_over(
    other: RunStore, tmp_path: Path, setting: str, taken: list[str]
) -> None:
    store = RunStore.create(tmp_path / "run", quickstart().override([*SETTINGS, setting]))
    units = take_over(store, other)
    assert list(units) == taken
    for stage in taken:
        assert units[stage] == len(other.checkpoints(stage))
        assert store.checkpoints(stage) == other.checkpoints(stage)
    assert {stage for part in PARTS if store.checkpoints(stage := part.stage)} <= set(taken)
    assert store.units("networks") == other.units("networks")
    assert take_over(store, other) == dict.fromkeys(taken, 0)  # nothing twice


@pytest.mark.parametrize(
    "setting", ["training.epochs=3", "seed=1", "data.limit_train=199", "engine.precision=bfloat16"]
)
def test_other_base_networks_are_refused_before_a_folder_is_made(other: RunStore, setting: str) -> None:
    field, value = setting.split("=")
    with pytest.raises(InvalidValueError, match=rf"for {field} is '?{value}'? here and .* there: give the same value"):
        check_reusable(quickstart().override([*SETTINGS, setting]), other)
