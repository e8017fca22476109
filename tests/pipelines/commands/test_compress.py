"""`gross compress`: a trained network of one's own, images and a budget in; a smaller file out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import onnxruntime
import pytest
import torch
from click.testing import Result
from miniature import invoke
from torch import nn

from gross_ray import read_table
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel
from gross_ray.search.options import LatencyOptions
from gross_ray.space import DENSE
from gross_ray.training import rates as range_tests
from pipelines.stages import latencies

OWN = """
from torch import nn

def small(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""
FEW = [
    *("data.limit_train=300", "data.limit_validation=60", "data.limit_test=80", "decomposition.max_steps=5"),
    *("search.top=2", "finetuning.epochs=1", "finetuning.milestones=[]", "search.form=dense"),
    *("validation.finetuning.epochs=1", "validation.finetuning.milestones=[]"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a network of one's own and a trained checkpoint of it; commands are started in it."""
    path = tmp_path_factory.mktemp("own")
    (path / "own_nets.py").write_text(OWN)
    names: dict[str, object] = {}
    exec(OWN, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = names["small"](10)  # type: ignore[operator]
        network(torch.randn(64, 3, 32, 32))  # statistics
    torch.save({"state_dict": {f"module.{name}": t for name, t in network.state_dict().items()}}, path / "net.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "path", [one for one in sys.path if one])
        patch.setattr(range_tests, "STEPS", 2)
        patch.setattr(range_tests.find_rate, "__defaults__", ((1e-3, 1e-2),))
        yield path
    sys.modules.pop("own_nets", None)


def compress(out: str, *more: str, settings: list[str] = FEW) -> Result:
    words = [word for setting in settings for word in ("--set", setting)]
    given = ["--model", "own_nets:small", "--weights", "net.pt", "--data", "sample", "--effort", "quick"]
    return invoke("compress", "--out", out, *given, *words, *more, "--in-process", "--num-cpus", "1")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Result:
    found = compress("run", "--budget", "macs=60%", "--budget", "parameters=90%")
    assert found.exit_code == 0, found.stderr
    return found


def test_the_file_is_the_best_candidate_and_within_the_budget(folder: Path, finished: Result) -> None:
    run = folder / "run"
    card = json.loads((run / "best.onnx.json").read_text())
    trained = read_table(run, "validations")
    assert len(trained) == 2
    best = trained.loc[trained["val_accuracy"].idxmax()]
    assert card["configuration"] == best["configuration"]
    (full,) = read_table(run, "networks").to_dict("records")
    assert (trained["macs"] <= 0.6 * full["macs"]).all() and (trained["parameters"] <= 0.9 * full["parameters"]).all()
    splits = load_dataset(DataOptions(name="sample", limit_train=300, limit_validation=60, limit_test=80))
    session = onnxruntime.InferenceSession(run / "best.onnx", providers=["CPUExecutionProvider"])
    inputs = splits.test.as_inputs(splits.test.images).contiguous().numpy()
    (logits,) = session.run(None, {session.get_inputs()[0].name: inputs})
    correct = (torch.from_numpy(logits).argmax(1) == splits.test.labels).sum().item()
    assert correct / 80 == best["test_accuracy"]
    assert card["check"]["predictions_that_differ"] == 0


def test_its_last_table_sets_the_full_network_beside_the_candidates(folder: Path, finished: Result) -> None:
    run, table = folder / "run", finished.stdout.split("The full network and the candidates")[1]
    (full,) = read_table(run, "networks").to_dict("records")
    trained = read_table(run, "validations").set_index("configuration")
    model = latencies.in_force(latencies.Run(RunStore.open(run)))
    assert model is not None
    rows = {line.split("  ")[1]: line for line in table.splitlines() if line.startswith("  ")}
    assert f"{100 * full['test_accuracy']:.2f}" in rows["full network"]
    assert f"{full['parameters']:,}" in rows["full network"] and f"{model.full_ms:.3g}" in rows["full network"]
    error = 100 * (full["test_accuracy"] * (1 - full["test_accuracy"]) / 80) ** 0.5
    assert f"{error:.2f}" in rows["full network"]
    for name, row in trained.iterrows():
        assert f"{100 * row['test_accuracy']:.2f}" in rows[str(name)] and f"{row['parameters']:,}" in rows[str(name)]
    written = json.loads((run / "best.onnx.json").read_text())["configuration"]
    assert [name for name, line in rows.items() if line.rstrip().endswith("written")] == [written]


def test_the_macs_of_its_layers_are_stored(folder: Path, finished: Result) -> None:
    # The layers write 7 x 7 positions of 16 channels, from 3 x 3 positions of 8 and of 16 channels.
    assert read_table(folder / "run", "layers").values.tolist() == [
        ["3", 7 * 7 * 16 * 3 * 3 * 8],
        ["6", 7 * 7 * 16 * 3 * 3 * 16],
    ]


def test_its_choices_are_printed_before_anything_is_spent(finished: Result) -> None:
    before = finished.stderr.partition("train:")[0]
    assert "images: sample: 300 train, 60 validation, 80 test; 10 classes, 3x32x32" in before
    assert "network: own_nets:small, weights" in before and "as they are" in before
    assert "configurations" in before and "learning rate found by a range test" in before
    assert "within macs=60%,parameters=90%" in before
    assert "may have images that the weights were trained on" in before and "without effect" not in before


def test_the_same_command_again_does_nothing_again(folder: Path, finished: Result) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.glob("run/tables/*/*.parquet")}
    again = compress("run", "--budget", "macs=60%", "--budget", "parameters=90%")
    assert again.exit_code == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert "The full network and the candidates" in again.stdout


def test_it_is_an_ordinary_run_folder(folder: Path, finished: Result) -> None:
    assert invoke("status", "run").exit_code == 0
    assert "Most accurate within" in invoke("report", "run", "--markdown").stdout
    assert set(read_table("run", "range_tests")["schedule"]) == {
        *("reconstruction", "finetuning", "validation.reconstruction", "validation.finetuning")
    }
    other = compress("run", "--budget", "macs=50%")
    assert other.exit_code == 2 and "belongs to another experiment" in other.stderr


def test_its_experiment_can_be_changed_and_run_again(folder: Path, finished: Result) -> None:
    stored = json.loads((folder / "run" / "experiment.json").read_text())
    stored["search"]["top"] = 1
    (folder / "changed.json").write_text(json.dumps(stored))
    again = invoke("train", "changed", "--experiment", "changed.json", "--in-process", "--num-cpus", "1")
    assert again.exit_code == 0, again.stderr
    assert RunStore.open("changed").experiment == RunStore.open("run").experiment.override(["search.top=1"])


def measured_as(added_ms: float) -> Callable[..., LatencyModel]:
    """Return a measurement in which each bottleneck adds this to 9 ms: real times of so small a network are noise."""

    def measure(run: Run, _: str, options: LatencyOptions, *__: object) -> LatencyModel:
        sizes = run.space.group_sizes
        added = {layer: {DENSE: 0.0} | dict.fromkeys(each, added_ms) for layer, each in sizes.items()}
        return LatencyModel(
            runtime=options.runtime, version="1", device="a", host="b", batch_size=options.batch_size,
            threads=options.threads, full_ms=9.0, added_ms=added, num_sampled=3, median_error=0.1, noise=0.1,
        )  # fmt: skip

    return measure


def test_a_budget_of_time_is_measured_on_the_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latencies, "measure", measured_as(-0.5))
    found = compress("timed", "--budget", "latency_ms=95%", "--to", "small.safetensors", "--adapt", "1")
    assert found.exit_code == 0, found.stderr
    assert (folder / "small.safetensors").exists() and not (folder / "timed" / "best.onnx").exists()
    (measured,) = read_table("timed", "runtime_latencies").to_dict("records")
    assert (measured["runtime"], measured["batch_size"], measured["threads"]) == ("onnxruntime", 1, 1)
    assert "train" in set(read_table("timed", "history")["stage"])
    evaluated = read_table("timed", "configurations").set_index("configuration")["latency_ms"]
    for name in read_table("timed", "validations")["configuration"]:
        assert evaluated[name] <= 0.95 * measured["full_ms"]


def test_a_faster_form_is_not_written_beyond_a_budget_of_macs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latencies, "measure", measured_as(0.1))
    found = compress("kept", "--budget", "macs=60%")
    assert found.exit_code == 0, found.stderr
    assert "layers stay bottlenecks: as the faster dense ones they have macs=" in found.stdout
    card = json.loads((folder / "kept" / "best.onnx.json").read_text())
    (full,) = read_table("kept", "networks").to_dict("records")
    assert card["macs"] <= 0.6 * full["macs"] and "folded by" not in card
    rows = {row[0]: row[1:] for row in rows_of(found.stdout.partition("The full network and the candidates")[2])}
    chosen = rows[card["configuration"]]
    assert chosen[-1] == "written" and f"{card['macs'] / 1e6:.2f}" in chosen and f"{card['parameters']:,}" in chosen
    bottlenecks = sum(size != "d" for size in card["configuration"].split("-"))
    assert f"{9.0 + 0.1 * bottlenecks:.3g}" in chosen


PARTS = ["images and checks", "train", "latency", "decompose", "reconstruct", "finetune", "search", "validate"]


@pytest.mark.parametrize("adapt", [0, 1])
def test_a_dry_run_prints_the_plan_and_the_time_of_each_part_and_writes_nothing(folder: Path, adapt: int) -> None:
    before = sorted(folder.rglob("*"))
    more = ["--adapt", str(adapt)] if adapt else []
    found = compress("dry", "--budget", "latency_ms=60%", "--dry-run", *more)
    assert found.exit_code == 0, found.stderr
    assert sorted(folder.rglob("*")) == before
    assert "images: sample: 300 train" in found.stderr and "within latency_ms=60%" in found.stderr
    assert "Decomposed: 2 layers" in found.stdout and "The space: " in found.stdout
    parts = {row[0]: row[1] for row in rows_of(found.stdout.partition("Expected time: ")[2])}
    assert list(parts) == [*PARTS, "export and page"]
    assert all(float(time.split()[0]) >= 0 for time in parts.values())


def rows_of(table: str) -> list[list[str]]:
    """Return the cells of a printed table's rows, without its heads."""
    return [re.split(" {2,}", line.strip()) for line in table.splitlines() if line.startswith("  ")][1:]


FIXED = """
import torch
from torch import nn

class Fixed(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + torch.full((x.shape[0] // 1,), float(len(x.tolist())))[:, None]

def net(num_classes):
    return Fixed(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                 nn.Linear(8, num_classes))
"""


def test_what_cannot_be_exported_is_refused_before_anything_is_trained(folder: Path) -> None:
    (folder / "fixed_nets.py").write_text(FIXED)
    given = ["--model", "fixed_nets:net", "--data", "sample", "--budget", "macs=99%", "--in-process"]
    found = invoke("compress", "--out", "refused", *given, "--set", "data.limit_train=60")
    sys.modules.pop("fixed_nets", None)
    assert found.exit_code == 2 and "model 'fixed_nets:net'" in found.stderr and "ONNX" in found.stderr, found.stderr
    assert "train:" not in found.stderr and not (folder / "refused").exists()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--budget", "macs=1%"], "nothing fits"),
        (["--budget", "speed=60%"], "budget on 'speed'"),
        (["--budget", "macs=60%", "--to", "net.txt"], "must end in .onnx"),
        ([], "--budget"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(folder: Path, more: list[str], line: str) -> None:
    found = compress("refused", *more)
    assert found.exit_code == 2 and line in found.stderr, found.stderr
    assert not (folder / "refused").exists()
