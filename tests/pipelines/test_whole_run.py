"""The whole pipeline through the real command line and the real Ray: once undisturbed, then killed in each stage."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from miniature import assert_equal_tables, gross, run_command, tables
from pipelines.networks import load_validated
from pipelines.predictions import stored_model
from safetensors.torch import load_file, save_file

from cli import main
from gross_ray import read_table
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions
from gross_ray.run.store import RunStore

STAGE_SIGNS = {
    "train": "checkpoints/train-under-way/*.safetensors",
    "decompose": "tables/decompositions/*.parquet",
    "reconstruct": "checkpoints/reconstruct-under-way/*.safetensors",
    "finetune": "checkpoints/finetune-under-way/*.safetensors",
    "search": "tables/configurations/*.parquet",
    "validate": "checkpoints/validate-finetune-under-way/*.safetensors",
    "sweep-alpha": "checkpoints/finetune-under-way/alpha=4*.safetensors",
}
"""A file that is there while the stage is under way: the first unit or epoch of it is stored."""


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


def test_the_run_ends_with_the_papers_tables(whole_run: tuple[Path, str]) -> None:
    run, printed = whole_run
    for text in ("Table 2", "full", "fixed 16-16-16", "Table 3", "4-4-4 (fixed)", "Figure 1"):
        assert text in printed
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "run <code>gross" not in page  # nothing is missing
    report = gross("report", str(run))
    assert report.returncode == 0
    assert report.stdout.strip() == printed.strip()


def test_the_same_command_again_does_nothing(whole_run: tuple[Path, str]) -> None:
    run = whole_run[0]
    again = (".lock", "report.html")  # made anew each time
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file() and file.name not in again}
    ended = subprocess.run(run_command(run), capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == 0, ended.stderr
    after = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file() and file.name not in again}
    assert after == before


def test_a_validated_configuration_is_exported_with_its_card(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run = whole_run[0]
    row = tables(run)["validations"].set_index("configuration").loc["4-4-4"]
    images = (load_dataset(DataOptions(name="sample")).test.images[:100] / 255 - 0.5) / 0.225
    network = load_validated(RunStore.open(run), "4-4-4", 0)[0].eval()
    expected = network(images).detach()
    for ending in ("onnx", "pt2", "safetensors"):
        ended = gross("export", str(run), "--configuration", "4-4-4", "--to", str(tmp_path / f"network.{ending}"))
        assert ended.returncode == 0, ended.stderr
        card = json.loads((tmp_path / f"network.{ending}.json").read_text())
        assert card["accuracy"]["test"] == row["test_accuracy"]
        assert (card["macs"], card["parameters"]) == (row["macs"], row["parameters"])
        assert card["layers"] == {"conv2": 4, "conv3": 4, "conv4": 4}
        assert card["input"]["shape"] == ["N", 3, 32, 32]
        assert card["input"]["from pixels 0 to 255"] == "(x / 255 - 0.5) / 0.225"
        assert len(card["classes"]) == 10
        assert card["versions"]["torch"] == version("torch")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    for first, last in ((0, 100), (7, 8), (0, 33)):  # any batch
        (logits,) = session.run(None, {"images": images[first:last].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[first:last], rtol=1e-5, atol=1e-5)
    save_file({"images": images, "expected": expected}, tmp_path / "images.safetensors")
    elsewhere = subprocess.run(
        [sys.executable, "-c", WITHOUT_US], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert load_file(tmp_path / "network.safetensors").keys() == network.state_dict().keys()


WITHOUT_US = """
import sys
for name in ("gross_ray", "pipelines", "cli"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file, save_file

held = load_file("images.safetensors")
logits = torch.export.load("network.pt2").module()(held["images"])
torch.testing.assert_close(logits.detach(), held["expected"], rtol=1e-5, atol=1e-5)
"""


def test_an_export_folds_layers_where_that_is_faster(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run, target = whole_run[0], tmp_path / "folded.pt2"
    alone = gross("export", str(run), "--configuration", "16-16-16", "--to", str(target), "--batch", "8")
    assert (alone.returncode, target.exists()) == (2, False)
    assert "--batch 8 without --fold latency_ms" in alone.stderr
    beside = tmp_path / "folded.pt2.json"
    beside.mkdir()
    taken = gross("export", str(run), "--configuration", "16-16-16", "--to", str(target))
    assert (taken.returncode, list(tmp_path.iterdir())) == (2, [beside])
    assert taken.stderr == f"Error: {beside}: is a folder; remove it, or name another file\n"
    beside.rmdir()
    nowhere = gross("export", str(run), "--configuration", "16-16-16", "--to", "/proc/folded.pt2")
    assert nowhere.returncode == 1
    assert "/proc/.partial-folded.pt2.json: No such file or directory; name another file" in nowhere.stderr
    assert len(nowhere.stderr.splitlines()) == 1
    words = ["--configuration", "16-16-16", "--to", str(target), "--fold", "latency_ms", "--batch", "8"]
    ended = gross("export", str(run), *words, "--device", "cpu")
    assert ended.returncode == 0, ended.stderr
    card = json.loads((tmp_path / "folded.pt2.json").read_text())
    folded = {one["layer"] for one in card["folded"]}
    assert card["latency_ms"] > 0 and card["latency of"]["timed"] == "whole" and card["latency of"]["batch_size"] == 8
    assert f" ms as bottlenecks, {card['latency_ms']:.6g} ms as written\n" in ended.stdout
    lines = [line for line in ended.stdout.splitlines() if "latency_ms" in line]
    assert [(line.split()[0], line.endswith(": folded")) for line in lines] == [
        (layer, layer in folded) for layer in ("conv2", "conv3", "conv4")
    ]
    network = load_validated(RunStore.open(run), "16-16-16", 0)[0].eval()
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 4 - 2
    program = torch.export.load(target).module()
    torch.testing.assert_close(program(images).detach(), network(images).detach(), rtol=1e-4, atol=1e-4)
    assert sum(parameter.numel() for parameter in program.parameters()) == card["parameters"]


def test_a_training_whose_row_is_not_stored_is_not_exported(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run = shutil.copytree(whole_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("tune", ".lock"))
    store = RunStore.open(run)
    for unit in store.units("validations"):
        if unit.startswith("16-16-16,"):
            store.delete_unit("validations", unit)
    refused = gross("export", str(run), "--configuration", "16-16-16", "--to", str(tmp_path / "a.safetensors"))
    assert refused.returncode == 2 and "16-16-16,seed=0 is not validated in" in refused.stderr
    assert list(tmp_path.iterdir()) == [run]


def test_status_and_single_stages(whole_run: tuple[Path, str]) -> None:
    run = str(whole_run[0])
    status = CliRunner().invoke(main, ["status", run])
    assert status.exit_code == 0
    assert "19 of 19 units" in status.stdout
    assert "waits" not in status.stdout
    for stage in STAGE_SIGNS:
        ended = CliRunner().invoke(main, [stage, run])
        assert ended.exit_code == 0, ended.output


def test_a_damaged_table_and_a_lost_checkpoint_are_found_named_and_done_again(
    whole_run: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run[0], run)
    shard = sorted((run / "tables/configurations").glob("*.parquet"))[3]
    shard.write_bytes(shard.read_bytes()[:-100])
    others = {file: file.stat().st_mtime_ns for file in shard.parent.iterdir() if file != shard}
    (run / "checkpoints/decompose/conv3,g=4,seed=0.safetensors").unlink()
    ended = subprocess.run(run_command(run), capture_output=True, text=True, check=False, timeout=400)
    assert ended.returncode == 0, ended.stderr
    assert f"damaged file tables/configurations/{shard.name}" in ended.stderr
    assert "decompose: left alone: conv1 (the network's first convolution)\n" in ended.stderr
    assert {file: file.stat().st_mtime_ns for file in others} == others
    assert_equal_tables(whole_run[0], run)


def test_damage_in_tables_that_no_stage_completes_is_found_by_the_next_command(
    whole_run: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run[0], run)
    timed = gross("latency", str(run), "--device", "cpu", "--repeats", "1")
    assert timed.returncode == 0, timed.stderr
    files = [next(run.glob(f"tables/{name}/*")) for name in ("runs", "latencies", "selections")]
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert "validate     waits for an earlier stage" in gross("status", str(run)).stdout
    early = gross("validate", str(run), "--num-cpus", "2")
    assert early.returncode == 2
    assert early.stderr.strip().endswith("run `gross search` on it first")
    found = gross("check", str(run))
    assert (found.returncode, found.stdout) == (0, f"{run}: 2 damaged files\n"), found.stderr
    told = dict(re.findall(r"damaged file tables/(\w+)/[^:]*: deleted; (.*)", early.stderr + found.stderr))
    assert told == {
        "runs": "that start is on record no more",
        "latencies": "measure again with `gross latency` or `gross search --latency`",
        "selections": "its stage, asked for as before, makes it anew",
    }
    ended = subprocess.run(run_command(run), capture_output=True, text=True, check=False, timeout=400)
    assert ended.returncode == 0, ended.stderr
    pd.testing.assert_frame_equal(tables(run)["selections"], tables(whole_run[0])["selections"], check_exact=True)
    assert stored_model(RunStore.open(run)) is None
    shutil.rmtree(run / "tables/runs")
    configuration = read_table(run, "validations")["configuration"].iloc[0]
    for words in (["report"], ["export", "--configuration", configuration, "--to", str(tmp_path / "a.safetensors")]):
        shown = gross(words[0], str(run), *words[1:])
        assert shown.returncode == 0, shown.stderr
    assert json.loads((tmp_path / "a.safetensors.json").read_text())["versions"] is None


def test_latency_is_measured_on_request_and_can_be_a_budget(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run[0], run)
    early = gross("search", str(run), "--budget", "latency_ms=5")
    assert early.returncode == 2
    assert "gross latency RUN" in early.stderr
    first = gross("latency", str(run), "--device", "cpu", "--batch", "2")
    assert first.returncode == 0, first.stderr
    configurations, model = read_table(run, "configurations"), read_table(run, "latency_models")
    assert len(model) == 1
    assert model["batch_size"].tolist() == [2]
    assert (configurations["latency_ms"] > 0).all()
    assert configurations.groupby("configuration")["latency_ms"].nunique().eq(1).all()
    parts = read_table(run, "latencies").set_index(["part", "group_size"])["latency_ms"]
    row = configurations[configurations["configuration"] == "2-8-64"].iloc[0]
    of_parts = parts["conv2", 2] + parts["conv3", 8] + parts["conv4", 64] + parts["rest"].iloc[0]
    assert row["latency_ms"] == pytest.approx(model["offset_ms"][0] + model["slope"][0] * of_parts)
    pd.testing.assert_frame_equal(
        configurations.drop(columns="latency_ms"), tables(whole_run[0])["configurations"].drop(columns="latency_ms")
    )
    limit = float(configurations["latency_ms"].median())
    again = gross("search", str(run), "--budget", f"latency_ms={limit}", "--top", "3")
    assert again.returncode == 0, again.stderr
    accuracy = configurations[configurations["latency_ms"] <= limit].groupby("configuration")["val_accuracy"].median()
    assert accuracy.idxmax() in again.stdout or (accuracy == accuracy.max()).sum() > 1


def test_killed_in_each_stage_the_run_still_ends_with_equal_tables(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    stored: dict[Path, int] = {}
    for stage, sign in STAGE_SIGNS.items():
        _kill_at(run, stage, sign)
        stored |= {file: file.stat().st_mtime_ns for file in run.glob("tables/*/[!.]*.parquet")}
    ended = subprocess.run(run_command(run), capture_output=True, text=True, check=False, timeout=400)
    assert ended.returncode == 0, ended.stderr
    assert_equal_tables(whole_run[0], run)
    assert {file: file.stat().st_mtime_ns for file in stored} == stored  # what was stored is not done again
    assert list(run.rglob(".*.tmp")) == []


def _kill_at(run: Path, stage: str, sign: str) -> None:
    log = run.parent / f"{stage}.log"
    with log.open("w") as output:
        process = subprocess.Popen(run_command(run), stdout=output, stderr=output)
        deadline = time.monotonic() + 200
        while not any(run.glob(sign)):
            assert process.poll() is None, f"{stage}: ended before it was killed:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"{stage}: no sign of it:\n{log.read_text()}"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
