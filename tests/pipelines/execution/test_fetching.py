"""Files of images are copied from the driver's node to that of a worker."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from gross_ray.data import reading
from gross_ray.data.identity import SPLITS, identity_of
from gross_ray.data.image_files import ImageFiles
from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import DatasetError
from gross_ray.experiment import DataOptions
from pipelines.capacity import Capacity
from pipelines.execution import fetching
from pipelines.execution.fetching import Fetcher
from pipelines.packing import PackedSplits, pack_splits, unpack_splits

CHUNK = 1000
"""Less than the images of the training split, and no divisor of their size."""


@pytest.fixture
def splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Splits:
    """Images in files below the home folder, whose source is gone."""
    monkeypatch.setattr(reading, "processes", lambda: 0)
    generator = np.random.default_rng(0)
    for number in range(40):
        (tmp_path / "source" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "source" / "ab"[number % 2] / f"{number:02}.png")
    root = f"~/{os.path.relpath(tmp_path / 'driver', Path.home())}"
    read = load_dataset(DataOptions(name=f"folder:{tmp_path / 'source'}", memory=1), root=root)
    shutil.rmtree(tmp_path / "source")
    return read


def _unpacked(packed: PackedSplits, home: str, node: str, chunk: int) -> tuple[int, str, str]:
    """Unpack images in a worker with another home folder, as on another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", home)
        patch.setattr(fetching, "CHUNK", chunk)
        splits = unpack_splits(packed, "cpu", None, Fetcher(node))
        assert splits.train.stored.shape == (24, 3, 9, 9)
        (mapped,) = {part.mapped.root for part in packed.splits.values() if part.mapped is not None}
        return os.getpid(), identity_of(splits).hash, str(Path(mapped).expanduser())


def test_a_worker_copies_the_files_in_chunks(cluster: Capacity, splits: Splits, tmp_path: Path) -> None:
    node, home = ray.get_runtime_context().get_node_id(), tmp_path.joinpath("worker", *Path.home().parts[1:])
    home.mkdir(parents=True)
    packed = pack_splits(splits, DataOptions(name=splits.name, memory=1))
    assert splits.train.mapped is not None
    work = ray.remote(num_cpus=1)(_unpacked)
    process, found, root = ray.get(work.remote(packed, str(home), node, CHUNK))
    assert process != os.getpid() and found == identity_of(splits).hash
    key = splits.train.mapped.key
    there, here = ImageFiles(str(tmp_path / "driver"), key), ImageFiles(root, key)
    assert here.folder.resolve() != there.folder.resolve()
    assert here.verify() and here.complete() and there.verify()
    for split in SPLITS:
        assert (here.folder / f"{split}.u8").read_bytes() == (there.folder / f"{split}.u8").read_bytes()
    assert (here.folder / "train.u8").stat().st_size > 3 * CHUNK


def test_files_that_cannot_be_copied_are_one_line(cluster: Capacity, tmp_path: Path) -> None:
    files = ImageFiles(str(tmp_path), "none")
    with pytest.raises(DatasetError) as caught:
        Fetcher(ray.get_runtime_context().get_node_id())(files)
    problem = "the images cannot be copied from the driver's machine (FileNotFoundError: [Errno 2] No such file or "
    assert str(caught.value).startswith(f"{files.folder}: {problem}") and "\n" not in str(caught.value)
    assert str(caught.value).endswith("; look at that machine and the disk here")
    assert "Traceback" not in str(caught.value) and not files.folder.exists()
