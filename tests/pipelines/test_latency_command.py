"""gross latency, and gross validate of a configuration that it made interesting, on the miniature."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from miniature import gross
from pipelines.predictions import put, stored_model

from gross_ray.errors import DamagedFileError, InvalidValueError
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel
from gross_ray.space import Configuration


@pytest.fixture
def run(whole_run: tuple[Path, str], tmp_path: Path) -> Path:
    copied = tmp_path / "run"
    shutil.copytree(whole_run[0], copied, ignore=shutil.ignore_patterns(".lock"))
    return copied


def test_a_measurement_is_carried_to_another_machine(run: Path, tmp_path: Path) -> None:
    there, file = tmp_path / "there", tmp_path / "phone.parquet"
    shutil.copytree(run, there)
    shutil.rmtree(there / "tables" / "configurations")  # it may be measured before the search
    words = ["--device", "cpu", "--batch", "2", "--repeats", "1", "--to", str(file)]
    measured = gross("latency", str(there), *words)
    assert measured.returncode == 0, measured.stderr
    assert "Predicted latency of a configuration" in measured.stdout
    model = stored_model(RunStore.open(there))
    assert model is not None
    assert (model.batch_size, model.threads) == (2, 1)
    carried = gross("latency", str(run), "--from", str(file))
    assert carried.returncode == 0, carried.stderr
    store = RunStore.open(run)
    assert stored_model(store) == model == LatencyModel.load(file)
    rows = store.read_table("configurations")
    expected = [model.predict(Configuration.parse(one)) for one in rows["configuration"]]
    assert rows["latency_ms"].tolist() == pytest.approx(expected)
    again = gross("latency", str(run), "--from", str(file))
    assert again.returncode == 0, again.stderr
    assert len(store.read_table("latency_models")) == 1
    told = gross("search", str(run), "--budget", f"latency_ms={min(expected) * 1.01:.6f}", "--top", "1")
    assert told.returncode == 0, told.stderr


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
        refused = gross("latency", str(run), "--from", str(file))
        assert refused.returncode == 2
        assert f"{file}: not a table of latencies ({reason}" in refused.stderr
    for words, complaint in (
        (["--from", str(other), "--batch", "2"], "times nothing: leave the other options out"),
        (["--to", str(tmp_path / "no" / "file")], "there is no folder"),
    ):
        refused = gross("latency", str(run), *words)
        assert refused.returncode == 2
        assert complaint in refused.stderr
    model = LatencyModel(
        device="a", host="b", batch_size=1, threads=1, rest_ms=1.0, layer_ms={"conv2": {1: 1.0}}, offset_ms=0.0,
        slope=1.0, num_sampled=2, median_error=0.0,
    )  # fmt: skip
    with pytest.raises(InvalidValueError, match="the latencies are of other layers .* they are of conv2 at 1"):
        put(RunStore.open(run), model)
    assert sorted((run / "tables").rglob("*")) == before


def test_of_several_measurements_the_last_one_counts(run: Path) -> None:
    for batch in ("1", "2", "1"):
        timed = gross("latency", str(run), "--device", "cpu", "--batch", batch, "--repeats", "1")
        assert timed.returncode == 0, timed.stderr
    store = RunStore.open(run)
    assert len(store.read_table("latency_models")) == 2
    model = stored_model(store)
    assert model is not None and model.batch_size == 1
    rows = store.read_table("configurations")
    expected = [model.predict(Configuration.parse(one)) for one in rows["configuration"]]
    assert rows["latency_ms"].tolist() == pytest.approx(expected)
    (damaged,) = (store.path / "tables/latencies").glob("*batch=1*")
    damaged.write_bytes(b"")
    with store.lock(), pytest.raises(DamagedFileError):
        stored_model(store)
    assert stored_model(store) is None, "the other one takes its place without a word"


def test_where_nothing_says_which_was_last_a_lost_half_hands_on_nothing(run: Path) -> None:
    store = RunStore.open(run)
    for batch in ("1", "2"):
        assert gross("latency", str(run), "--device", "cpu", "--batch", batch, "--repeats", "1").returncode == 0
    store.delete_checkpoint("latency", "in-force")  # as earlier versions left it
    assert stored_model(store) is None
    for table in ("latencies", "latency_models"):
        (unit,) = (unit for unit in store.units(table) if "batch=2" in unit)
        store.delete_unit(table, unit)
        model = stored_model(store)
        assert (model is None) == (table == "latencies")


def test_a_configuration_is_validated_by_name(run: Path) -> None:
    store = RunStore.open(run)
    before = store.read_table("validations")
    named = next(one for one in ("2-8-32", "1-8-32", "2-4-32") if one not in set(before["configuration"]))
    ended = gross("validate", str(run), "--configuration", named, "--configuration", "4-4-4", "--num-cpus", "2")
    assert ended.returncode == 0, ended.stderr
    rows = store.read_table("validations")
    (added,) = rows[~rows["configuration"].isin(before["configuration"])].to_dict("records")
    assert (added["configuration"], added["kind"], added["seed"]) == (named, "selected", 0)
    table = ended.stdout.split("Also trained on their own")[1]
    assert [line.split()[0] for line in table.splitlines() if line.startswith("  ")][1:] == [named]
    assert f"{100 * added['test_accuracy']:.2f}" in table
    refused = gross("validate", str(run), "--configuration", "3-3-3", "--num-cpus", "2")
    assert refused.returncode == 2
    assert len(store.read_table("validations")) == len(rows)
