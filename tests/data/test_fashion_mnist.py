import gzip
import shutil
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from dataset_errors import dataset_error
from split_assertions import assert_equal, assert_well_formed, keys, sizes
from torchvision.datasets import FashionMNIST

from gross_ray.data import fashion_mnist as module
from gross_ray.data.fashion_mnist import FASHION_FILES
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network\nin tests")

    monkeypatch.setattr(FashionMNIST, "download", refuse)


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_fashion(folder: Path, num_train: int = 120, num_test: int = 20) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(num_train)
    values = {}
    for part, num in (("train", num_train), ("t10k", num_test)):
        values[f"{part}-images-idx3-ubyte.gz"] = random.integers(1, 256, (num, 28, 28), dtype=np.uint8)
        values[f"{part}-labels-idx1-ubyte.gz"] = np.arange(num, dtype=np.uint8) % 10
    for file, array in values.items():
        (folder / file).write_bytes(gzip.compress(idx(array)))
    return values


@pytest.fixture
def no_debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "debian"
    monkeypatch.setattr(module, "DEBIAN_FOLDER", folder)
    return folder


def load_fashion(root: Path, *, download: bool = False) -> Splits:
    return load_dataset(DataOptions(name="fashion-mnist"), root=root, download=download)


@pytest.mark.parametrize("place", ["root", "root/FashionMNIST/raw", "debian"])
def test_fashion_mnist(place: str, no_debian: Path, tmp_path: Path) -> None:
    values = write_fashion(tmp_path / place)
    splits = load_fashion(tmp_path / "root")
    assert splits.name == "fashion-mnist"
    assert sizes(splits) == (80, 20, 20)
    assert_well_formed(splits, (32, 32))
    for part, members in (("train", ("train", "validation")), ("t10k", ("test",))):
        pixels, labels = (values[f"{part}-{kind}-ubyte.gz"] for kind in ("images-idx3", "labels-idx1"))
        padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
        label_of = {np.stack([image] * 3).tobytes(): label for image, label in zip(padded, labels, strict=True)}
        sets: list[ImageSet] = [getattr(splits, split) for split in members]
        found = [pair for images in sets for pair in zip(keys(images), images.labels, strict=True)]
        assert len({key for key, _ in found}) == len(found)  # disjoint
        assert all(label_of[key] == label for key, label in found)
    assert_equal(splits, load_fashion(tmp_path / "root"))


def test_fashion_mnist_prefers_root(no_debian: Path, tmp_path: Path) -> None:
    write_fashion(no_debian, 60)
    write_fashion(tmp_path / "root")
    assert len(load_fashion(tmp_path / "root").train) == 80


def test_missing_fashion_mnist(no_debian: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    where = f"no train-images-idx3-ubyte.gz in {root} or {no_debian}"
    dataset_error(lambda: load_fashion(root), where, "dataset-fashion-mnist, or add --download")


@pytest.mark.parametrize("file", FASHION_FILES)
def test_incomplete_fashion_mnist_is_not_passed_over(file: str, no_debian: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_fashion(no_debian)
    write_fashion(root)
    (root / file).unlink()
    dataset_error(lambda: load_fashion(root), f"no {file} in {root};", "--download")


def test_fashion_mnist_downloads_only_when_told(
    no_debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    dataset_error(lambda: load_fashion(root, download=True), "no network in tests", "check the network")

    def download(self: FashionMNIST) -> None:
        write_fashion(Path(self.raw_folder))
        for file in FASHION_FILES:
            (Path(self.raw_folder) / file[:-3]).write_bytes(
                gzip.decompress((Path(self.raw_folder) / file).read_bytes())
            )

    monkeypatch.setattr(FashionMNIST, "download", download)
    dataset_error(lambda: load_fashion(root), "--download")
    assert len(load_fashion(root, download=True).train) == 80
    assert len(load_fashion(root).train) == 80


LABELS = (np.arange(120) % 10).astype(np.uint8)


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("train-images-idx3-ubyte.gz", b"no gzip", "cannot be read"),
        ("train-images-idx3-ubyte.gz", gzip.compress(bytes(999), mtime=0)[:-9], "cannot be read"),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b\x08" + bytes(50), "cannot be read"),
        ("train-images-idx3-ubyte.gz", b"", "is no IDX file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"", mtime=0), "is no IDX file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(LABELS), mtime=0), "is no IDX file of uint8 in 3 dimensions"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((0, 28, 28), np.uint8)), mtime=0), "is no IDX file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((120, 32, 32), np.uint8)), mtime=0), "(120, 32, 32)"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((120, 28, 28), np.uint8))[:-5], mtime=0),
            "holds 94075",
        ),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((120, 28, 28), np.uint8)) + b"x", mtime=0),
            "holds 94081",
        ),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx(LABELS[:-1]), mtime=0), "119 labels for the 120 images"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx(LABELS + 1), mtime=0), "has the label 10, above 9"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(LABELS), mtime=0), "120 labels for the 20 images"),
    ],
)
def test_damaged_fashion_mnist(file: str, content: bytes, part: str, no_debian: Path, tmp_path: Path) -> None:
    for folder, remedy in ((tmp_path / "root", "replace it"), (no_debian, "reinstall Debian's dataset-fashion-mnist")):
        write_fashion(folder)
        (folder / file).write_bytes(content)
        dataset_error(lambda: load_fashion(tmp_path / "root"), folder / file, part, remedy)
        shutil.rmtree(folder)
