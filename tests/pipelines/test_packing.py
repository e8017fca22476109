"""Images on their way to workers: the same ones arrive, from arrays, from files, and where files have to be made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gross_ray.data import reading
from gross_ray.data.identity import SPLITS, identity_of
from gross_ray.data.image_files import ImageFiles
from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import DatasetError
from gross_ray.experiment import DataOptions
from pipelines.packing import Fetch, PackedSplits, pack_splits, unpack_splits


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in this process: forking others takes time."""
    monkeypatch.setattr(reading, "processes", lambda: 0)


@pytest.fixture
def options(tmp_path: Path) -> DataOptions:
    """A folder of images that memory does not hold."""
    generator = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "source" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (9, 9 + number % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return DataOptions(
        name=f"folder:{tmp_path / 'source'}", image_size="6", memory=1, limit_train=15, mean=(0.1, 0.2, 0.3)
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def assert_equal(unpacked: Splits, splits: Splits) -> None:
    assert (unpacked.name, unpacked.classes, unpacked.sizes) == (splits.name, splits.classes, splits.sizes)
    assert identity_of(unpacked) == identity_of(splits)
    for split in SPLITS:
        one, other = getattr(unpacked, split), getattr(splits, split)
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.stored, other.stored) and (one.wider is None) == (other.wider is None)
        assert (one.normalisation, one.memory_format) == (other.normalisation, other.memory_format)
        batches = zip(one.batches(4, wider=True), other.batches(4, wider=True), strict=True)
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in batches)


def moved(packed: PackedSplits, root: Path) -> PackedSplits:
    """Return the same images on another machine: with another root of files."""
    parts = {}
    for split, part in packed.splits.items():
        assert part.mapped is not None
        parts[split] = replace(part, mapped=replace(part.mapped, root=str(root)))
    return replace(packed, splits=parts)


def copying(source: ImageFiles) -> Fetch:
    return lambda files: shutil.copytree(source.folder, files.folder, dirs_exist_ok=True) and None


def refused(act: Callable[[], object], *parts: str) -> None:
    with pytest.raises(DatasetError) as caught:
        act()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def files_of(splits: Splits) -> ImageFiles:
    assert splits.train.mapped is not None
    return ImageFiles(splits.train.mapped.root, splits.train.mapped.key)


@pytest.mark.parametrize("room", [None, 10**9, 1])
@pytest.mark.parametrize("change", [{}, {"channels": 1, "mean": (0.4,)}, {"resize": 6}])
def test_arrays_arrive_as_they_are(options: DataOptions, room: int | None, change: dict[str, object]) -> None:
    splits = load_dataset(replace(options, memory=2**40, **change))  # type: ignore[arg-type]
    packed = pack_splits(splits)
    assert all(isinstance(part.stored, np.ndarray) and part.mapped is None for part in packed.splits.values())
    unpacked = unpack_splits(packed, "cpu", room)
    assert_equal(unpacked, splits)
    assert (unpacked.train.streamed_to is None) == (room != 1)  # what is larger than the room is streamed


@pytest.mark.parametrize("change", [{}, {"channels": 1, "mean": (0.4,)}, {"resize": 6}, {"limit_train": 0}])
def test_files_arrive_by_name_and_are_streamed(
    options: DataOptions, root: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, **change)  # type: ignore[arg-type]
    splits = load_dataset(options, root=root)
    packed = pack_splits(splits, options)
    for part in packed.splits.values():
        assert part.stored is None and len(part.rest) == 0
        assert part.rest.stored.untyped_storage().nbytes() == 0  # what is pickled has no image
    monkeypatch.setattr(reading.Reader, "read", lambda *_: pytest.fail("read again"))
    unpacked = unpack_splits(packed, "cpu")
    assert_equal(unpacked, splits)
    assert all(getattr(unpacked, split).streamed_to == torch.device("cpu") for split in SPLITS)


def test_splits_some_of_which_are_in_files(options: DataOptions, root: Path) -> None:
    splits = load_dataset(options, root=root)
    mixed = replace(splits, test=splits.test.part(torch.tensor([3, 1])))
    packed = pack_splits(mixed, options)
    assert packed.splits["test"].stored is not None and packed.splits["train"].stored is None
    assert_equal(unpack_splits(packed, "cpu"), mixed)


@pytest.mark.parametrize("absent", ["another root", "deleted", "half", "changed"])
def test_a_machine_without_the_files_makes_them(options: DataOptions, root: Path, tmp_path: Path, absent: str) -> None:
    splits = load_dataset(options, root=root)
    packed, resident = pack_splits(splits, options), load_dataset(replace(options, memory=2**40))
    files = files_of(splits)
    if absent == "another root":
        packed = moved(packed, tmp_path / "other")
        files = ImageFiles(str(tmp_path / "other"), files.key)
    elif absent == "deleted":
        shutil.rmtree(files.folder)
    elif absent == "half":
        (files.folder / "complete.json").unlink()
    else:
        (files.folder / "test.u8").write_bytes(bytes((files.folder / "test.u8").stat().st_size))
    assert_equal(unpack_splits(packed, "cpu"), resident)  # without `fetch`
    assert files.verify()


def test_a_machine_with_much_memory_makes_files_too(options: DataOptions, root: Path, tmp_path: Path) -> None:
    options = replace(options, memory=0)
    splits = load_dataset(replace(options, memory=1), root=root)
    packed = moved(pack_splits(splits, options), tmp_path / "other")
    assert_equal(unpack_splits(packed, "cpu"), splits)
    assert ImageFiles(str(tmp_path / "other"), files_of(splits).key).verify()


@pytest.mark.parametrize("source", ["gone", "other"])
def test_files_are_fetched_where_the_source_is_missing_or_other(
    options: DataOptions, root: Path, tmp_path: Path, source: str
) -> None:
    splits = load_dataset(options, root=root)
    files, packed = files_of(splits), moved(pack_splits(splits, options), tmp_path / "other")
    if source == "gone":
        shutil.rmtree(tmp_path / "source")
        why = "there is no folder"
    else:  # as if another decoder gave other pixels
        Image.new("RGB", (9, 9)).save(tmp_path / "source" / "a" / "00.png")
        why = "other images are decoded there"
    here = f"{tmp_path / 'other' / 'images' / files.key}: there are no files of this run's images ("
    refused(lambda: unpack_splits(packed, "cpu"), here, why, "load the dataset there")

    def wrong(to: ImageFiles) -> None:
        copying(files)(to)
        content = bytearray((to.folder / "test.u8").read_bytes())
        content[5] ^= 1
        (to.folder / "test.u8").write_bytes(content)

    def nothing(_: ImageFiles) -> None:
        pass

    for fetch in (nothing, wrong):
        refused(
            lambda fetch=fetch: unpack_splits(packed, "cpu", None, fetch),
            "the files that were copied have other images",
        )  # type: ignore[misc]
    fetched = []

    def fetch(to: ImageFiles) -> None:
        fetched.append(to)
        copying(files)(to)

    for _ in range(2):
        assert_equal(unpack_splits(packed, "cpu", None, fetch), splits)
    assert fetched == [ImageFiles(str(tmp_path / "other"), files.key)]  # once


def test_a_root_in_the_current_folder_is_found_from_others(
    options: DataOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "other", "home"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    splits, at_home = (load_dataset(options, root=root) for root in ("root", "~/root"))
    packed = pack_splits(splits, options)
    monkeypatch.chdir(tmp_path / "other")
    shutil.rmtree(tmp_path / "source")
    assert_equal(unpack_splits(packed, "cpu"), splits)
    assert files_of(at_home).root == "~/root"  # the home of each machine
    assert files_of(at_home).folder.is_relative_to(tmp_path / "home")
