import json
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataset_errors import dataset_error
from PIL import Image
from split_assertions import assert_equal, assert_well_formed, keys, sizes
from torchvision.datasets import FashionMNIST

from gross_ray.data import images
from gross_ray.data import sample as module
from gross_ray.data.fashion_mnist import DEBIAN_FOLDER
from gross_ray.data.identity import SPLITS
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.images import load_dataset
from gross_ray.data.sample import SAMPLE_FILE, read_sample
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import DataOptions


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
    monkeypatch.setattr(images, "SAMPLE_FILE", file)
    dataset_error(lambda: load_dataset(DataOptions()), "the validation split is empty", "add images")
