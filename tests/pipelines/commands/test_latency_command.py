"""gross latency, and gross validate of a configuration that it made interesting, on the miniature."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from miniature import do, invoke, tables

from gross_ray import read_table
from gross_ray.errors import DamagedFileError, InvalidValueError, MissingStageError
from gross_ray.run.limits import budget_amounts
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.budgeted import BudgetedSpace
from gross_ray.search.budgets import RelativeBudget
from gross_ray.search.latency import LatencyModel
from gross_ray.space import Configuration
from pipelines.commands import measuring
from pipelines.stages import latencies, rounds


def test_latency_is_measured_on_request_and_can_be_a_budget(whole_run: tuple[Path, str], run: Path) -> None:
    early = invoke("search", str(run), "--budget", "latency_ms=5")
    assert early.exit_code == 2
    assert "gross latency RUN" in early.stderr
    first = invoke("latency", run, "--device", "cpu", "--batch", "2", "--repeats", "2", "--networks", "25")
    assert first.exit_code == 0, first.stderr
    assert "ONNX Runtime" in first.stdout and "fastest" in first.stdout and "full network" in first.stdout
    configurations, model = read_table(run, "configurations"), read_table(run, "runtime_latencies")
    assert (
        model["num_sampled"].tolist() == [25]
        and model["batch_size"].tolist() == [2]
        and model["runtime"].tolist() == ["onnxruntime"]
    )
    assert (configurations["latency_ms"] > 0).all()
    assert configurations.groupby("configuration")["latency_ms"].nunique().eq(1).all()
    added = read_table(run, "layer_latencies").set_index(["layer", "group_size"])["added_ms"]
    row = configurations[configurations["configuration"] == "2-8-64"].iloc[0]
    of_layers = sum(min(0.0, added[layer]) for layer in (("conv2", 2), ("conv3", 8), ("conv4", 64)))
    assert row["latency_ms"] == pytest.approx(model["full_ms"][0] + of_layers)
    pd.testing.assert_frame_equal(
        configurations.drop(columns="latency_ms"), tables(whole_run[0])["configurations"].drop(columns="latency_ms")
    )
    limit = float(configurations["latency_ms"].median())
    again = invoke("search", str(run), "--budget", f"latency_ms={limit}", "--top", "3")
    assert again.exit_code == 0, again.stderr
    searched = configurations[configurations["alpha"] == 0]  # the others are the sweep's
    accuracy = searched[searched["latency_ms"] <= limit].groupby("configuration")["val_accuracy"].median()
    assert accuracy.idxmax() in again.stdout or (accuracy == accuracy.max()).sum() > 1


def test_budgets_in_percent_are_of_the_full_networks_time_in_that_runtime(run: Path) -> None:
    early = invoke("search", run, "--budget", "latency_ms=60%")
    assert early.exit_code == 2
    assert "a limit on latency_ms in percent of the full network's needs a measurement, and" in early.stderr
    assert "run `gross latency` on it first" in early.stderr
    opened = Run(RunStore.open(run))
    latencies.put(opened, made_up_model(opened, full_ms=4.0))
    printed = invoke("search", run, "--budget", "latency_ms=60%", "--top", "1000").stdout
    assert printed.startswith("Most accurate within latency_ms=2.4, 60 % of the full network's\n")
    assert (
        "ms: one batch of 1 in OpenVINO 3 on a chip, 1 thread, each layer in its faster form; the full network"
        in printed
    )
    rows = read_table(run, "configurations")
    within = set(rows.loc[rows["latency_ms"] <= 2.4, "configuration"])
    shown = {line.split()[1] for line in printed.splitlines() if line.strip()[:1].isdigit()}
    assert shown == within != set(rows["configuration"])
    refused = invoke("search", run, "--budget", "latency_ms=1%")
    assert refused.exit_code == 2 and "latency_ms=0.04, 1 % of the full network's" in refused.stderr
    assert "the smallest is latency_ms=1.047, 26.2 % of the full network's, at 1-1-1" in refused.stderr
    with pytest.raises(
        InvalidValueError, match=r"latency_ms=0.04, 1 % .*: nothing fits; the smallest is latency_ms=1.047, 26.2 %"
    ):
        BudgetedSpace(
            opened.space, [rounds.additive_cost(opened, "latency_ms")], budget_amounts(opened.store, ONE_PERCENT)
        )


ONE_PERCENT = [RelativeBudget("latency_ms", 1.0)]


def made_up_model(run: Run, **about: float) -> LatencyModel:
    added = {
        layer: {0: 0.0} | {size: size / 64 - 1 for size in sizes} for layer, sizes in run.space.group_sizes.items()
    }
    return LatencyModel(
        runtime="openvino", version="3", device="a chip", host="b", batch_size=1, threads=1, added_ms=added,
        num_sampled=20, median_error=0.01, noise=0.01, **about,
    )  # fmt: skip


def test_times_that_no_measurement_explains_are_not_used(run: Path, tmp_path: Path) -> None:
    opened = Run(RunStore.open(run))
    latencies.put(opened, made_up_model(opened, full_ms=4.0))
    assert "ms: one batch of 1 in OpenVINO" in invoke("report", run, "--markdown").stdout
    for table in ("layer_latencies", "runtime_latencies"):  # as in a folder that an earlier version measured
        shutil.rmtree(run / "tables" / table)
    assert read_table(run, "configurations")["latency_ms"].notna().all()
    refused = invoke("search", run, "--budget", "latency_ms=3")
    assert refused.exit_code == 2 and "latency_ms is not measured for every configuration" in refused.stderr
    assert " ms " not in invoke("report", run, "--markdown").stdout


def test_a_gpu_is_only_for_runtimes_that_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, options, expected in (
        (None, {}, ("cuda", "torch")),
        (None, {"runtime": "compiled"}, ("cuda", "compiled")),
        (None, {"runtime": "onnxruntime"}, ("cpu", "onnxruntime")),
        ("cpu", {}, ("cpu", "onnxruntime")),
        ("cuda", {"runtime": "onnxruntime"}, ("cuda", "onnxruntime")),
    ):
        on, settled = measuring.asked_for(device, options)
        assert (on, settled.runtime) == expected


def test_a_limit_in_percent_waits_for_the_measurement(run: Path) -> None:
    limited = RunStore.open(run).experiment.override(['search.limits=["latency_ms=60%"]'])
    store = RunStore.create(run.parent / "limited", limited)
    for table in ("networks", "decompositions"):
        shutil.copytree(run / "tables" / table, store.path / "tables" / table)
    shutil.copytree(run / "checkpoints", store.path / "checkpoints", dirs_exist_ok=True)
    opened = Run(store)
    with pytest.raises(MissingStageError, match="has none in use: run `gross latency` on it first"):
        rounds.check_limits(opened)
    latencies.put(opened, made_up_model(opened, full_ms=4.0))
    rounds.check_limits(opened)


def test_a_network_is_timed_before_anything_is_trained() -> None:
    words = ("inspect", "--model", "four-conv", "--group-sizes", "1,16", "--layers", "conv2", "--keep-dense")
    printed = invoke(*words, "--runtime", "torch", "--batch", "2")
    assert printed.exit_code == 0, printed.stderr
    table = printed.stdout.split("Time of a batch of 2 in torch")[1]
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["fastest", "slowest", "full"]
    alone = invoke(*words, "--batch", "2")
    assert alone.exit_code == 2 and "--batch 2 without --runtime" in alone.stderr


def test_a_measurement_is_carried_to_another_machine(run: Path, tmp_path: Path) -> None:
    there, file = tmp_path / "there", tmp_path / "phone.parquet"
    shutil.copytree(run, there)
    shutil.rmtree(there / "tables" / "configurations")  # it may be measured before the search
    words = ["--device", "cpu", "--batch", "2", "--repeats", "2", "--to", str(file)]
    measured = invoke("latency", str(there), *words)
    assert measured.exit_code == 0, measured.stderr
    assert "Measured latency" in measured.stdout
    model = latencies.in_force(Run(RunStore.open(there)))
    assert model is not None
    assert (model.batch_size, model.threads) == (2, 1)
    carried = invoke("latency", str(run), "--from", str(file))
    assert carried.exit_code == 0, carried.stderr
    store = RunStore.open(run)
    assert latencies.in_force(Run(store)) == model == LatencyModel.load(file)
    rows = store.read_table("configurations")
    expected = [model.predict(Configuration.parse(one)) for one in rows["configuration"]]
    assert rows["latency_ms"].tolist() == pytest.approx(expected)
    again = invoke("latency", str(run), "--from", str(file))
    assert again.exit_code == 0, again.stderr
    assert len(store.read_table("runtime_latencies")) == 1
    printed = invoke("search", str(run), "--budget", f"latency_ms={min(expected) * 1.01:.6f}", "--top", "1")
    assert printed.exit_code == 0, printed.stderr


def test_what_is_no_measurement_is_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(other)
    (tmp_path / "text.parquet").write_text("no Parquet")
    before = sorted((run / "tables").rglob("*"))
    for file, reason in (
        (other, "KeyError"),
        (tmp_path / "text.parquet", "ArrowInvalid"),
        (tmp_path / "none", "FileN"),
    ):
        refused = invoke("latency", str(run), "--from", str(file))
        assert refused.exit_code == 2
        assert f"{file}: not a table of latencies ({reason}" in refused.stderr
    for words, complaint in (
        (["--from", str(other), "--batch", "2"], "times nothing: leave the other options out"),
        (["--to", str(tmp_path / "no" / "file")], "there is no folder"),
    ):
        refused = invoke("latency", str(run), *words)
        assert refused.exit_code == 2
        assert complaint in refused.stderr
    model = LatencyModel(
        runtime="torch", version="2", device="a", host="b", batch_size=1, threads=1, full_ms=1.0,
        added_ms={"conv2": {0: 0.0, 1: -0.5}}, num_sampled=2, median_error=0.0, noise=0.0,
    )  # fmt: skip
    with pytest.raises(InvalidValueError, match="the latencies are of other layers .* they are of conv2 at 1, d"):
        latencies.put(Run(RunStore.open(run)), model)
    assert sorted((run / "tables").rglob("*")) == before


def test_of_several_measurements_the_last_one_counts(run: Path) -> None:
    for batch in ("1", "2", "1"):
        timed = invoke("latency", str(run), "--device", "cpu", "--batch", batch, "--repeats", "2")
        assert timed.exit_code == 0, timed.stderr
    store = RunStore.open(run)
    assert len(store.read_table("runtime_latencies")) == 2
    model = latencies.in_force(Run(store))
    assert model is not None and model.batch_size == 1
    rows = store.read_table("configurations")
    expected = [model.predict(Configuration.parse(one)) for one in rows["configuration"]]
    assert rows["latency_ms"].tolist() == pytest.approx(expected)
    (damaged,) = (store.path / "tables/layer_latencies").glob("*batch=1*")
    damaged.write_bytes(b"")
    with store.lock(), pytest.raises(DamagedFileError):
        latencies.in_force(Run(store))
    assert latencies.in_force(Run(store)) is None, "the other one takes its place without a word"


def test_where_nothing_says_which_was_last_a_lost_half_hands_on_nothing(run: Path) -> None:
    store = RunStore.open(run)
    for batch in ("1", "2"):
        assert invoke("latency", str(run), "--device", "cpu", "--batch", batch, "--repeats", "2").exit_code == 0
    store.delete_checkpoint("latency", "in-force")  # as earlier versions left it
    assert latencies.in_force(Run(store)) is None
    for table in ("layer_latencies", "runtime_latencies"):
        (unit,) = (unit for unit in store.units(table) if "batch=2" in unit)
        store.delete_unit(table, unit)
        model = latencies.in_force(Run(store))
        assert (model is None) == (table == "layer_latencies")


def test_a_configuration_is_validated_by_name(run: Path) -> None:
    store = RunStore.open(run)
    before = store.read_table("validations")
    named = next(one for one in ("2-8-32", "1-8-32", "2-4-32") if one not in set(before["configuration"]))
    ended = do("validate", run, "--configuration", named, "--configuration", "4-4-4")
    rows = store.read_table("validations")
    (added,) = rows[~rows["configuration"].isin(before["configuration"])].to_dict("records")
    assert (added["configuration"], added["kind"], added["seed"]) == (named, "selected", 0)
    table = ended.stdout.split("Also trained on their own")[1]
    assert [line.split()[0] for line in table.splitlines() if line.startswith("  ")][1:] == [named]
    assert f"{100 * added['test_accuracy']:.2f}" in table
    refused = invoke("validate", run, "--configuration", "3-3-3", "--in-process")
    assert refused.exit_code == 2
    assert len(store.read_table("validations")) == len(rows)


def test_a_measurement_that_is_killed_leaves_no_other_runtimes_times(run: Path) -> None:
    opened = Run(RunStore.open(run))
    latencies.put(opened, made_up_model(opened, full_ms=4.0))
    other = replace(made_up_model(opened, full_ms=9.0), runtime="torch")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(latencies, "fill", interrupted)
        latencies.put(opened, other)
    assert read_table(run, "configurations")["latency_ms"].isna().all()
    refused = invoke("search", run, "--budget", "latency_ms=60%")
    assert refused.exit_code == 2 and "latency_ms is not measured for every configuration" in refused.stderr
    latencies.put(opened, other)
    assert read_table(run, "configurations")["latency_ms"].max() > 4.0


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt
