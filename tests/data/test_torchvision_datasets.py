import pickle
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from dataset_errors import dataset_error
from split_assertions import assert_equal, assert_well_formed, keys, sizes
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

from gross_ray.data.identity import SPLITS
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network\nin tests")

    monkeypatch.setattr(CIFAR10, "download", refuse)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[bytes, int]:
    """Write a small archive in the true format and return the label of each of its images."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    label_of = {}
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for file in files:
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = [i % 10 for i in range(20)]
        label_of |= {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)}
        (folder / file).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    md5s = [[file, calculate_md5(folder / file)] for file in files]
    monkeypatch.setattr(CIFAR10, "train_list", md5s[:5])
    monkeypatch.setattr(CIFAR10, "test_list", md5s[5:])
    md5 = calculate_md5(folder / "batches.meta")
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return label_of


def load_cifar(root: Path, *, download: bool = False) -> Splits:
    return load_dataset(DataOptions(name="cifar10"), root=root, download=download)


def test_cifar10(cifar: dict[bytes, int], tmp_path: Path) -> None:
    splits = load_cifar(tmp_path)
    assert sizes(splits) == (80, 20, 20)
    assert_well_formed(splits, (32, 32))
    assert splits.classes == tuple(f"class {i}" for i in range(10))
    found = {}
    for split in SPLITS:
        images: ImageSet = getattr(splits, split)
        found |= dict(zip(keys(images), images.labels.tolist(), strict=True))
    assert found == cifar
    assert_equal(splits, load_cifar(tmp_path))


@pytest.mark.parametrize("file", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
def test_missing_or_damaged_cifar10(file: str, cifar: dict[bytes, int], tmp_path: Path) -> None:
    place = tmp_path / "cifar-10-batches-py" / file
    content = place.read_bytes()
    place.write_bytes(content[:-1])
    dataset_error(lambda: load_cifar(tmp_path), f"{place} is damaged", "--download")
    place.unlink()
    dataset_error(lambda: load_cifar(tmp_path), f"no {file} in {place.parent}", "--download", CIFAR10.url)


def test_cifar10_downloads_only_when_told(
    cifar: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "elsewhere"
    dataset_error(lambda: load_cifar(root), "no data_batch_1", "--download")
    dataset_error(lambda: load_cifar(root, download=True), "no network in tests", "check the network")
    monkeypatch.setattr(CIFAR10, "download", lambda self: shutil.copytree(tmp_path / self.base_folder, root / "x"))
    dataset_error(lambda: load_cifar(root, download=True), "not found or corrupted", "check the network")

    def download(self: CIFAR10) -> None:
        shutil.copytree(tmp_path / self.base_folder, root / self.base_folder, dirs_exist_ok=True)

    monkeypatch.setattr(CIFAR10, "download", download)
    assert sizes(load_cifar(root, download=True)) == (80, 20, 20)
