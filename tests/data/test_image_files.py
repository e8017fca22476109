"""Images in files are those in memory, and are read once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataset_errors import dataset_error
from made_datasets import CLASSES, KINDS, in_files, in_memory, make, pictures, png, table

from gross_ray.data import reading
from gross_ray.data.identity import SPLITS, identity_of
from gross_ray.data.image_files import ImageFiles, all_files
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import DataOptions


def assert_same(files: Splits, memory: Splits) -> None:
    """Assert that splits in files and in memory have the same images, labels, classes and notes."""
    for split in SPLITS:
        of_file, resident = (getattr(splits, split) for splits in (files, memory))
        assert of_file.mapped is not None and resident.mapped is None
        assert torch.equal(of_file.images, resident.images)
        assert torch.equal(of_file.stored, resident.stored)
        assert torch.equal(of_file.labels, resident.labels)
        assert of_file.normalisation == resident.normalisation
    assert identity_of(files) == identity_of(memory)
    assert (files.name, files.classes, files.notes) == (memory.name, memory.classes, memory.notes)
    assert files.sizes == memory.sizes


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in this process: forking others takes time."""
    monkeypatch.setattr(reading, "processes", lambda: 0)


THREE = {"train": pictures(0, 40), "validation": pictures(40, 20), "test": pictures(60, 20)}
TWO = {"train": pictures(0, 40), "test": pictures(60, 20)}
SIZES = ((6, 5), (30, 11), (9, 40), (8, 8))
MIXED = {"train": pictures(0, 40, sizes=SIZES), "test": pictures(60, 20, sizes=SIZES)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("splits", "options"),
    [
        (THREE, {}),
        (TWO, {"channels": 1, "mean": (0.3,), "std": (0.2,)}),
        (TWO, {"validation_from": "test"}),
        (THREE, {"validation_from": "test", "limit_train": 7, "limit_validation": 3, "limit_test": 1}),
        (MIXED, {"image_size": "8"}),
        (MIXED, {"image_size": "6x8", "resize": 9, "channels": 1}),
        ({"train": TWO["train"], "test": TWO["train"][:9]}, {}),
    ],
    ids=["three splits", "grey", "on test", "limits", "resized", "resized, grey", "repeated"],
)
def test_images_in_files_are_those_in_memory(
    kind: str, splits: Any, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    name = make(kind, splits, tmp_path / "source", monkeypatch)
    memory = in_memory(name, **options)
    for _ in range(2):  # just read, and found
        assert_same(in_files(name, tmp_path, **options), memory)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_on_all_cores_read_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "processes", lambda: 2)
    name = make(kind, MIXED, tmp_path / "source", monkeypatch)
    done: list[tuple[int, int]] = []
    options = DataOptions(name=name, memory=1, image_size="8")
    files = load_dataset(options, root=tmp_path, progress=lambda *progress: done.append(progress))
    assert_same(files, in_memory(name, image_size="8"))
    assert [total for _, total in done] == [60] * len(done)
    assert sorted(read for read, _ in done) == [read for read, _ in done]
    assert done[-1] == (60, 60)


@pytest.mark.parametrize("kind", ["folder", "parquet", "hf"])
@pytest.mark.parametrize("damaged", [[3], [0, 1, 2, 12, 39, 40, 59], [*range(20)]])
def test_damaged_images_are_passed_over_in_files_as_in_memory(
    kind: str, damaged: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    images = pictures(0, 60)
    whole = [image for i, image in enumerate(images) if i not in damaged]
    for i in damaged:
        images[i] = (images[i][0][:70], images[i][1])
    name = make(kind, {"train": images[:40], "test": images[40:]}, tmp_path / "source", monkeypatch)
    memory = in_memory(name, skip_damaged=True)
    assert any(f"{len(damaged)} damaged (" in note for note in memory.notes)
    for _ in range(2):
        assert_same(in_files(name, tmp_path, skip_damaged=True), memory)
    rest = sum(i not in damaged for i in range(40))
    without = make(kind, {"train": whole[:rest], "test": whole[rest:]}, tmp_path / "whole", monkeypatch)
    assert identity_of(in_memory(without)) == identity_of(memory)


@pytest.mark.parametrize("kind", ["folder", "parquet", "hf"])
def test_a_damaged_image_is_one_line_and_nothing_is_complete(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures()
    images[25] = (b"no image", 1)
    name = make(kind, {"train": images}, tmp_path / "source", monkeypatch)
    dataset_error(lambda: in_files(name, tmp_path), name, "cannot be read (UnidentifiedImageError", "data.skip_damaged")
    (files,) = all_files(str(tmp_path))
    assert files.description() is None and not files.complete() and not files.verify()


def test_an_image_of_another_size_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None) -> None:
    name = make("folder", {"train": [*pictures(0, 12), (png(1, (7, 5)), 0)]}, tmp_path / "source", monkeypatch)
    complaint = "has 7x5 pixels (height x width), the first image 6x5; set the size to which all are resized, like "
    dataset_error(lambda: in_files(name, tmp_path), "012.png", complaint)
    dataset_error(lambda: in_memory(name), "012.png", complaint)


@pytest.mark.parametrize("kind", KINDS)
def test_few_images_leave_no_split_empty_or_are_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    for number, splits in enumerate(({"train": pictures(0, 3)}, {"train": pictures(0, 9), "test": pictures(9, 1)})):
        if kind == "function":
            splits = {"train": pictures(0, 2), "test": pictures(9, 1)}
        name = make(kind, splits, tmp_path / f"source{number}", monkeypatch)
        for load in (in_memory, lambda name, **options: in_files(name, tmp_path, **options)):
            dataset_error(
                lambda load=load, name=name: load(name, validation_from="test"),
                "too few images, the ",
                "split is empty",
            )


# --- the files


def files_of(splits: Splits, root: Path) -> ImageFiles:
    assert splits.train.mapped is not None
    return ImageFiles(str(root), splits.train.mapped.key)


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None) -> tuple[str, Splits]:
    """A folder of images, and its splits in files."""
    name = make("folder", MIXED, tmp_path / "source", monkeypatch)
    return name, in_files(name, tmp_path, image_size="8")


def test_files_are_plain_pixels(loaded: tuple[str, Splits], tmp_path: Path) -> None:
    files = files_of(loaded[1], tmp_path)
    assert sorted(path.name for path in files.folder.iterdir()) == ["complete.json"] + sorted(
        f"{split}.u8" for split in SPLITS
    )
    for split in SPLITS:
        images: ImageSet = getattr(loaded[1], split)
        plain = np.memmap(files.folder / f"{split}.u8", np.uint8, "r").reshape(len(images), 3, 9, 9)
        assert np.array_equal(plain, images.stored.numpy())


def test_images_are_read_once(loaded: tuple[str, Splits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_again(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(reading.Reader, "read", read_again)
    monkeypatch.setattr(reading, "decoded", read_again)
    again = in_files(loaded[0], tmp_path, image_size="8")
    assert identity_of(again) == identity_of(loaded[1])
    assert again.train.mapped == loaded[1].train.mapped
    before = int(again.train.stored[0, 0, 0, 0])
    flip(files_of(again, tmp_path).folder / "train.u8", 0, keep_time=True)
    assert int(again.train.stored[0, 0, 0, 0]) == before ^ 1  # the memory of the file, not a copy
    with pytest.raises(AssertionError, match="read again"):
        in_files(loaded[0], tmp_path, image_size="9")


def flip(path: Path, position: int, *, keep_time: bool) -> None:
    """Change one bit of a file in place."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_time else 10**9)))


@pytest.mark.parametrize("split", SPLITS)
def test_changed_pixels_are_found_and_read_again(split: str, loaded: tuple[str, Splits], tmp_path: Path) -> None:
    name, splits = loaded
    files, expected = files_of(splits, tmp_path), identity_of(in_memory(name, image_size="8"))
    assert files.verify() and files.complete()
    flip(files.folder / f"{split}.u8", 17, keep_time=True)
    assert not files.verify()
    assert files.complete()  # which only looks at sizes and times
    flip(files.folder / f"{split}.u8", 18, keep_time=False)
    assert not files.complete()
    again = in_files(name, tmp_path, image_size="8")
    assert identity_of(again) == expected
    assert torch.equal(getattr(again, split).stored, getattr(in_memory(name, image_size="8"), split).stored)
    assert files.verify()


@pytest.mark.parametrize("split", SPLITS)
def test_a_file_that_is_missing_or_cut_off_is_read_again(
    split: str, loaded: tuple[str, Splits], tmp_path: Path
) -> None:
    name, splits = loaded
    files, expected = files_of(splits, tmp_path), identity_of(splits)
    for spoil in (Path.unlink, lambda path: os.truncate(path, 100)):
        spoil(files.folder / f"{split}.u8")
        assert not files.verify()
        assert identity_of(in_files(name, tmp_path, image_size="8")) == expected
        assert files.verify()


def test_files_that_were_only_touched_are_accepted(
    loaded: tuple[str, Splits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, verified = files_of(loaded[1], tmp_path), []
    verify = ImageFiles.verify
    monkeypatch.setattr(ImageFiles, "verify", lambda files: verified.append(files) or verify(files))
    for split in SPLITS:
        os.utime(files.folder / f"{split}.u8", ns=(1, 1))
    assert files.complete() and files.complete()
    assert verified == [files]  # the first time only: the new times are stored


def test_files_with_a_damaged_description_are_read_again(loaded: tuple[str, Splits], tmp_path: Path) -> None:
    files, before = files_of(loaded[1], tmp_path), identity_of(loaded[1])
    (files.folder / "complete.json").write_text("{")
    assert not files.complete()
    assert identity_of(in_files(loaded[0], tmp_path, image_size="8")) == before
    assert files.complete()


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": "9"},
        {"image_size": "8", "resize": 10},
        {"image_size": "8", "channels": 1},
        {"image_size": "8", "validation_from": "test"},
        {"image_size": "8", "skip_damaged": True},
    ],
)
def test_other_options_have_other_files(loaded: tuple[str, Splits], tmp_path: Path, change: Any) -> None:
    other = in_files(loaded[0], tmp_path, **change)
    assert files_of(other, tmp_path).key != files_of(loaded[1], tmp_path).key
    assert_same(other, in_memory(loaded[0], **change))


def test_what_images_do_not_depend_on_has_the_same_files(loaded: tuple[str, Splits], tmp_path: Path) -> None:
    name, splits = loaded
    same = in_files(name, tmp_path, image_size="8", limit_train=5, mean=(0.1, 0.2, 0.3))
    assert files_of(same, tmp_path) == files_of(splits, tmp_path)
    assert len(same.train) == 5


@pytest.mark.parametrize("change", ["changed", "added", "removed", "renamed", "Pillow"])
def test_another_source_has_other_files(
    change: str, loaded: tuple[str, Splits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, splits = loaded
    file = tmp_path / "source" / "test" / CLASSES[0] / "000.png"
    if change == "changed":
        file.write_bytes(png(999, (8, 8)))
    elif change == "added":
        file.with_name("new.png").write_bytes(png(999))
    elif change == "removed":
        file.unlink()
    elif change == "renamed":
        file.rename(file.with_name("zzz.png"))
    else:
        monkeypatch.setattr(PIL, "__version__", "0.0")
    other = in_files(name, tmp_path, image_size="8")
    assert files_of(other, tmp_path) != files_of(splits, tmp_path)
    assert_same(other, in_memory(name, image_size="8"))


@pytest.mark.parametrize("kind", ["parquet", "hf", "function"])
def test_another_table_or_function_has_other_files(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    keys = set()
    for number, images in enumerate((pictures(0, 24), pictures(0, 21), pictures(1, 24), pictures(100, 24))):
        name = make(kind, {"train": images, "test": TWO["test"]}, tmp_path / "source", monkeypatch)
        splits = in_files(name, tmp_path)
        assert_same(splits, in_memory(name))
        keys.add(files_of(splits, tmp_path).key)
        assert len(keys) == number + 1


def test_another_column_has_other_files(tmp_path: Path, here: None) -> None:
    one, other = table(pictures(0, 24)), table(pictures(100, 24))
    labels = pa.array(CLASSES * 4 + CLASSES[::-1] * 4)
    made = one.append_column("mask", other.column("image")).append_column("kind", labels)
    pq.write_table(made, tmp_path / "all.parquet")
    keys = set()
    for image in ("image", "mask"):
        for label in ("label", "kind"):
            columns = {"image_column": image, "label_column": label}
            splits = in_files(f"parquet:{tmp_path / 'all.parquet'}", tmp_path, **columns)
            assert_same(splits, in_memory(splits.name, **columns))
            keys.add(files_of(splits, tmp_path).key)
    assert len(keys) == 4


def test_the_description_is_plain(loaded: tuple[str, Splits], tmp_path: Path) -> None:
    files = files_of(loaded[1], tmp_path)
    described = json.loads((files.folder / "complete.json").read_text())
    assert described["splits"]["test"]["labels"] == loaded[1].test.labels.tolist()
    assert files.progress() == (loaded[0], 60, 60)
    assert files.hashes() == {split: getattr(identity_of(loaded[1]), split).hash for split in SPLITS}
    assert all_files(str(tmp_path)) == [files]


# --- where files cannot be written


def test_a_disk_without_room_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    name = make("folder", TWO, tmp_path / "source", monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=60 * 90 - 1))
    dataset_error(
        lambda: in_files(name, tmp_path / "root"), "the images take 0.0 GB, and only 0.0 GB are free", "--data-root"
    )
    assert [path.name for path in (tmp_path / "root" / "images").iterdir() if path.is_dir()] == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=60 * 90))
    assert in_files(name, tmp_path / "root").train.mapped is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_root_that_is_no_folder_is_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    name = make(kind, TWO, tmp_path / "source", monkeypatch)
    (tmp_path / "root").write_text("")
    dataset_error(
        lambda: in_files(name, tmp_path / "root"), str(tmp_path / "root"), "name another folder with --data-root"
    )


def test_what_needs_no_image_is_refused_before_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = make("folder", TWO, tmp_path / "source", monkeypatch)
    monkeypatch.setattr(reading.Reader, "on_all_cores", lambda *_: pytest.fail("images are read"))
    with pytest.raises(InvalidValueError, match=r"data.limit_test = 21: the test split of .* has 20 images"):
        in_files(name, tmp_path, limit_test=21)


def test_changed_files_are_read_again_with_a_note(
    loaded: tuple[str, Splits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    files, notes = files_of(loaded[1], tmp_path), list[str]()
    (files.folder / "train.u8").write_bytes(bytes((files.folder / "train.u8").stat().st_size))
    options = DataOptions(name=loaded[0], memory=1, image_size="8")
    assert identity_of(load_dataset(options, root=tmp_path, note=notes.append)) == identity_of(loaded[1])
    assert notes == [f"the files in {files.folder} have changed, so the images are read again"]


def test_enlarged_images_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = make("folder", MIXED, tmp_path / "source", monkeypatch)
    notes = in_memory(name, image_size="8", resize=8).notes
    assert "resized 45 images to 8x8 pixels; 15 of them were smaller" in notes  # those of 6x5 pixels
