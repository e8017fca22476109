"""Supernets trained together in one batched pass give what they give one by one, but for rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from miniature import do

from gross_ray import read_table
from gross_ray.run.store import RunStore

SUPERNETS = ["alpha=0,scaling=index,seed=0", "alpha=4,scaling=normalised,seed=0"]


def without_supernets(whole: Path, run: Path) -> Path:
    """Copy a finished run without its supernets and what came of them, with two supernets to a pass."""
    kept = (
        "experiment.json",
        "tables/networks",
        "tables/decompositions",
        "tables/validations",
        "checkpoints/train",
        "checkpoints/decompose",
        "checkpoints/validate",
    )
    for name in kept:
        source, target = whole / name, run / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (run / "tables/history").mkdir()
    for file in whole.glob("tables/history/*"):
        if not file.name.startswith(("reconstruct", "finetune")):
            shutil.copy(file, run / "tables/history")
    file = run / "experiment.json"
    experiment = json.loads(file.read_text())
    experiment["engine"]["parallel_seeds"] = 2
    file.write_text(json.dumps(experiment))
    return run


def test_a_sweep_in_one_pass(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    run = without_supernets(whole_run[0], tmp_path / "run")
    ended = do("sweep-alpha", run)
    for stage in ("reconstruct", "finetune"):
        assert f"sweep-alpha {stage}: 1/1 {SUPERNETS[0]} and 1 more loss" in ended.stderr
        for unit in SUPERNETS:
            ours, about = RunStore.open(run).load_checkpoint(stage, unit)
            theirs, the_same = RunStore.open(whole_run[0]).load_checkpoint(stage, unit)
            assert about == the_same and ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-5), f"{stage} {unit}: {name}"
    assert not list((run / "checkpoints").glob("*-under-way/*"))
    swept, alone = (read_table(folder, "alpha_sweep") for folder in (run, whole_run[0]))
    assert swept["configuration"].tolist() == alone["configuration"].tolist()
    assert (swept["supernet_accuracy"] - alone["supernet_accuracy"]).abs().max() <= 2 / 60
