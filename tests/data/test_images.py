import gzip
import json
import pickle
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from io import BytesIO
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataset_errors import dataset_error
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10, FashionMNIST
from torchvision.datasets.utils import calculate_md5

from gross_ray.data import images as module
from gross_ray.data.images import (
    DEBIAN_FOLDER,
    FASHION_FILES,
    SAMPLE_FILE,
    ImageSet,
    Splits,
    load_dataset,
    read_sample,
)
from gross_ray.data.names import check_dataset_name
from gross_ray.data.splitting import balanced_split
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import DataOptions

SPLITS = ("train", "validation", "test")


def sizes(splits: Splits) -> tuple[int, ...]:
    return tuple(len(getattr(splits, split)) for split in SPLITS)


def keys(images: ImageSet) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.images]


def assert_equal(a: Splits, b: Splits) -> None:
    for split in SPLITS:
        assert torch.equal(getattr(a, split).images, getattr(b, split).images)
        assert torch.equal(getattr(a, split).labels, getattr(b, split).labels)
    assert a.classes == b.classes


def assert_prefixes_balanced(labels: torch.Tensor, num_classes: int) -> None:
    """For classes of one size: no prefix has two more images of one class than of another."""
    counts = torch.nn.functional.one_hot(labels, num_classes).cumsum(0)
    assert (counts.max(1).values - counts.min(1).values).max() <= 1


def assert_well_formed(splits: Splits, size: tuple[int, int]) -> None:
    for split in SPLITS:
        images = getattr(splits, split)
        assert images.images.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert images.images.shape == (len(images.labels), 3, *size)
        assert images.images.is_contiguous()
        assert_prefixes_balanced(images.labels, len(splits.classes))


# --- ImageSet, names, limits


def test_image_set() -> None:
    images = ImageSet(torch.arange(5 * 12, dtype=torch.uint8).reshape(5, 3, 2, 2), torch.arange(5))
    assert len(images) == 5
    assert len(images.first(0)) == 5
    assert torch.equal(images.first(2).images, images.images[:2])
    assert torch.equal(images.first(2).labels, images.labels[:2])
    moved = images.to("meta")
    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")
    for n in (6, -1):
        with pytest.raises(InvalidValueError, match=f"n = {n}: .* 5"):
            images.first(n)
    with pytest.raises(FrozenInstanceError):
        images.labels = torch.zeros(5)  # type: ignore[misc]


@pytest.mark.parametrize(
    "name",
    ["sample", "fashion-mnist", "cifar10", "folder:x", "folder:/a b/c", "parquet:x.parquet", "hf:me/flowers@small"],
)
def test_known_names(name: str) -> None:
    check_dataset_name(name)


@pytest.mark.parametrize("name", ["mnist", "Sample", "folder", "folder:", "parquet:", "hf:", ""])
def test_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(InvalidValueError, match="sample, fashion-mnist, cifar10, folder:PATH, like") as caught:
        check_dataset_name(name)
    assert repr(name) in str(caught.value)


def test_load_dataset_checks_the_name() -> None:
    with pytest.raises(InvalidValueError, match="'mnist'"):
        load_dataset(DataOptions(name="mnist"))


# --- the split


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    proportions=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**32),
)
def test_balanced_split_shares_every_image_out_in_proportion(
    counts: list[int], proportions: tuple[int, ...], seed: int
) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    parts = balanced_split(labels, proportions, torch.Generator().manual_seed(seed))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    for part, proportion in zip(parts, proportions, strict=True):
        share = proportion / sum(proportions)
        assert abs(len(part) - share * len(labels)) <= 1
        for label, count in enumerate(counts):
            assert abs(int((labels[part] == label).sum()) - share * count) < 3
        # In every prefix a class falls behind another only once it has no images left.
        seen = torch.zeros(len(counts), dtype=torch.int64)
        total = torch.bincount(labels[part], minlength=len(counts))
        for label in labels[part].tolist():
            seen[label] += 1
            assert (seen >= torch.minimum(total, seen.max() - 1)).all()


def test_balanced_split_follows_its_generator() -> None:
    labels = torch.arange(200) % 4
    first, again, other = (balanced_split(labels, (1, 1), torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first.sort().values, other.sort().values)


# --- sample


@pytest.fixture(scope="module")
def sample() -> Splits:
    return load_dataset(DataOptions(name="sample"))


def test_sample(sample: Splits) -> None:
    assert sample.name == "sample"
    assert sizes(sample) == (6000, 2000, 2000)
    assert_well_formed(sample, (32, 32))
    for split in SPLITS:
        images: ImageSet = getattr(sample, split)
        assert images.labels.bincount().tolist() == [len(images) // 10] * 10
        assert images.images[:, :, 2:-2, 2:-2].sum() == images.images.sum()  # all else is zero padding
        assert torch.equal(images.images, images.images[:, :1].expand(-1, 3, -1, -1))
    assert not {*keys(sample.train)} & {*keys(sample.validation)}
    assert sample.classes == tuple(FashionMNIST.classes)
    assert SAMPLE_FILE.stat().st_size < 6e6
    metadata = pq.read_schema(SAMPLE_FILE).metadata
    assert json.loads(metadata[b"classes"]) == FashionMNIST.classes
    assert b"MIT" in metadata[b"licence"]


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_sample_is_the_start_of_fashion_mnist(sample: Splits, tmp_path: Path) -> None:
    full = load_dataset(DataOptions(name="fashion-mnist"), root=tmp_path)
    assert sizes(full) == (40_000, 10_000, 10_000)
    assert_well_formed(full, (32, 32))
    assert not {*keys(full.train)} & {*keys(full.validation)}
    limits = DataOptions(name="fashion-mnist", limit_train=6000, limit_validation=2000, limit_test=2000)
    assert_equal(load_dataset(limits, root=tmp_path), sample)


def test_limits(sample: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    decode = module._grey_pixels
    monkeypatch.setattr(module, "_grey_pixels", lambda png: (decoded.append(png), decode(png))[1])
    limited = load_dataset(DataOptions(limit_train=70, limit_validation=30, limit_test=15))
    assert sizes(limited) == (70, 30, 15)
    assert len(decoded) == 115  # the others are left as they are
    for split in SPLITS:
        assert torch.equal(
            getattr(limited, split).images, getattr(sample, split).images[: len(getattr(limited, split))]
        )
    assert limited.train.labels.bincount().tolist() == [7] * 10


def test_half_of_the_test_split_may_be_the_validation_split(sample: Splits) -> None:
    halved = load_dataset(DataOptions(validation_from="test"))
    assert sizes(halved) == (8000, 1000, 1000)
    assert_well_formed(halved, (32, 32))
    assert Counter([*keys(halved.validation), *keys(halved.test)]) == Counter(keys(sample.test))
    assert Counter(keys(halved.train)) == Counter([*keys(sample.train), *keys(sample.validation)])
    for part in (halved.train, halved.validation, halved.test):
        assert part.first(50).labels.bincount().tolist() == [5] * 10  # its order interleaves the classes
    limited = load_dataset(DataOptions(validation_from="test", limit_train=7000, limit_validation=30, limit_test=20))
    assert sizes(limited) == (7000, 30, 20)
    assert torch.equal(limited.train.images, halved.train.images[:7000])
    assert_equal(load_dataset(DataOptions(validation_from="test")), halved)


@pytest.mark.parametrize("split", SPLITS)
def test_limit_above_the_split(split: str) -> None:
    most = {"train": 6000, "validation": 2000, "test": 2000}[split]
    with pytest.raises(InvalidValueError, match=f"the {split} split of sample has {most} images; use at most {most}"):
        load_dataset(DataOptions(**{f"limit_{split}": most + 1}))


def sample_table() -> pa.Table:
    return pq.read_table(SAMPLE_FILE).slice(0, 30)


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    return table.set_column(
        table.schema.get_field_index(name), table.schema.field(name), [pa.array(values, table.schema.field(name).type)]
    )


def big_png() -> bytes:
    file = BytesIO()
    Image.new("L", (32, 32)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda table: table.drop_columns("png"), "split string, label int8, not split string, label int8, png binary"),
        (lambda table: table.replace_schema_metadata({}), "class names"),
        (lambda table: table.replace_schema_metadata({"classes": "['"}), "class names"),
        (lambda table: with_column(table, "png", [b"no png"] * 30), "unreadable image"),
        (lambda table: with_column(table, "png", [big_png()] * 30), "(32, 32)"),
        (lambda table: with_column(table, "label", [10] * 30), "{10}"),
        (lambda table: with_column(table, "label", [None] * 30), "{None}"),
        (lambda table: with_column(table, "split", ["trian"] * 30), "trian"),
        (lambda table: table.slice(0, 0), "0 images"),
    ],
)
def test_wrong_sample(damage: Callable[[pa.Table], pa.Table], part: str, tmp_path: Path) -> None:
    file = tmp_path / "sample.parquet"
    pq.write_table(sample_table(), file)
    assert len(read_sample(file, DataOptions()).train) == 30
    pq.write_table(damage(sample_table()), file)
    dataset_error(lambda: read_sample(file, DataOptions()), file, part, "scripts/make_sample.py")


def test_damaged_sample(tmp_path: Path) -> None:
    file = tmp_path / "sample.parquet"
    dataset_error(lambda: read_sample(file, DataOptions()), file, "scripts/make_sample.py")
    whole = SAMPLE_FILE.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], flipped):
        file.write_bytes(content)
        dataset_error(lambda: read_sample(file, DataOptions()), file, "cannot be read", "scripts/make_sample.py")


def test_load_dataset_limits_an_empty_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sample.parquet"
    pq.write_table(sample_table(), file)
    monkeypatch.setattr(module, "SAMPLE_FILE", file)
    dataset_error(lambda: load_dataset(DataOptions()), "the validation split is empty", "add images")


# --- fashion-mnist


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network\nin tests")

    monkeypatch.setattr(FashionMNIST, "download", refuse)
    monkeypatch.setattr(CIFAR10, "download", refuse)


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


# --- cifar10


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
