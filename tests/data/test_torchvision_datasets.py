"""cifar10, cifar100, svhn and stl10: small files in the original formats, with their MD5s in torchvision's lists.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import pickle
import shutil
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import pytest
import torch
from dataset_errors import dataset_error
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat
from split_assertions import assert_equal, keys, sizes
from torchvision import datasets
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN
from torchvision.datasets.utils import calculate_md5

from gross_ray.data.identity import SPLITS
from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions

DATASETS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "svhn": SVHN, "stl10": STL10}
CLASSES = {name: tuple(f"class {i}" for i in range(100 if name == "cifar100" else 10)) for name in DATASETS}
CLASSES["svhn"] = tuple("0123456789")
FILES = {
    "cifar10": [*(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)), "cifar-10-batches-py/test_batch"],
    "cifar100": ["cifar-100-python/train", "cifar-100-python/test"],
    "svhn": ["train_32x32.mat", "test_32x32.mat"],
    "stl10": [f"stl10_binary/{part}_{kind}.bin" for part in ("train", "test") for kind in "Xy"],
}
META = {"cifar10": "cifar-10-batches-py/batches.meta", "cifar100": "cifar-100-python/meta"}
CHECKED = [(name, file) for name, files in FILES.items() for file in [*files, META.get(name)] if file]
CLASS_NAMES = "stl10_binary/class_names.txt"
SOURCES = {name: [dataset.url] for name, dataset in DATASETS.items() if name != "svhn"}
SOURCES["svhn"] = [SVHN.split_list[part][0] for part in ("train", "test")]


class Part(NamedTuple):
    images: np.ndarray
    """(N, 3, H, W), uint8."""
    labels: np.ndarray
    """(N,), int64."""


def make(name: str, num_images: int, seed: int) -> Part:
    random = np.random.default_rng(seed)
    size = 96 if name == "stl10" else 32
    labels = random.permutation(np.arange(num_images) % len(CLASSES[name]))
    return Part(random.integers(0, 256, (num_images, 3, size, size), dtype=np.uint8), labels)


def write_cifar(name: str, root: Path, train: Part, test: Part) -> None:
    *files, test_file = FILES[name]
    shares = [np.array_split(values, len(files)) for values in train]
    for file, images, labels in [*zip(files, *shares, strict=True), (test_file, *test)]:
        batch = {"data": images.reshape(len(images), 3072), "batch_label": file}
        if name == "cifar10":
            batch |= {"labels": labels.tolist()}
        else:
            batch |= {"fine_labels": labels.tolist(), "coarse_labels": (labels // 5).tolist()}
        (root / file).write_bytes(pickle.dumps(batch, protocol=2))
    key = "label_names" if name == "cifar10" else "fine_label_names"
    (root / META[name]).write_bytes(pickle.dumps({key: [*CLASSES[name]]}, protocol=2))


def write_svhn(root: Path, train: Part, test: Part) -> None:
    for file, (images, labels) in zip(FILES["svhn"], (train, test), strict=True):
        digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(root / file, {"X": images.transpose(2, 3, 1, 0), "y": digits}, do_compression=True)


def write_stl10(root: Path, train: Part, test: Part) -> None:
    for part, (images, labels) in (("train", train), ("test", test)):
        (root / f"stl10_binary/{part}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())  # column by column
        (root / f"stl10_binary/{part}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    (root / CLASS_NAMES).write_text("".join(f"{each}\n" for each in CLASSES["stl10"]))


def write(name: str, root: Path, train: Part, test: Part, patch: pytest.MonkeyPatch) -> None:
    """Write the files of a dataset, and put their MD5s in torchvision's lists."""
    (root / FILES[name][0]).parent.mkdir(parents=True, exist_ok=True)
    if name == "svhn":
        write_svhn(root, train, test)
    elif name == "stl10":
        write_stl10(root, train, test)
    else:
        write_cifar(name, root, train, test)
    dataset = DATASETS[name]
    md5s = [[Path(file).name, calculate_md5(root / file)] for file in FILES[name]]
    if name == "svhn":
        lists = {part: [SVHN.split_list[part][0], *md5] for part, md5 in zip(("train", "test"), md5s, strict=True)}
        patch.setattr(dataset, "split_list", lists)
        return
    num_test = 2 if name == "stl10" else 1
    unlabelled = STL10.train_list[2:] if name == "stl10" else []
    patch.setattr(dataset, "train_list", [*md5s[:-num_test], *unlabelled])
    patch.setattr(dataset, "test_list", md5s[-num_test:])
    if name in META:
        patch.setattr(dataset, "meta", dataset.meta | {"md5": calculate_md5(root / META[name])})


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replace downloads by copies of tmp_path/network, which fail if it does not exist."""
    folder = tmp_path / "network"

    def download(url: str, root: str | Path, **_: object) -> None:
        if not folder.is_dir():
            raise URLError("no network\nin tests")
        shutil.copytree(folder, root, dirs_exist_ok=True)

    for module in (datasets.cifar, datasets.stl10):
        monkeypatch.setattr(module, "download_and_extract_archive", download)
    monkeypatch.setattr(datasets.svhn, "download_url", lambda url, root, *_: download(url, root))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def write_small(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    write(name, root, make(name, 100, 0), make(name, 20, 1), patch)


def load(name: str, root: Path, *, download: bool = False) -> Splits:
    return load_dataset(DataOptions(name=name), root=root, download=download)


@pytest.mark.parametrize("name", DATASETS)
@settings(max_examples=5)
@given(num_train=st.integers(100, 160), num_test=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_every_image_is_in_one_split_with_its_label(name: str, num_train: int, num_test: int, seed: int) -> None:
    """Of a single test image of SVHN, torchvision returns a label without a dimension: there are two or more."""
    train, test = make(name, num_train, seed), make(name, num_test, seed + 1)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        write(name, Path(folder), train, test, patch)
        splits = load(name, Path(folder))
        assert_equal(splits, load(name, Path(folder)))
    assert (splits.name, splits.classes, splits.notes) == (name, CLASSES[name], ())
    assert sizes(splits) == (round(num_train * 4 / 5), num_train - round(num_train * 4 / 5), num_test)
    for members, part in (((splits.train, splits.validation), train), ((splits.test,), test)):
        found = [pair for each in members for pair in zip(keys(each), each.labels.tolist(), strict=True)]
        assert Counter(found) == Counter(zip((image.tobytes() for image in part.images), part.labels, strict=True))
    for split in SPLITS:
        images = getattr(splits, split)
        assert images.images.is_contiguous()
        assert (images.images.dtype, images.labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize(("name", "file"), CHECKED)
def test_a_missing_or_damaged_file_is_named(
    name: str, file: str, root: Path, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small(name, root, monkeypatch)
    network.mkdir()  # it is not used
    path = root / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    dataset_error(lambda: load(name, root), f"{name}: {path} is damaged", "its MD5 is not", "--download")
    path.unlink()
    dataset_error(lambda: load(name, root), f"{name}: no {path.name} in {path.parent};", "--download", *SOURCES[name])


def test_a_pickle_with_another_md5_is_not_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small("cifar100", root, monkeypatch)
    (root / FILES["cifar100"][0]).write_bytes(b"cbuiltins\nexit\n(tR.")
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("opened"))
    dataset_error(lambda: load("cifar100", root), "is damaged")


@pytest.mark.parametrize("name", DATASETS)
def test_downloads_only_when_told(name: str, root: Path, network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small(name, network, monkeypatch)
    expected = load(name, network)
    first = Path(FILES[name][0]).name
    dataset_error(lambda: load(name, root), f"no {first} in", "--download")
    stored = network.rename(network.with_name("stored"))
    failed = (f"cannot be loaded into {root}", "no network in tests", "check the network", *SOURCES[name])
    dataset_error(lambda: load(name, root, download=True), *failed)
    network.mkdir()  # a download without the files
    failed = (f"cannot be loaded into {root}", "check the network", *SOURCES[name])
    dataset_error(lambda: load(name, root, download=True), *failed)
    network.rmdir()
    stored.rename(network)
    assert_equal(load(name, root, download=True), expected)
    shutil.rmtree(network)
    assert_equal(load(name, root), expected)
    if name != "svhn":  # its files are checked by download_url, which this test replaces
        assert_equal(load(name, root, download=True), expected)


@pytest.mark.parametrize("content", [b"", b"plane\nbird\n", b"\n" * 11, b"\xff\n" * 10])
def test_stl10_with_other_class_names(content: bytes, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small("stl10", root, monkeypatch)
    (root / CLASS_NAMES).write_bytes(content)
    dataset_error(lambda: load("stl10", root), "stl10", root, f"unpack {STL10.url} in {root}")


def test_stl10_needs_its_class_names(root: Path, network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small("stl10", network, monkeypatch)
    shutil.copytree(network, root)
    (root / CLASS_NAMES).unlink()
    dataset_error(lambda: load("stl10", root), f"no class_names.txt in {root / 'stl10_binary'}", "--download")
    assert load("stl10", root, download=True).classes == CLASSES["stl10"]


def test_svhn_needs_scipy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small("svhn", root, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    dataset_error(lambda: load("svhn", root), "svhn: cannot be read", "scipy.io", "pip install scipy")
