"""Folders of images, as the tools that people use leave them."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_errors import dataset_error
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gross_ray.data.identity import identity_of
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import DataOptions

SPLITS = ("train", "validation", "test")


def sizes(splits: Splits) -> tuple[int, ...]:
    return tuple(len(getattr(splits, split)) for split in SPLITS)


def keys(images: ImageSet) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.images]


def assert_well_formed(splits: Splits, size: tuple[int, int]) -> None:
    for split in SPLITS:
        images: ImageSet = getattr(splits, split)
        assert images.images.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert images.images.shape == (len(images.labels), 3, *size)
        assert images.images.is_contiguous()
        counts = torch.nn.functional.one_hot(images.labels, len(splits.classes)).cumsum(0)
        assert (counts.max(1).values - counts.min(1).values).max() <= 1  # every prefix is balanced


def write_classes(folder: Path, num_images: int, *, classes: tuple[str, ...] = ("cat", "dog", "emu")) -> Path:
    """Write grey PNGs whose rows hold the label, the number of the image and the length of the folder's name."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(num_images):
            pixels = np.repeat(np.array([[label], [i], [len(folder.name)]], np.uint8), 5, axis=1)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    return folder


def flat_folder(tmp_path: Path) -> Path:
    return write_classes(tmp_path / "flat", 10)


def load_folder(path: Path, **options: object) -> Splits:
    return load_dataset(DataOptions(name=f"folder:{path}", **options))


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ((), "9f50ecad2029a341399f5568337317c2ae1bcadcbbffaef1756160a86cbf854f"),
        (("train", "test"), "59f7c8806c4f464ac0b7afc3e9910d2e17fc2ebe5512247a97246a4edd1f6a12"),
        (("train", "val", "test"), "7e74eb6a79fa617cf7b349fe67bec1b2f15a9ab9714c60de272fed6134e04a39"),
        (("train", "validation", "test"), "7e74eb6a79fa617cf7b349fe67bec1b2f15a9ab9714c60de272fed6134e04a39"),
    ],
)
def test_folders_that_older_versions_read_have_the_same_hashes(
    splits: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    for number, split in enumerate(splits or ("",)):
        for label, name in enumerate(("Bee", "ant", "cow 2")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(9 - 2 * number + label):
                pixels = (np.arange(60).reshape(4, 5, 3) * (label + 2) + 7 * i + 50 * number).astype(np.uint8)
                image = Image.fromarray(pixels if label else pixels[..., 0])
                image.save(tmp_path / split / name / f"{i}.{'PNG' if i % 2 else 'png'}", "PNG")
    assert identity_of(load_folder(tmp_path)).hash == expected


def test_a_limit_above_the_split(tmp_path: Path) -> None:
    for split in SPLITS:
        with pytest.raises(InvalidValueError, match=rf"data.limit_{split} = 100: .* has (18|6) images; use at most"):
            load_folder(flat_folder(tmp_path / split), **{f"limit_{split}": 100})


def test_flat_folder_is_split(tmp_path: Path) -> None:
    path = flat_folder(tmp_path)
    (path / ".cache").mkdir()
    (path / "cat" / "notes.txt").write_text("no image")
    splits = load_folder(path)
    assert splits.name == f"folder:{path}"
    assert splits.classes == ("cat", "dog", "emu")
    assert sizes(splits) == (18, 6, 6)
    assert_well_formed(splits, (3, 5))
    found = [key for split in SPLITS for key in keys(getattr(splits, split))]
    assert len({*found}) == 30
    for split in SPLITS:
        images: ImageSet = getattr(splits, split)
        assert images.labels.bincount().tolist() == [len(images) // 3] * 3
        assert torch.equal(images.images[:, :, 0, 0], images.labels[:, None].expand(-1, 3).to(torch.uint8))
    assert identity_of(splits) == identity_of(load_folder(path))
    assert splits.notes == (
        "read 30 images of 3 classes; passed over 1 file: 1 .txt",
        "converted to 8-bit RGB: 30 grey",
        "splits: 18 train, 6 validation, 6 test; all images were split 3:1:1, because there is no other split",
    )


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev", "Val"])
def test_folder_with_splits(validation: str, tmp_path: Path) -> None:
    for name, num_images in (("train", 4), (validation, 3), ("test", 2)):
        write_classes(tmp_path / name, num_images)
    splits = load_folder(tmp_path)
    assert sizes(splits) == (12, 9, 6)
    assert_well_formed(splits, (3, 5))
    for split, name in zip(SPLITS, ("train", validation, "test"), strict=True):
        assert (getattr(splits, split).images[:, :, 2] == len(name)).all()


def test_class_called_train_is_a_class(tmp_path: Path) -> None:
    assert load_folder(write_classes(tmp_path / "vehicles", 5, classes=("car", "train"))).classes == ("car", "train")


def colours(path: Path, ending: str, count: int = 5, **options: object) -> np.ndarray:
    """Write random images of two classes, and return them, (2 count, 6, 4, 3)."""
    pixels = np.random.default_rng(0).integers(0, 256, (2 * count, 6, 4, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = path / ("left", "right")[i % 2]
        folder.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(folder / f"{i}{ending}", **options)
    return pixels


@pytest.mark.parametrize("ending", [".PNG", ".bmp", ".Tiff", ".webp", ".ppm", ".tga"])
def test_colours_survive(ending: str, tmp_path: Path) -> None:
    pixels = colours(tmp_path, ending, **({"lossless": True} if ending == ".webp" else {}))
    splits = load_folder(tmp_path)
    found = {key for split in SPLITS for key in keys(getattr(splits, split))}
    assert found == {image.transpose(2, 0, 1).tobytes() for image in pixels}


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "JPG", "jfif"])
def test_jpeg(suffix: str, tmp_path: Path) -> None:
    for label in ("left", "right"):
        (tmp_path / label).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / label / f"{i}.{suffix}", "JPEG")
    image = load_folder(tmp_path).train.images[0].int()
    assert (image - torch.tensor([200, 100, 50])[:, None, None]).abs().max() <= 3


def test_missing_folders(tmp_path: Path) -> None:
    path = tmp_path / "none"
    dataset_error(lambda: load_folder(path), f"no folder {path}", "make one folder of images a class")
    path.mkdir()
    dataset_error(lambda: load_folder(path), f"{path} has no class folders", "make one folder of images a class")


def test_without_a_test_folder_half_of_the_validation_images_are_it(tmp_path: Path) -> None:
    for name, count in (("train", 10), ("val", 4)):
        write_classes(tmp_path / name, count)
    splits = load_folder(tmp_path)
    assert sizes(splits) == (30, 6, 6)
    assert splits.notes[-1] == (
        "splits: 30 train, 6 validation, 6 test; half of val became the test split, because there is none"
    )
    assert {*keys(splits.validation), *keys(splits.test)} == {
        key for key in keys(load_folder(tmp_path / "val").train.first(0))
    } | {*keys(load_folder(tmp_path / "val").validation), *keys(load_folder(tmp_path / "val").test)}


def test_a_train_folder_alone_is_split(tmp_path: Path) -> None:
    splits = load_folder(write_classes(tmp_path / "train", 10).parent)
    assert splits.classes == ("cat", "dog", "emu")
    assert sizes(splits) == (18, 6, 6)


@pytest.mark.parametrize("names", [("test",), ("val", "Test"), ("dev",)])
def test_no_train_folder(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        write_classes(tmp_path / name, 3)
    dataset_error(lambda: load_folder(tmp_path), f"has {', '.join(reversed(names))}, and no train, from which")


def test_two_folders_of_one_split(tmp_path: Path) -> None:
    for name in ("train", "val", "Valid"):
        write_classes(tmp_path / name, 3)
    dataset_error(lambda: load_folder(tmp_path), "Valid and val are each the validation split; keep one of them")


def test_folders_beside_those_of_the_splits_are_named(tmp_path: Path) -> None:
    for name in ("train", "test", "unlabelled", ".git", "__MACOSX"):
        write_classes(tmp_path / name, 5)
    assert load_folder(tmp_path).notes[-1] == "passed over the folders beside those of the splits: unlabelled"


def test_images_are_found_at_any_depth_and_others_are_counted(tmp_path: Path) -> None:
    path = write_classes(tmp_path / "flat", 3, classes=("cat", "dog"))
    write_classes(path / "cat" / "day 2", 4, classes=("a", "b"))
    os.symlink(path / "cat", path / "cat" / "circle")
    for junk in (".DS_Store", "dog/Thumbs.db", "dog/._000.png", "dog/desktop.ini"):
        (path / junk).write_text("junk")
    for other in ("labels.csv", "cat/000.txt", "cat/day 2/1.TXT", "dog/README"):
        (path / other).write_text("no image")
    Image.new("L", (5, 3)).save(path / "cover.png")
    splits = load_folder(path)
    assert sum(sizes(splits)) == 14
    assert splits.notes[0] == (
        "read 14 images of 2 classes; passed over 5 files: 2 .txt, 1 outside of class folders, 1 .csv, "
        "1 without an ending"
    )


def test_every_image_is_counted_once_in_its_order(tmp_path: Path) -> None:
    names = ["b/1.png", "a.png", "b.png", "B.PNG", "10.png", "9.png", "b/0/2.png"]
    for label in ("x", "y"):
        for name in names:
            (tmp_path / label / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (3, 3), len(name)).save(tmp_path / label / name)
    assert sum(sizes(load_folder(tmp_path))) == 2 * len(names)


def test_without_a_validation_folder_a_fifth_of_train_is_it(tmp_path: Path) -> None:
    for name, count in (("train", 10), ("test", 3)):
        write_classes(tmp_path / name, count)
    whole = load_folder(tmp_path)
    num_classes = len(whole.classes)
    sizes = [len(part) for part in (whole.train, whole.validation, whole.test)]
    assert sizes == [8 * num_classes, 2 * num_classes, 3 * num_classes]
    assert whole.validation.labels.bincount().tolist() == [2] * num_classes


def test_an_empty_class_folder_is_no_class(tmp_path: Path) -> None:
    path = flat_folder(tmp_path)
    (path / "ant").mkdir()
    splits = load_folder(path)
    assert splits.classes == ("cat", "dog", "emu")
    assert splits.notes[-1] == "class folders without an image, which are no classes: ant"


def test_no_images_at_all(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.md").touch()
    dataset_error(
        lambda: load_folder(tmp_path), f"{tmp_path} has no images in class folders; passed over 2 files: 2 .md"
    )


def test_one_class_only(tmp_path: Path) -> None:
    write_classes(tmp_path / "flat", 3)
    dataset_error(lambda: load_folder(tmp_path), "has one class only, flat, and two or more are needed; is the dataset")
    dataset_error(lambda: load_folder(tmp_path), f"folder:{tmp_path / 'flat'}?")
    only = write_classes(tmp_path / "only", 3, classes=("cat",))
    dataset_error(lambda: load_folder(only), "has one class only, cat, and two or more are needed")


def test_an_empty_split(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        write_classes(tmp_path / name, 3)
    for file in (tmp_path / "val").rglob("*.png"):
        file.unlink()
    dataset_error(lambda: load_folder(tmp_path), "val has no images; add some, or remove it")


def test_too_few_images(tmp_path: Path) -> None:
    path = write_classes(tmp_path / "flat", 1, classes=("cat", "dog"))
    dataset_error(lambda: load_folder(path), "the test split is empty", "add images")


def test_classes_that_a_split_lacks(tmp_path: Path) -> None:
    for name, classes in (("train", ("cat", "dog")), ("validation", ("cat",)), ("test", ("cat", "dog"))):
        write_classes(tmp_path / name, 2, classes=classes)
    assert "validation has no image of dog" in load_folder(tmp_path).notes
    write_classes(tmp_path / "test", 2, classes=("emu",))
    dataset_error(lambda: load_folder(tmp_path), "test has images of emu, and train has none; add some to train")


def test_the_same_image_in_two_splits_is_counted(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        write_classes(tmp_path / name, 4)
    assert not [line for line in load_folder(tmp_path).notes if "same image" in line]
    for split, i, other in (("test", 0, "train"), ("test", 1, "train"), ("val", 3, "train"), ("test", 2, "val")):
        image = Image.open(tmp_path / other / "cat" / f"{i:03}.png")
        (tmp_path / split / "cat" / f"{i:03}.png").unlink()
        image.save(tmp_path / split / "cat" / f"{i:03}.bmp")  # equal pixels in another file
    assert load_folder(tmp_path).notes[-1] == (
        "the same image is in two splits: 1 of validation is also in train, 2 of test are also in train, "
        "1 of test is also in validation; accuracies on such images mislead"
    )


def test_images_of_two_sizes(tmp_path: Path) -> None:
    path = flat_folder(tmp_path)
    odd = path / "dog" / "004.png"
    Image.new("L", (7, 9)).save(odd)
    Image.new("L", (1, 1)).save(path / "emu" / "004.png")
    dataset_error(
        lambda: load_folder(path),
        f"{odd} has 9x7 pixels",
        "the first image 3x5",
        "set the size to which all are resized, like data.image_size=3",
    )


def test_splits_of_two_sizes(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        write_classes(tmp_path / name, 2)
    for file in (tmp_path / "test").rglob("*.png"):
        Image.new("L", (7, 9)).save(file)
    dataset_error(lambda: load_folder(tmp_path), tmp_path / "test" / "cat" / "000.png", "has 9x7 pixels", "3x5")


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "bad chunk", "huge", "float", "broken link"])
def test_a_damaged_image_stops_the_reading_or_is_passed_over(damage: str, tmp_path: Path) -> None:
    path = flat_folder(tmp_path)
    file = path / "dog" / "004.png"
    content = file.read_bytes()
    file.unlink()
    if damage == "broken link":
        file.symlink_to(tmp_path / "nowhere.png")
    elif damage == "float":
        Image.fromarray(np.full((3, 5), 0.5, np.float32)).save(file, "TIFF")
    else:
        header = b"IHDR" + struct.pack(">II", 2**15, 2**15) + content[24:29]
        contents = {
            "empty": b"",
            "text": b"no image",
            "truncated": content[:-25],
            "bad chunk": content[:36] + bytes([content[36] - 6]) + content[37:],  # a shorter IDAT: PIL's SyntaxError
            "huge": content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:],
        }
        file.write_bytes(contents[damage])
    dataset_error(
        lambda: load_folder(path), f"{file} cannot be read", "or pass over damaged images with", "skip_damaged"
    )
    splits = load_folder(path, skip_damaged=True)
    assert splits.notes[0] == f"read 29 images of 3 classes; passed over 1 file: 1 damaged ({file})"
    without = [key for split in SPLITS for key in keys(getattr(splits, split))]
    file.unlink()
    assert identity_of(load_folder(path)) == identity_of(splits)
    assert len({*without}) == 29


def test_a_class_whose_images_are_all_damaged(tmp_path: Path) -> None:
    path = write_classes(tmp_path / "two", 9, classes=("cat", "dog"))
    for file in (path / "dog").iterdir():
        file.write_bytes(b"no image")
    dataset_error(lambda: load_folder(path, skip_damaged=True), "all images are of one class, cat; two or more")
    for file in (path / "cat").iterdir():
        file.write_bytes(b"no image")
    dataset_error(lambda: load_folder(path, skip_damaged=True), "all images of two are damaged (", "and 13 more)")


@given(
    counts=st.dictionaries(
        st.text("aBc_1 ", min_size=1, max_size=3).map(str.strip).filter(bool), st.integers(5, 9), min_size=2, max_size=4
    ),
    modes=st.lists(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]), min_size=1, max_size=5),
    endings=st.lists(st.sampled_from([".png", ".PNG", ".tif", ".apng"]), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
@settings(max_examples=25, deadline=None)
def test_any_modes_endings_and_classes(
    counts: dict[str, int],
    modes: list[str],
    endings: list[str],
    size: tuple[int, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("any")
    for name, count in counts.items():
        (path / name).mkdir()
        for i in range(count):
            mode, ending = modes[i % len(modes)], endings[i % len(endings)]
            Image.new(mode, size).save(path / name / f"{i}{ending}", "TIFF" if ending == ".tif" else "PNG")
    splits = load_folder(path)
    assert splits.classes == tuple(sorted(counts))
    labels = torch.cat([getattr(splits, split).labels for split in SPLITS])
    assert labels.bincount().tolist() == [counts[name] for name in splits.classes]
    assert splits.train.images.shape[1:] == (3, size[1], size[0])


def test_the_notes_name_the_splits_of_validation_from_test(tmp_path: Path) -> None:
    for name, count in (("train", 10), ("test", 4)):
        write_classes(tmp_path / name, count)
    lines = [line for line in load_folder(tmp_path, validation_from="test").notes if line.startswith("splits: ")]
    (line,) = lines
    assert line.startswith("splits: 30 train, 6 validation, 6 test; half of the test split selects")
