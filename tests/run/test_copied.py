"""What one run folder takes from another."""

from __future__ import annotations

from pathlib import Path

import torch

from gross_ray.presets import preset
from gross_ray.run.store import RunStore


def test_a_checkpoint_whose_writer_was_killed_before_the_file_for_people_is_copied(tmp_path: Path) -> None:
    one, other = (RunStore.create(tmp_path / name, preset("quickstart")) for name in ("one", "other"))
    other.save_checkpoint("train", "seed=0", {"weight": torch.arange(3)}, {"classes": ["a"]})
    (other.path / "checkpoints/train/seed=0.json").unlink()
    one.copy_checkpoint(other, "train", "seed=0")
    tensors, description = one.load_checkpoint("train", "seed=0")
    assert tensors["weight"].tolist() == [0, 1, 2]
    assert description == {"classes": ["a"]}
