"""What is kept under results/, and that the pages show it and nothing else."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

import gross_ray
from gross_ray.presets import preset
from gross_ray.report.searched import Searched
from gross_ray.run.searched import evaluated_units
from gross_ray.run.store import RunStore

ROOT = Path(gross_ray.__file__).parents[1]
KEPT = sorted(path.parent for path in (ROOT / "results").glob("*/about.json"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripts_results", ROOT / "scripts" / "results.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_kept_tables(script: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.with_blocks(readme) == readme, "run python scripts/results.py write"


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_the_pages_show_the_kept_tables(script: ModuleType, folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == script.page(RunStore.open(folder))
    assert {path.stem for path in folder.glob("*.png")} == set(script.charts(RunStore.open(folder)))


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_what_is_kept_is_the_whole_run_of_its_preset(folder: Path) -> None:
    store = RunStore.open(folder)
    experiment = store.experiment
    words = shlex.split(json.loads((folder / "about.json").read_text())["command"])
    assert words[:4] == ["gross", "run", "--preset", experiment.name]
    settings = [value for option, value in pairwise(words) if option == "--set"]
    assert experiment == preset(experiment.name).override(settings)
    assert len(store.read_table("networks")) == experiment.training.seeds
    assert len(store.read_table("configurations").query("alpha == @experiment.supernet.alpha")["seed"].unique()) >= (
        experiment.supernet.seeds
    )
    validations = store.read_table("validations")
    chosen = {
        *store.read_table("selections")["configuration"],
        *validations[validations["kind"] == "fixed"]["configuration"],
    }
    repeats = validations.groupby("configuration")["seed"].nunique().to_dict()
    assert repeats.items() >= dict.fromkeys(chosen, experiment.validation.seeds).items()
    sweep = store.read_table("alpha_sweep")
    if not experiment.sweep.alphas:
        assert sweep.empty
        return
    assert sorted(sweep["alpha"].unique()) == sorted(experiment.sweep.alphas)
    assert set(sweep.groupby(["alpha", "scaling"])["seed"].nunique()) == {experiment.sweep.seeds}


def configuration(seed: int, size: int) -> dict[str, Any]:
    supernet = {"supernet": f"alpha=0,scaling=index,seed={seed}", "alpha": 0.0, "scaling": "index", "seed": seed}
    counts = {"macs": size, "macs_paper": size, "parameters": size, "val_correct": size + seed, "val_total": 10}
    measured = {"val_accuracy": (size + seed) / 10, "val_loss": 1.0, "latency_ms": None}
    return {**supernet, "configuration": str(size), "layer conv2": size, **counts, **measured}


def test_keeping_changes_no_row(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    run = RunStore.create(tmp_path / "run", preset("quickstart"))
    for seed in (2, 10):
        network = {"seed": seed, "val_correct": 3, "val_total": 4, "val_accuracy": 0.75, "test_accuracy": 0.7}
        run.write_table("networks", f"seed={seed}", [network | {"macs": 5, "parameters": 6}])
    for seed, start in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows = [configuration(seed, start + 1)]
        run.write_table("configurations", f"{rows[0]['supernet']},start={start}", rows, layers=["conv2"])
    run.write_pin("weights", {"hash": "0123"})
    told = ["--command", "gross run", "--machine", "a machine", "--time", "1 min", "--commit", "abc"]
    for _ in range(2):  # the second time in place of the first
        outcome = CliRunner().invoke(script.main, ["keep", str(run.path), "kept", *told])
        assert outcome.exit_code == 0, outcome.output
    kept = RunStore.open(tmp_path / "results" / "kept")
    pd.testing.assert_frame_equal(kept.read_table("networks"), run.read_table("networks"))
    assert kept.units("networks") == ["all"]
    assert kept.read_table("validations").empty
    pd.testing.assert_frame_equal(kept.read_table("configurations"), run.read_table("configurations"))
    assert evaluated_units(kept)["seed"].tolist() == [0, 1]
    pd.testing.assert_frame_equal(Searched.of(kept).accuracies, Searched.of(run).accuracies)
    assert kept.experiment == run.experiment
    assert kept.read_pin("weights", dict) == {"hash": "0123"}
    assert kept.read_pin("data", dict) is None
