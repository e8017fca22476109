"""A network and weights of one's own, through the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from miniature import invoke
from safetensors.torch import save_file
from torch import nn

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import InvalidValueError, MissingStageError
from gross_ray.experiment import DataOptions
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.pins import fingerprint
from gross_ray.run.store import RunStore
from gross_ray.search.cost import layer_costs
from gross_ray.search.latency import LatencyModel
from gross_ray.space import DENSE, Configuration
from gross_ray.supernet.build import empty_supernet
from gross_ray.training.loop import accuracy
from gross_ray.weights import hash_of_tensors
from pipelines.stages import latencies, train
from pipelines.stages.rounds import check_limits
from pipelines.units import Context

OWN = """
from torch import nn

def small(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes),
    )
"""
HOOKED = (
    OWN
    + """
def hooked(num_classes):
    network = small(num_classes)
    nn.utils.prune.l1_unstructured(network[0], "weight", 0.5)
    network[5] = nn.utils.spectral_norm(network[5])
    network[8] = nn.utils.weight_norm(network[8])
    return network
"""
)
LIMITS = ["data.limit_train=50", "data.limit_validation=40", "data.limit_test=30", "decomposition.tolerance=1e-3"]
LIMITS += ["search.budgets=[4]", "validation.fixed=[4]"]
ONE_SHORT = ["training.epochs=1", "training.milestones=[]", "training.seeds=1", *LIMITS[4:]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that commands are started in; as for the installed script, it is not on Python's path."""
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    sys.modules.pop("own_networks", None)
    yield tmp_path
    sys.modules.pop("own_networks", None)


def command(*words: str) -> Result:
    return invoke(*words, "--in-process", "--num-cpus", "1")


def test_given_weights_are_taken_as_they_are(folder: Path) -> None:
    names: dict[str, object] = {}
    exec(OWN, names)
    network: nn.Module = names["small"](10)  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network(torch.randn(64, 3, 32, 32))  # statistics
    save_file(network.state_dict(), folder / "network.safetensors")
    settings = [word for limit in LIMITS for word in ("--set", limit)]
    model = ["--model", "own_networks:small"]
    given = ["--preset", "quickstart", "--weights", "network.safetensors", *model, *settings]
    trained = command("train", "run", *given)
    assert trained.exit_code == 0, trained.stderr
    store = RunStore.open(folder / "run")
    (row,) = store.read_table("networks").to_dict("records")
    splits = load_dataset(DataOptions(name="sample", limit_train=50, limit_validation=40, limit_test=30))
    assert (row["seed"], row["val_accuracy"]) == (0, accuracy(network.eval(), splits.validation))
    assert row["test_accuracy"] == accuracy(network, splits.test)
    stored, _ = store.load_checkpoint("train", "seed=0")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in network.state_dict().items())
    assert store.read_table("history").empty
    old = {name: one.clone() for name, one in network.state_dict().items() if "num_batches" not in name}
    save_file({f"module.{name}": one for name, one in old.items()}, folder / "network.safetensors")
    again = command("train", "run", *given)
    assert again.exit_code == 0, again.stderr
    with torch.no_grad():
        network.get_parameter("2.weight").add_(1)
    save_file(network.state_dict(), folder / "network.safetensors")
    refused = command("train", "run", *given)
    assert refused.exit_code == 2 and len(refused.stderr.splitlines()) == 1
    assert "network.safetensors: the tensors differ from those that " in refused.stderr
    changed, first = (hash_of_tensors(one)[:12] for one in (network.state_dict(), old))
    assert f"their hash is {changed}, not {first}" in refused.stderr
    (folder / "network.safetensors").unlink()  # the run folder has them
    gone = command("train", "run", *given)
    assert gone.exit_code == 0, gone.stderr
    decomposed = command("decompose", "run")
    assert decomposed.exit_code == 0, decomposed.stderr
    rows = store.read_table("decompositions")
    assert set(zip(rows["layer"], rows["group_size"], strict=True)) == {("2", 1), ("2", 2), ("2", 4)}


def test_a_checkpoint_of_a_training_script(folder: Path) -> None:
    names: dict[str, object] = {}
    exec(OWN, names)
    raw, averaged = (names["small"](10) for _ in range(2))  # type: ignore[operator]
    with torch.no_grad():
        averaged[0].weight.zero_()
    checkpoint = {"model": raw.state_dict(), "model_ema": averaged.state_dict(), "args": argparse.Namespace(lr=0.1)}
    torch.save(checkpoint, folder / "checkpoint.pth")
    save_file(averaged.state_dict(), folder / "averaged.safetensors")
    settings = [word for limit in LIMITS for word in ("--set", limit)]
    own = ["--preset", "quickstart", "--model", "own_networks:small", *settings]
    path = folder / "checkpoint.pth"
    taken = command("train", "raw", *own, "--weights", str(path))
    assert taken.exit_code == 0, taken.stderr
    assert taken.stderr.splitlines()[0] == (
        f"weights {path}: 'model' is taken; passed over: args; there too: model_ema; to take another, choose one, like "
        "weights_key=model_ema (--weights-key model_ema; in Python key='model_ema')"
    )
    other = command("train", "run", *own, "--weights", str(path), "--weights-key", "model_ema")
    assert other.exit_code == 0, other.stderr
    assert "'model_ema' is taken; passed over: args; there too: model; " in other.stderr
    stored, _ = RunStore.open(folder / "run").load_checkpoint("train", "seed=0")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in averaged.state_dict().items())
    plain = [*own, "--weights", str(folder / "averaged.safetensors")]  # the same tensors in another file
    again = command("train", "run", *plain)
    assert again.exit_code == 0, again.stderr
    assert command("train", "plain", *plain).exit_code == 0
    assert fingerprint(RunStore.open(folder / "plain")) == fingerprint(RunStore.open(folder / "run"))
    refused = command("train", "run", *own, "--weights", str(path))
    assert refused.exit_code == 2 and "checkpoint.pth: the tensors differ from those" in refused.stderr
    for words, line in (
        (["--weights-key", "model_ema"], "weights_key = 'model_ema': chooses weights in a file, and there is none"),
        (["--weights", str(path), "--weights-key", "ema"], "no prefix of names weights_key = 'ema'; it has: model, m"),
        (["--weights-key", "a", "--set", "weights_key=b"], "--weights-key a and --set weights_key=b both set"),
    ):
        mistaken = command("train", "new", *own, *words)
        assert mistaken.exit_code == 2 and line in mistaken.stderr
        assert not (folder / "new").exists()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_network_whose_weights_hooks_compute_is_run_and_exported(folder: Path) -> None:
    (folder / "own_networks.py").write_text(HOOKED)
    epochs = ["reconstruction.epochs=1", "finetuning.epochs=1", "validation.finetuning.epochs=1", "search.form=dense"]
    short = [*ONE_SHORT, *LIMITS[:3], *epochs, "supernet.seeds=1", "validation.seeds=1", "sweep.alphas=[]"]
    settings = [word for setting in short for word in ("--set", setting)]
    done = command("run", "--out", "run", "--preset", "quickstart", "--model", "own_networks:hooked", *settings)
    assert done.exit_code == 0, done.stderr
    network = Run(RunStore.open(folder / "run")).base.network
    assert int((network.get_buffer("0.weight_mask") == 0).sum()) == 54  # half of the weights
    written = invoke("export", "run", "--configuration", "4", "--to", "network.onnx", "--check")
    assert written.exit_code == 0 and "checked in ONNX Runtime" in written.stdout, written.stderr


def test_mistakes_are_told_in_a_line_before_anything_is_made(folder: Path) -> None:
    for words, line in (
        (["--model", "own_networks:large"], "module 'own_networks' has no attribute 'large'"),
        (["--weights", "nowhere.pt"], "nowhere.pt: there is no such file"),
        (["--weights", "a.pt", "--set", "training.seeds=2"], "training.seeds = 2: must be 1 with weights"),
    ):
        refused = command("train", "run", "--preset", "quickstart", *words)
        assert refused.exit_code == 2, refused.stderr
        assert line in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        assert not (folder / "run").exists()


def wide(num_classes: int) -> nn.Module:
    """A network for images of any shape."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, num_classes),
    )


def test_images_that_are_not_square_cost_what_they_cost(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", preset("quickstart").override([f"model={__name__}:wide", *ONE_SHORT]))
    images = ImageSet(torch.zeros(8, 3, 12, 20, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    splits = Splits("noise", images, images, images, ("a", "b"))
    run = Run(store)
    for unit in train.plan(run):
        train.work(Context(run, splits, "cpu", lambda *_, **__: None), unit)
    base = run.base
    assert base.input_shape == (3, 12, 20)
    macs = 12 * 20 * 9 * (3 * 4 + 4 * 6) + 6 * 2
    assert store.read_table("networks")["macs"].tolist() == [macs]
    largest = empty_supernet(base.network, base.space.group_sizes)
    costs = layer_costs(largest, base.input_shape, "macs")
    assert costs.of_one(Configuration([1])) == 12 * 20 * (9 * 12 + 16 + 9 * 4 + 24) + 12


def test_a_limit_on_a_latency_is_told_once_the_networks_are_trained(tmp_path: Path) -> None:
    limit = 'search.limits=["latency_ms=0.5"]'
    store = RunStore.create(
        tmp_path / "run", preset("quickstart").override([f"model={__name__}:wide", *ONE_SHORT, limit])
    )
    images = ImageSet(torch.zeros(8, 3, 12, 20, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    run, splits = Run(store), Splits("noise", images, images, images, ("a", "b"))
    for unit in train.plan(run):
        train.work(Context(run, splits, "cpu", lambda *_, **__: None), unit)
    with pytest.raises(MissingStageError, match="search.limits has latency_ms, .*run `gross latency` on it before"):
        check_limits(run)
    model = LatencyModel(
        runtime="torch", version="2", device="a GPU", host="host", batch_size=1, threads=1, full_ms=1.5,
        added_ms={"2": {1: -0.4, 2: -0.3, 4: 0.2, DENSE: 0.0}}, num_sampled=3, median_error=0.01, noise=0.01,
    )  # fmt: skip
    latencies.put(run, model)
    with pytest.raises(InvalidValueError, match="latency_ms=0.5: nothing fits; the smallest is latency_ms=1.1 at 1"):
        check_limits(run)
