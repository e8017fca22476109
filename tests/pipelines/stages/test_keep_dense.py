"""A whole run in which layers may stay as they are: every stage knows the choice d."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from miniature import do, invoke
from torch import nn

from gross_ray import read_table
from gross_ray.data.images import load_dataset
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.training.loop import accuracy

SETTINGS = [
    "decomposition.keep_dense=true",
    "decomposition.group_sizes=[1,16]",
    "decomposition.max_steps=5",
    "data.limit_train=100",
    "data.limit_validation=60",
    "data.limit_test=60",
    "training.epochs=2",
    "training.milestones=[]",
    "training.seeds=1",
    "reconstruction.epochs=1",
    "finetuning.epochs=1",
    "search.form=dense",
    "search.budgets=[16]",
    'search.limits=["macs=60%,parameters=90%"]',
    "validation.fixed=[16]",
    "validation.seeds=1",
    "validation.finetuning.epochs=1",
    "sweep.alphas=[]",
]
NAMED = ("d-d-d", "1-d-16")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "run"
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    do("run", "--preset", "quickstart", "--out", out, *words)
    do("validate", out, *(word for name in NAMED for word in ("--configuration", name)))
    return out


def test_every_configuration_is_searched(finished: Path) -> None:
    found = read_table(finished, "configurations")
    texts = {1: "1", 16: "16", 0: "d"}
    expected = [f"{a}-{b}-{c}" for a in texts.values() for b in texts.values() for c in texts.values()]
    assert found["configuration"].tolist() == expected
    layers = [name for name in found if name.startswith("layer ")]
    rows = found[layers].itertuples(index=False)
    assert ["-".join(texts[size] for size in row) for row in rows] == expected
    assert set(read_table(finished, "decompositions")["group_size"]) == {1, 16}
    assert len(read_table(finished, "decompositions")) == 6


def test_with_every_layer_dense_it_is_the_base_network(finished: Path) -> None:
    (base,) = read_table(finished, "networks").to_dict("records")
    searched = read_table(finished, "configurations").set_index("configuration").loc["d-d-d"]
    assert searched["val_accuracy"] == base["val_accuracy"]
    assert (searched["macs"], searched["parameters"]) == (base["macs"], base["parameters"])
    validated = read_table(finished, "validations").set_index("configuration").loc["d-d-d"]
    for column in ("val_accuracy", "test_accuracy", "macs", "parameters"):
        assert validated[column] == base[column]
    history = read_table(finished, "history")
    trained = set(history.loc[history["stage"].str.startswith("validate"), "unit"])
    assert "1-d-16,seed=0" in trained and "d-d-d,seed=0" not in trained


def test_a_layer_that_stays_is_the_base_networks(finished: Path) -> None:
    run = Run(RunStore.open(finished))
    network = run.validated("1-d-16", 0)
    kept, original = network.get_submodule("conv3"), run.base.network.get_submodule("conv3")
    assert isinstance(kept, nn.Conv2d) and isinstance(original, nn.Conv2d)
    assert torch.equal(kept.weight, original.weight)
    assert isinstance(network.get_submodule("conv2"), nn.Sequential)
    rows = read_table(finished, "validations").set_index("configuration")
    assert sum(parameter.numel() for parameter in network.parameters()) == rows.loc["1-d-16", "parameters"]


def test_it_is_selected_exported_and_shown(finished: Path, tmp_path: Path) -> None:
    base = read_table(finished, "networks").iloc[0]
    rows = read_table(finished, "configurations")
    within = rows[(rows["macs"] <= 0.6 * base["macs"]) & (rows["parameters"] <= 0.9 * base["parameters"])]
    shown = invoke("report", finished, "--markdown").stdout
    told = "macs=3.04896M, 60 % of the full network's and parameters=120.537k, 90 % of the full network's"
    title, table = shown.split(f"Most accurate within {told}")[1].split("\n\n")[:2]
    assert within.nlargest(1, "val_accuracy", keep="all")["configuration"].isin(table.split()).any()
    best = invoke("search", finished, "--budget", "macs=5.1M", "--top", "27").stdout
    assert sum("d" in line.split()[1] for line in best.splitlines() if line.strip()[:1].isdigit()) == 27 - 8
    in_percent, in_numbers = (
        invoke("search", finished, "--budget", budget).stdout.splitlines() for budget in ("macs=60%", "macs=3.04896M")
    )
    both = invoke("search", finished, "--budget", "macs=60%,parameters=90%").stdout
    assert both.startswith("Most accurate within macs=3.04896M, 60 % of the full network's and parameters=")
    assert in_percent[1:] == in_numbers[1:] != []
    target = tmp_path / "small.safetensors"
    assert invoke("export", finished, "--configuration", "1-d-16", "--to", target).exit_code == 0
    assert target.stat().st_size > 0
    assert json.loads((tmp_path / "small.safetensors.json").read_text())["layers"] == {
        "conv2": 1,
        "conv3": "dense",
        "conv4": 16,
    }
    words = ("--configuration", "d-d-d", "--to", tmp_path / "whole.safetensors", "--fold", "macs")
    folded = invoke("export", finished, *words)
    assert folded.stdout.startswith("no layer is decomposed: nothing to fold\n"), folded.stderr
    assert "d-d-d" in invoke("show", finished, "configurations", "--rows", "30").stdout
    page = (finished / "report.html").read_text()
    assert "16-16-d" in page and "27" in page


def test_a_finished_run_does_nothing_again(finished: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.glob("tables/*/*.parquet") if "runs" not in str(file)}
    told = do("run", "--preset", "quickstart", "--out", finished, *(w for s in SETTINGS for w in ("--set", s))).stderr
    assert "done already" in told
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_decompositions_of_named_sizes_are_reused_without_it(finished: Path, tmp_path: Path) -> None:
    words = [word for setting in SETTINGS if "keep_dense" not in setting for word in ("--set", setting)]
    told = do("run", "--preset", "quickstart", "--out", tmp_path / "run", "--reuse", finished, *words).stderr
    assert "train 1, decompose 6" in told.replace("\n", " "), told[:600]
    assert not read_table(tmp_path / "run", "configurations")["configuration"].str.contains("d").any()


def test_a_limit_in_percent_waits_for_the_base_network(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", preset("quickstart").override(['search.limits=["macs=60%"]']))
    shown = invoke("report", store.path, "--markdown")
    assert shown.exit_code == 0
    assert "Most accurate within macs=60%" in shown.stdout
    assert "no base network is stored" in shown.stdout and "run `gross train`" in shown.stdout


@pytest.mark.parametrize("strategy", ["breadth-first", "surrogate"])
def test_a_strategy_finds_them_too(finished: Path, tmp_path: Path, strategy: str) -> None:
    out = tmp_path / "run"
    words = [*SETTINGS, f"search.strategy={strategy}", "search.evaluations=9"]
    do("run", "--preset", "quickstart", "--out", out, "--reuse", finished, *(w for s in words for w in ("--set", s)))
    found = read_table(out, "configurations")["configuration"]
    assert len(found) == len(set(found)) == 10  # the fixed one is none of the nine
    assert any("d" in text for text in found)


def test_what_it_would_do_is_previewed() -> None:
    shown = invoke("inspect", "--model", "four-conv", "--keep-dense").stdout
    rows = {line.split()[0]: line for line in shown.splitlines() if line.strip().startswith("conv")}
    assert " 1 2 4 8 16 d " in rows["conv2"]
    assert "not tried: conv2 (group-sizes 32: no fewer MACs or parameters than the original layer)" in shown.replace(
        "\n", " "
    )


def test_all_of_a_configuration_is_trained_and_stored(finished: Path, tmp_path: Path) -> None:
    """The layer that stays dense, too: the stored network has the accuracies of the table."""
    words = [word for setting in [*SETTINGS, "validation.trainable=all"] for word in ("--set", setting)]
    do("run", "--preset", "quickstart", "--out", tmp_path / "all", "--reuse", finished, *words)
    do("validate", tmp_path / "all", "--configuration", "1-d-16")
    store = RunStore.open(tmp_path / "all")
    run, splits = Run(store), load_dataset(store.experiment.data)
    network, base = run.validated("1-d-16", 0), run.base.network
    for name, before in base.named_parameters():
        if name in dict(network.named_parameters()):  # the first layer, the dense one, and the linear ones
            assert not torch.equal(network.get_parameter(name), before)
    row = read_table(tmp_path / "all", "validations").set_index("configuration").loc["1-d-16"]
    assert accuracy(network, splits.validation) == row["val_accuracy"]
    assert accuracy(network, splits.test) == row["test_accuracy"]
    other = read_table(finished, "validations").set_index("configuration").loc["1-d-16"]
    assert (row["macs"], row["parameters"]) == (other["macs"], other["parameters"])
