"""Parquet files in the layout of Hugging Face's hub, and datasets of the library `datasets`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_datasets import HubDataset
from PIL import Image

from gross_ray.data.identity import identity_of
from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import DatasetError
from gross_ray.experiment import DataOptions, Experiment

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PIXELS = np.random.default_rng(0).integers(0, 256, (90, 4, 5, 3), dtype=np.uint8)
NAMES = ["ant", "bee", "cow"]


def png(number: int) -> bytes:
    file = BytesIO()
    Image.fromarray(PIXELS[number]).save(file, "PNG")
    return file.getvalue()


def table(
    labels: Sequence[Any],
    first: int = 0,
    *,
    names: list[str] | None = None,
    kind: pa.DataType | None = None,
    **more: Any,
) -> pa.Table:
    """Return the images from `first` on with these labels."""
    images = [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(len(labels))]
    made = pa.table({"image": pa.array(images, IMAGE), "label": pa.array(labels, kind), **more})
    if names is None:
        return made
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path: Path, found: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(found, path)
    return path


def load(path: Path, **options: Any) -> Splits:
    return load_dataset(DataOptions(name=f"parquet:{path}", **options))


def refused(path: Path, complaint: str, **options: Any) -> None:
    with pytest.raises(DatasetError, match=re.escape(complaint)) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)


def classes_of(splits: Splits) -> dict[int, str]:
    """Return the name of the class of each image, by its number in PIXELS."""
    number = {image.transpose(2, 0, 1).tobytes(): i for i, image in enumerate(PIXELS)}
    return {
        number[image.numpy().tobytes()]: splits.classes[label]
        for part in (splits.train, splits.validation, splits.test)
        for image, label in zip(part.images, part.labels.tolist(), strict=True)
    }


LABELS = [i % 3 for i in range(30)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["train-00000-of-00002", "train-00001-of-00002"], ["test-00000-of-00001"]),
        (["data/train-00000-of-00001-ab12"], ["data/test-00000-of-00001"]),
        (["default/train/0000", "default/train/0001"], ["default/test/0000"]),
        (["mine_Train"], ["mine_Test"]),
    ],
)
def test_splits_are_found_by_the_names_of_files_and_folders(train: list[str], test: list[str], tmp_path: Path) -> None:
    each = len(LABELS) // len(train)
    for i, name in enumerate(train):
        write(tmp_path / f"{name}.parquet", table(LABELS[i * each : (i + 1) * each], i * each, names=NAMES))
    write(tmp_path / f"{test[0]}.parquet", table(LABELS, 30, names=NAMES))
    write(tmp_path / ".cache" / "train.parquet", table(LABELS))
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (24, 6, 30)
    assert splits.classes == tuple(NAMES)
    assert classes_of(splits) == {i: NAMES[i % 3] for i in range(60)}
    assert splits.notes[0] == "images: column image; classes: column label, named by the metadata: ant, bee, cow"


def test_a_file_alone_and_files_without_splits_are_split_in_three(tmp_path: Path) -> None:
    one = load(write(tmp_path / "one" / "flowers.parquet", table(LABELS)))
    assert (len(one.train), len(one.validation), len(one.test)) == (18, 6, 6)
    write(tmp_path / "two" / "0.parquet", table(LABELS[:15]))
    write(tmp_path / "two" / "1.parquet", table(LABELS[15:], 15))
    assert identity_of(load(tmp_path / "two")) == identity_of(one)


def test_other_files_and_several_datasets(tmp_path: Path) -> None:
    write(tmp_path / "small" / "train.parquet", table(LABELS))
    write(tmp_path / "small" / "unsupervised.parquet", table(LABELS))
    assert load(tmp_path).notes[-1] == (
        f"passed over files that have the name of no split: {Path('small/unsupervised.parquet')}"
    )
    write(tmp_path / "large" / "train.parquet", table(LABELS))
    refused(tmp_path, f"{tmp_path} has several datasets: large, small; name the folder of one of them")
    write(tmp_path / "small" / "val.parquet", table(LABELS))
    write(tmp_path / "small" / "valid.parquet", table(LABELS))
    refused(tmp_path / "small", "val and valid are each the validation split; keep one of them")
    refused(tmp_path / "none", "there is no Parquet file in")
    write(tmp_path / "half" / "test.parquet", table(LABELS))
    refused(tmp_path / "half", "has test, and no train, from which networks learn; add it")


@given(
    labels=st.one_of(
        st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=5, unique=True),
        st.lists(st.text(max_size=4), min_size=2, max_size=5, unique=True),
        st.just([False, True]),
        st.sampled_from([np.int8, np.uint16, np.int32, np.uint64]).map(lambda kind: [*np.array([1, 3, 9], kind)]),
    )
)
@settings(max_examples=30, deadline=None)
def test_labels_without_names_are_classes_in_sorted_order(
    labels: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("labels")
    of_images = [labels[i % len(labels)] for i in range(6 * len(labels))]
    splits = load(write(path / "all.parquet", table(of_images)))
    assert splits.classes == tuple(map(str, sorted(labels)))
    assert classes_of(splits) == {i: str(label) for i, label in enumerate(of_images)}
    assert splits.notes[0].startswith("images: column image; classes: column label, its values, sorted: ")


def test_labels_of_a_dictionary(tmp_path: Path) -> None:
    labels = pa.array(["b", "a"] * 10).dictionary_encode()
    splits = load(write(tmp_path / "all.parquet", table(LABELS[:20]).set_column(1, "label", labels)))
    assert splits.classes == ("a", "b")


def test_a_class_that_is_named_is_kept_without_images(tmp_path: Path) -> None:
    splits = load(write(tmp_path / "all.parquet", table([0, 2] * 10, names=NAMES)))
    assert splits.classes == tuple(NAMES)
    assert "all.parquet has no image of bee" in splits.notes
    for wrong in (-1, 3):
        path = write(tmp_path / "wrong" / "all.parquet", table([0, 1, wrong] * 5, names=NAMES))
        refused(path, f"the train split has the label {wrong}, and the classes with names are 0 to 2; name all classes")


def test_columns_are_found_by_type_or_chosen(tmp_path: Path) -> None:
    plain = table(LABELS).drop_columns("image").append_column("photo", pa.array([png(i) for i in range(30)]))
    expected = identity_of(load(write(tmp_path / "a.parquet", table(LABELS))))
    assert identity_of(load(write(tmp_path / "b.parquet", plain.rename_columns(["kind", "photo"])))) == expected
    more = plain.append_column("number", pa.array(range(30))).append_column("mask", pa.array([png(0)] * 30))
    path = write(tmp_path / "c.parquet", more.rename_columns(["kind", "photo", "number", "mask"]))
    refused(
        path, "2 columns may be the images: kind (int64), photo (binary), number (int64), mask (binary); images are"
    )
    refused(path, "2 columns may be the classes: kind (int64), photo", image_column="photo")
    assert identity_of(load(path, image_column="photo", label_column="kind")) == expected
    refused(path, "there is no column data.image_column = 'x'; known columns: kind (int64)", image_column="x")
    refused(path, "there is no column data.label_column = 'x'; known", image_column="photo", label_column="x")
    refused(path, "data.image_column = 'kind' is of type int64; images are encoded files", image_column="kind")
    assert identity_of(load(write(tmp_path / "d.parquet", table(LABELS, index=range(30))))) == expected


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ([[0, 1]] * 20, "the column label has lists of labels (multi-label); a class is one whole number or text"),
        ([0.5, 1.5] * 10, "the column label has numbers with a fraction (regression); a class is one"),
        ([b"a", b"b"] * 10, "the column label has values of type binary; a class is one"),
        ([0, None] * 10, "all.parquet: 10 rows have no label; remove them"),
        ([7] * 20, "all images are of one class, 7; two or more are needed"),
        ([], "all.parquet has no images; add some, or remove it"),
    ],
)
def test_labels_that_are_no_classes(labels: list[Any], complaint: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "all.parquet", table(labels, kind=None if labels else pa.int64())), complaint)


def test_no_column_of_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "all.parquet", table(LABELS).drop_columns("label"))
    refused(path, "0 columns may be the classes: image (struct<bytes: binary, path: string>); choose one with")


def test_splits_of_different_columns(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", table(LABELS))
    write(tmp_path / "test.parquet", table([str(label) for label in LABELS]))
    refused(tmp_path, "test has no column label of the same type as train; its columns: image (struct<")
    write(tmp_path / "train-1.parquet", table([str(label) for label in LABELS]))
    refused(tmp_path, "the columns of")


def test_damaged_images_and_images_without_bytes(tmp_path: Path) -> None:
    images = [{"bytes": png(i), "path": None} for i in range(20)]
    images[3], images[7] = {"bytes": b"no image", "path": None}, {"bytes": None, "path": None}
    (tmp_path / "8.png").write_bytes(png(8))
    images[8] = {"bytes": None, "path": str(tmp_path / "8.png")}
    made = pa.table({"image": pa.array(images, IMAGE), "label": [0, 1] * 10})
    path = write(tmp_path / "all.parquet", made)
    refused(path, f"{path}, row 3 cannot be read (UnidentifiedImageError: ")
    splits = load(path, skip_damaged=True)
    assert (
        splits.notes[1]
        == f"read 18 images of 2 classes; passed over 2 images: 2 damaged ({path}, row 3, {path}, row 7)"
    )
    assert classes_of(splits) == {i: str(i % 2) for i in range(20) if i not in (3, 7)}


def test_damaged_files(tmp_path: Path) -> None:
    path = write(tmp_path / "all.parquet", table(LABELS))
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-9], whole[:200] + bytes(200) + whole[400:]):
        path.write_bytes(content)
        refused(path, f"{path}")


def test_a_folder_parquet_and_a_function_have_equal_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = []
    for first, split in ((0, "train"), (30, "test")):
        labels = sorted(LABELS)
        write(tmp_path / "parquet" / f"{split}.parquet", table(labels, first, names=NAMES))
        for i, label in enumerate(labels):
            folder = tmp_path / "folder" / split / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:03}.png").write_bytes(png(first + i))
        sets.append([(Image.fromarray(PIXELS[first + i]), label) for i, label in enumerate(labels)])

    class Own(list):  # type: ignore[type-arg]
        classes = NAMES

    module = ModuleType("equal_pictures")
    module.pictures = lambda: tuple(map(Own, sets))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "equal_pictures", module)
    folder, parquet = load_dataset(DataOptions(name=f"folder:{tmp_path / 'folder'}")), load(tmp_path / "parquet")
    own = load_dataset(DataOptions(name="equal_pictures:pictures"))
    assert identity_of(folder) == identity_of(parquet) == identity_of(own)
    assert folder.notes == own.notes != parquet.notes  # which no hash depends on
    assert torch.equal(folder.train.images, own.train.images)
    one, other = (Experiment(data=DataOptions(name=name)) for name in ("folder:a", "parquet:b"))
    assert one.fingerprint(data="x") == other.fingerprint(data="x") != other.fingerprint(data="y")
    assert one.differences(other) == []


# --- the library datasets


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_dataset_of_the_hub(library: ModuleType, tmp_path: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    def load_one(name: str, config: str | None) -> dict[str, HubDataset]:
        asked.append((name, config))
        return {
            "test": HubDataset(table(LABELS, 30, names=NAMES)),
            "train": HubDataset(table(LABELS, names=NAMES)),
            "extra": HubDataset(table(LABELS)),
        }

    library.load_dataset = load_one  # type: ignore[attr-defined]
    splits = load_dataset(DataOptions(name="hf:me/insects@small"))
    load_dataset(DataOptions(name="hf:me/insects"))
    assert asked == [("me/insects", "small"), ("me/insects", None)]
    assert splits.notes[-1] == "passed over splits: extra"
    for split, first in (("train", 0), ("test", 30)):
        write(tmp_path / f"{split}.parquet", table(LABELS, first, names=NAMES))
    assert identity_of(splits) == identity_of(load(tmp_path))
    library.load_dataset = lambda *_: {"full": HubDataset(table(LABELS))}  # type: ignore[attr-defined]
    assert len(load_dataset(DataOptions(name="hf:me/insects")).train) == 18


def test_the_library_fails_or_is_missing(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_one(*_: object) -> None:
        raise ConnectionError("no network\nhere")

    library.load_dataset = load_one  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match=r"hf:x: cannot be loaded \(ConnectionError: no network here\); check its"):
        load_dataset(DataOptions(name="hf:x"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"hf:x: needs the library datasets \(.*\); pip install datasets"):
        load_dataset(DataOptions(name="hf:x"))
