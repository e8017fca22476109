"""gross export: a validated configuration in a file that needs nothing of ours, and its card."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import pytest
import torch
from miniature import invoke, tables
from safetensors.torch import load_file, save_file

from gross_ray.data.images import load_dataset
from gross_ray.errors import GrossRayError
from gross_ray.experiment import DataOptions
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel
from gross_ray.search.timing import device_name
from gross_ray.space import DENSE
from pipelines.commands import exporting
from pipelines.stages import latencies


def test_a_validated_configuration_is_exported_with_its_card(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run = whole_run[0]
    row = tables(run)["validations"].set_index("configuration").loc["4-4-4"]
    images = (load_dataset(DataOptions(name="sample")).test.images[:100] / 255 - 0.5) / 0.225
    network = Run(RunStore.open(run)).validated("4-4-4", 0).eval()
    expected = network(images).detach()
    for ending in ("onnx", "pt2", "safetensors"):
        ended = invoke("export", str(run), "--configuration", "4-4-4", "--to", str(tmp_path / f"network.{ending}"))
        assert ended.exit_code == 0, ended.stderr
        card = json.loads((tmp_path / f"network.{ending}.json").read_text())
        assert card["accuracy"]["test"] == row["test_accuracy"]
        assert (card["macs"], card["parameters"]) == (row["macs"], row["parameters"])
        assert card["layers"] == {"conv2": 4, "conv3": 4, "conv4": 4}
        assert card["input"]["shape"] == ["N", 3, 32, 32]
        assert card["input"]["from pixels 0 to 255"] == "(x / 255 - 0.5) / 0.225"
        assert len(card["classes"]) == 10
        assert card["versions"]["torch"] == version("torch")
        assert (card["batch"], card["precision"]) == ("any", "float32")
        assert ("opset" in card, "network" in card) == (ending == "onnx", ending == "safetensors")
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


def test_a_file_that_cannot_be_written_leaves_nothing(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run, target = whole_run[0], tmp_path / "folded.pt2"
    unmeasured = invoke("export", str(run), "--configuration", "16-16-16", "--to", str(target), "--fold", "latency_ms")
    assert (unmeasured.exit_code, target.exists()) == (2, False)
    assert "--fold latency_ms needs a measurement, and" in unmeasured.stderr
    assert "run `gross latency` on it first" in unmeasured.stderr
    beside = tmp_path / "folded.pt2.json"
    beside.mkdir()
    taken = invoke("export", str(run), "--configuration", "16-16-16", "--to", str(target))
    assert (taken.exit_code, list(tmp_path.iterdir())) == (2, [beside])
    assert taken.stderr == f"Error: {beside}: is a folder, must be a file; remove it, or name another file\n"
    beside.rmdir()
    nowhere = invoke("export", str(run), "--configuration", "16-16-16", "--to", "/proc/folded.pt2")
    assert nowhere.exit_code == 1
    assert re.search("/proc/[.]partial-.*: No such file or directory; name another file", nowhere.stderr)
    assert len(nowhere.stderr.splitlines()) == 1


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_an_export_is_in_the_form_that_was_measured(run: Path, tmp_path: Path, ending: str) -> None:
    opened, target = Run(RunStore.open(run)), tmp_path / f"folded.{ending}"
    signs = {"conv2": 1, "conv3": -1, "conv4": 1}
    added = {
        layer: {DENSE: 0.0} | {size: signs[layer] * 0.1 for size in sizes}
        for layer, sizes in opened.space.group_sizes.items()
    }
    model = LatencyModel(
        runtime="onnxruntime", version="1", device=device_name(torch.device("cpu")), host=socket.gethostname(),
        batch_size=8, threads=1, full_ms=9.0, added_ms=added, num_sampled=3, median_error=0.1, noise=0.1,
    )  # fmt: skip
    latencies.put(opened, model)
    ended = invoke("export", str(run), "--configuration", "16-16-16", "--to", str(target))
    assert ended.exit_code == 0, ended.stderr
    card = json.loads(Path(f"{target}.json").read_text())
    assert card["folded by"] == "latency_ms" and {one["layer"] for one in card["folded"]} == {"conv2", "conv4"}
    assert ended.stdout.splitlines()[:3] == [
        "conv2 (group-size 16): a bottleneck is 0.1 ms slower: written as the dense convolution",
        "conv3 (group-size 16): a bottleneck is 0.1 ms faster: kept",
        "conv4 (group-size 16): a bottleneck is 0.1 ms slower: written as the dense convolution",
    ]
    what = "the file" if ending == "onnx" else "the network"
    of = card["latency of"]
    assert card["latency_ms"] > 0 and (of["timed"], of["batch_size"]) == (what.split()[1], 8)
    assert of["full network, ms"] > 0 and of["version"] == onnxruntime.__version__
    assert f"{what} takes {card['latency_ms']:.3g} ms for a batch of 8 in ONNX Runtime" in ended.stdout
    assert "; the full network takes " in ended.stdout
    (predicted,) = card["predicted latencies"]
    assert predicted["latency_ms"] == pytest.approx(8.9) and predicted["latency of"]["full network, ms"] == 9.0
    network = opened.validated("16-16-16", 0).eval()
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 4 - 2
    if ending == "pt2":
        found = torch.export.load(target).module()(images).detach()
    else:
        found = torch.from_numpy(onnxruntime.InferenceSession(target).run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, network(images).detach(), rtol=1e-4, atol=1e-4)
    kept = invoke("export", str(run), "--configuration", "16-16-16", "--to", str(target), "--fold", "none")
    assert kept.exit_code == 0 and "bottleneck" not in kept.stdout
    card = json.loads(Path(f"{target}.json").read_text())
    assert "folded by" not in card
    assert card["predicted latencies"][0]["latency_ms"] == pytest.approx(9.1), "of the bottlenecks that it has"


def test_a_file_is_written_where_its_time_cannot_be_taken(run: Path, tmp_path: Path) -> None:
    opened, target = Run(RunStore.open(run)), tmp_path / "network.pt2"
    added = {layer: {DENSE: 0.0} | dict.fromkeys(sizes, 0.1) for layer, sizes in opened.space.group_sizes.items()}
    here = {"device": device_name(torch.device("cpu")), "host": socket.gethostname()}
    for threads, host, expected in (
        (4096, here["host"], "not timed again: threads = 4096: this machine"),
        (1, "b", None),
    ):
        model = LatencyModel(
            runtime="torch", version="1", device=here["device"], host=host, batch_size=8, threads=threads, full_ms=9.0,
            added_ms=added, num_sampled=3, median_error=0.1, noise=0.1,
        )  # fmt: skip
        latencies.put(opened, model)
        ended = invoke("export", str(run), "--configuration", "16-16-16", "--to", str(target))
        assert ended.exit_code == 0, ended.stderr
        assert expected is None or expected in ended.stdout
        card = json.loads(Path(f"{target}.json").read_text())
        assert card["latency_ms"] == pytest.approx(9.0) and card["latency of"]["timed"] == "predicted"


def test_a_training_whose_row_is_not_stored_is_not_exported(run: Path, tmp_path: Path) -> None:
    store = RunStore.open(run)
    for unit in store.units("validations"):
        if unit.startswith("16-16-16,"):
            store.delete_unit("validations", unit)
    refused = invoke("export", str(run), "--configuration", "16-16-16", "--to", str(tmp_path / "a.safetensors"))
    assert refused.exit_code == 2 and "16-16-16,seed=0 is not validated in" in refused.stderr
    assert list(tmp_path.iterdir()) == [run]


def test_a_file_is_checked_on_the_runs_own_images(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run, target = whole_run[0], tmp_path / "small.onnx"
    words = ["export", str(run), "--configuration", "16-16-16", "--to", str(target)]
    alone = invoke(*words, "--download")
    assert (alone.exit_code, target.exists()) == (2, False)
    assert "--download without --check" in alone.stderr
    ended = invoke(*words, "--check")
    assert ended.exit_code == 0, ended.stderr
    checked = ended.stdout.splitlines()[0]
    assert checked.startswith(f"checked in ONNX Runtime {onnxruntime.__version__} on 60 images: logits up to ")
    assert checked.endswith(" and 0 predictions differ")
    card = json.loads((tmp_path / "small.onnx.json").read_text())["check"]
    assert (card["images"], card["predictions_that_differ"]) == (60, 0)
    before = target.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "check_export", refused)
        failed = invoke(*words, "--check")
    assert (failed.exit_code, failed.stderr) == (2, "Error: the file does not compute what its network does\n")
    assert target.read_bytes() == before  # the earlier file stays
    assert {file.name for file in tmp_path.iterdir()} == {"small.onnx", "small.onnx.json"}


def refused(*_: object) -> None:
    raise GrossRayError("the file does not compute what its network does")
