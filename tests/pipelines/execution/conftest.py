from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore


@pytest.fixture(scope="session")
def splits() -> Splits:
    """A few images: what is done with them is made up."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return ImageSet(pixels, torch.randint(0, 2, (count,), generator=generator))

    return Splits("tiny", images(6), images(4), images(5), ("one", "other"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(RunStore.create(tmp_path / "run", preset("quickstart").override(["seed=7"])))
