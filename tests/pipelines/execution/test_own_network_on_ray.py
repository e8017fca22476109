"""A network of one's own: Ray's workers find the function in the folder that the command was started in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gross_ray.run.store import RunStore

OWN = """
from torch import nn

def small(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, num_classes),
    )
"""
SETTINGS = ["data.limit_train=50", "data.limit_validation=40", "data.limit_test=30", "training.epochs=1"]
SETTINGS += ["training.milestones=[]", "training.seeds=1", "search.budgets=[4]", "validation.fixed=[4]"]


def test_a_network_of_ones_own_is_built_on_rays_workers(tmp_path: Path) -> None:
    (tmp_path / "own_networks.py").write_text(OWN)
    start = "import sys; sys.path.remove(''); from cli import main; main()"  # as the installed script does
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    words = ["train", "run", "--preset", "quickstart", "--model", "own_networks:small", "--num-cpus", "2", *settings]
    ended = subprocess.run(
        [sys.executable, "-c", start, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    (row,) = RunStore.open(tmp_path / "run").read_table("networks").to_dict("records")
    assert row["parameters"] == 4 * 27 + 4 + 6 * 36 + 6 + 10 * 6 + 10
