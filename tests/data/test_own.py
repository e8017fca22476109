"""Datasets of one's own, by a function."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from dataset_errors import dataset_error
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

from gross_ray.data import reading
from gross_ray.data.identity import identity_of
from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.data.own import READ_TWICE
from gross_ray.errors import DatasetError, InvalidValueError
from gross_ray.experiment import DataOptions

PIXELS = np.random.default_rng(0).integers(256, size=(40, 6, 5, 3), dtype=np.uint8)
LABELS = [number % 4 for number in range(40)]
Item = tuple[Any, Any]


class Own(Dataset[Item]):
    """A torch dataset that has only what one must have."""

    def __init__(self, images: list[Any], labels: list[Any]) -> None:
        self.items = list(zip(images, labels, strict=True))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> Item:
        return self.items[place]


@pytest.fixture
def module() -> Iterator[ModuleType]:
    made = ModuleType("own_pictures")
    sys.modules["own_pictures"] = made
    yield made
    del sys.modules["own_pictures"]


def as_dataset(change: Callable[[np.ndarray], Any], places: slice = slice(None)) -> Own:
    return Own([change(image) for image in PIXELS[places]], LABELS[places])


def channels_first(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def sorted_images(images: Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in images)


@pytest.mark.parametrize(
    "change",
    [
        Image.fromarray,
        lambda image: image,
        channels_first,
        lambda image: to_tensor(Image.fromarray(image)),
        lambda image: to_tensor(Image.fromarray(image)).double(),
    ],
    ids=["pil", "numpy", "tensor", "ToTensor", "float64"],
)
def test_images_of_each_kind_are_read_without_loss(module: ModuleType, change: Callable[[np.ndarray], Any]) -> None:
    module.pictures = lambda: (as_dataset(change, slice(0, 30)), as_dataset(change, slice(30, 40)))  # type: ignore[attr-defined]
    splits = load_dataset(DataOptions(name="own_pictures:pictures"))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (24, 6, 10)
    assert splits.train.images.shape[1:] == (3, 6, 5)
    learnt = torch.cat([splits.train.images, splits.validation.images])
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()
    assert sorted_images(learnt) == sorted_images(expected[:30])
    assert sorted_images(splits.test.images) == sorted_images(expected[30:])
    by_image = {image.numpy().tobytes(): label for image, label in zip(expected, LABELS, strict=True)}
    found = [by_image[image.numpy().tobytes()] for image in learnt]
    assert found == torch.cat([splits.train.labels, splits.validation.labels]).tolist()
    assert splits.classes == ("0", "1", "2", "3")


def test_grey_images_and_three_datasets(module: ModuleType) -> None:
    parts = [as_dataset(lambda image: image[..., 0], slice(start, start + 10)) for start in (0, 10, 20)]
    parts[0].classes = ["a", "b", "c", "d"]  # type: ignore[attr-defined]
    module.pictures = lambda: tuple(parts)  # type: ignore[attr-defined]
    splits = load_dataset(DataOptions(name="own_pictures:pictures", mean=(0.1, 0.2, 0.3)))
    assert splits.classes == ("a", "b", "c", "d")
    for start, part in zip((0, 10, 20), (splits.train, splits.validation, splits.test), strict=True):
        grey = torch.from_numpy(PIXELS[start : start + 10, :, :, 0].copy())
        assert sorted_images(part.images[:, 0]) == sorted_images(grey)
        assert torch.equal(part.images[:, 0], part.images[:, 2])
        assert part.normalisation.mean == (0.1, 0.2, 0.3)


def test_pil_images_of_other_modes_are_converted_as_those_of_folders_and_not_turned(module: ModuleType) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = BytesIO()
    Image.new("L", (2, 1), 9).save(turned, "PNG", exif=exif)
    images = [Image.new("I;16", (2, 1), 2570), Image.new("LA", (2, 1), (10, 0)), Image.open(turned)]
    module.pictures = lambda: (Own(images, [0, 1, 2]),) * 3  # type: ignore[attr-defined]
    splits = load_dataset(DataOptions(name="own_pictures:pictures"))
    assert dict(zip(splits.train.labels.tolist(), splits.train.images[:, 0, 0, 0].tolist(), strict=True)) == {
        0: 10,
        1: 255,
        2: 9,
    }
    assert splits.notes[-1].startswith("the same image is in two splits: 3 of validation are also in train, 3 of test")


def test_it_is_read_in_the_same_order_each_time(module: ModuleType) -> None:
    module.pictures = lambda: (as_dataset(channels_first), as_dataset(channels_first))  # type: ignore[attr-defined]
    one, other = (load_dataset(DataOptions(name="own_pictures:pictures")) for _ in range(2))
    assert torch.equal(one.train.images, other.train.images)


WHOLE = as_dataset(channels_first)


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        (WHOLE, "own_pictures:pictures: the function returned Own; return (train, test) or"),
        ((WHOLE,), "own_pictures:pictures: the function returned 1 values; return (train, test) or"),
        ((WHOLE, iter([])), "own_pictures:pictures, test: a list_iterator has no length; return"),
        ((Own([], []), WHOLE), "own_pictures:pictures, train: the dataset is empty"),
        ((WHOLE, Own([3], [1])), "own_pictures:pictures, test, item 0: a int is not an image; give PIL images"),
        ((Own([PIXELS[0]], ["cat"]), WHOLE), "train, item 0: the class is 'cat'; must be a whole number, 0 or more"),
        ((Own([PIXELS[0]], [-1]), WHOLE), "train, item 0: the class is -1; must be"),
        ((Own([PIXELS[0]], [0.5]), WHOLE), "train, item 0: the class is 0.5; must be"),
        (
            (Own([PIXELS[0], PIXELS[1, :4]], [0, 0]), WHOLE),
            "train, item 1 has 4x5 pixels (height x width), the first image 6x5; set",
        ),
        (
            (Own([PIXELS[0, :4]] * 3, [0] * 3), WHOLE),
            "test, item 0 has 6x5 pixels (height x width), the first image 4x5; se",
        ),
        ((Own([torch.zeros(2, 6, 5)], [0]), WHOLE), "train, item 0: an image of shape (2, 6, 5); give"),
        ((Own([torch.zeros(3, 6, 5).long()], [0]), WHOLE), "train, item 0: an image of int64; give"),
        (
            (Own([to_tensor(PIXELS[0]) * 2 - 1], [0]), WHOLE),
            "that are not multiples of 1/255 from 0 to 1: leave the normalisation to data.mean and data.std",
        ),
        ((Own([torch.full((3, 6, 5), torch.nan)], [0]), WHOLE), "values from nan to nan that are not multiples"),
        ((Own([Image.new("F", (5, 6))], [0]), WHOLE), "an image of mode F: ValueError: its pixels are floating-point"),
        ((Own([(1, 2, 3)], [0]).items, WHOLE), "train, item 0: a tuple is not an image"),
        (([5], WHOLE), "train, item 0: TypeError: cannot unpack non-iterable int object"),
    ],
)
def test_what_is_no_dataset_is_named(module: ModuleType, returned: Any, complaint: str) -> None:
    module.pictures = lambda: returned  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match=re.escape(complaint)) as caught:
        load_dataset(DataOptions(name="own_pictures:pictures"))
    assert "\n" not in str(caught.value)


def test_datasets_whose_classes_differ_are_refused(module: ModuleType) -> None:
    parts = [as_dataset(channels_first), as_dataset(channels_first)]
    for part, classes in zip(parts, ("abcd", "dcba"), strict=True):
        part.classes = list(classes)  # type: ignore[attr-defined]
    module.pictures = lambda: tuple(parts)  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match="test has the classes d, c, b, a, train a, b, c, d; give all datasets the"):
        load_dataset(DataOptions(name="own_pictures:pictures"))
    parts[1].classes = None  # type: ignore[attr-defined]
    assert load_dataset(DataOptions(name="own_pictures:pictures")).classes == tuple("abcd")


def test_fewer_names_than_classes(module: ModuleType) -> None:
    few = as_dataset(channels_first)
    few.classes = ["a", "b", "c"]  # type: ignore[attr-defined]
    module.pictures = lambda: (few, WHOLE)  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match="an image has class 3, but only 3 classes have names; name all"):
        load_dataset(DataOptions(name="own_pictures:pictures"))


def test_a_module_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_pictures.py").write_text("def pictures(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DatasetError, match="failing_pictures:pictures: failing_pictures fails: SyntaxError: ") as told:
        load_dataset(DataOptions(name="failing_pictures:pictures"))
    assert len(str(told.value).splitlines()) == 1


def test_a_function_that_fails_or_is_not_there(module: ModuleType) -> None:
    def pictures() -> None:
        raise FileNotFoundError("no pictures here")

    module.pictures = pictures  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match="the function fails: FileNotFoundError: no pictures here"):
        load_dataset(DataOptions(name="own_pictures:pictures"))
    with pytest.raises(DatasetError, match="no_such_module.*write package.module:function, from a folder that Python"):
        load_dataset(DataOptions(name="no_such_module:pictures"))
    with pytest.raises(DatasetError, match="other.*write package.module:function"):
        load_dataset(DataOptions(name="own_pictures:other"))
    module.pictures = 3  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match="pictures is not a function"):
        load_dataset(DataOptions(name="own_pictures:pictures"))
    with pytest.raises(InvalidValueError, match=re.escape("data.name = 'own pictures:x': must be sample")):
        DataOptions(name="own pictures:x")


# --- items that are read again


class Counted(Own):
    """A dataset that counts how often each item is read, and may change it."""

    def __init__(self, places: slice, change: Callable[[int, int, Item], Item] | None = None) -> None:
        super().__init__(list(PIXELS[places]), LABELS[places])
        self.reads, self._change = [0] * len(self.items), change

    def __getitem__(self, place: int) -> Item:
        self.reads[place] += 1
        item = self.items[place]
        return item if self._change is None else self._change(place, self.reads[place], item)


@pytest.fixture
def load_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Callable[..., Splits]:
    """Load datasets into memory, or into files, read by this process."""
    monkeypatch.setattr(reading, "processes", lambda: 0)

    def load(where: str, *datasets: Any, notes: list[str] | None = None) -> Splits:
        module.pictures = lambda: datasets  # type: ignore[attr-defined]
        options = DataOptions(name="own_pictures:pictures", memory=1 if where == "files" else 2**40)
        return load_dataset(options, root=tmp_path, note=None if notes is None else notes.append)

    return load


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_random_transform_is_named(load_in: Callable[..., Splits], where: str, part: str) -> None:
    generator = np.random.default_rng(0)

    def cropped(_: int, reads: int, item: Item) -> Item:
        return np.roll(item[0], generator.integers(5), axis=1), item[1]

    sets = [Counted(slice(0, 30)), Counted(slice(30, 40))]
    sets[part == "test"] = Counted(slice(0, 30), cropped)
    rule = "leave random transforms out of the dataset: trainings draw crops and flips (training.augment)"
    dataset_error(lambda: load_in(where, *sets), f"pictures, {part}, item ", f" differs between two readings; {rule}")


def test_one_changed_item_of_the_ten_that_are_read_twice_is_named(load_in: Callable[..., Splits]) -> None:
    def changed(place: int, reads: int, item: Item) -> Item:
        return (item[0] if place < 29 or reads < 2 else 255 - item[0]), item[1]

    for where in ("memory", "files"):
        sets = Counted(slice(0, 30), changed), Counted(slice(30, 40))
        dataset_error(lambda sets=sets, where=where: load_in(where, *sets), "train, item 29 differs between two")


@pytest.mark.parametrize("targets", ["right", "tensor", "transformed", "strings", "short", None])
def test_targets_are_the_classes_if_items_agree(load_in: Callable[..., Splits], targets: str | None) -> None:
    sets, notes = [Counted(slice(0, 30)), Counted(slice(30, 40))], list[str]()
    for each, places in zip(sets, (slice(0, 30), slice(30, 40)), strict=True):
        found = {
            "right": LABELS[places],
            "tensor": torch.tensor(LABELS[places]),
            "transformed": [3 - label for label in LABELS[places]],  # a target_transform changes what items say
            "strings": ["abcd"[label] for label in LABELS[places]],
            "short": LABELS[places][:-1],
        }
        if targets is not None:
            each.targets = found[targets]  # type: ignore[attr-defined]
    splits = load_in("files", *sets, notes=notes)
    assert identity_of(splits) == identity_of(load_in("memory", as_dataset(np.array, slice(0, 30)), sets[1]))
    trusted = targets in ("right", "tensor")
    twice = "it has no targets that its items agree with, so they are read twice, first for their classes"
    assert notes == ([] if trusted else [f"own_pictures:pictures, {part}: {twice}" for part in ("train", "test")])
    assert min(sets[0].reads) == (1 if trusted else 2)
    assert (
        sum(reads > (1 if trusted else 2) for reads in sets[0].reads) <= READ_TWICE + 1
    )  # and the first, for its size
    before = sum(sets[0].reads)
    load_in("files", *sets)
    assert sum(sets[0].reads) - before <= 4 * READ_TWICE + 1  # those by which the files are found


@pytest.mark.parametrize("place", [0, 1])
def test_a_class_that_changes_between_readings_is_named(load_in: Callable[..., Splits], place: int) -> None:
    """Item 0 is one of those that are always read twice; item 1 is read twice into files."""

    def changed(at: int, reads: int, item: Item) -> Item:
        return item[0], item[1] if at != place else (item[1] + reads) % 4

    for where in ("memory", "files"):
        if (place, where) != (1, "memory"):  # read once only
            sets = Counted(slice(0, 30), changed), Counted(slice(30, 40))
            complaint = f"own_pictures:pictures, train, item {place} has class "
            remedy = "; make its class the same at each reading"
            dataset_error(lambda sets=sets, where=where: load_in(where, *sets), complaint, ", and before ", remedy)


def test_a_changed_file_of_a_folder_of_torchvision_is_read_again(
    load_in: Callable[..., Splits], module: ModuleType, tmp_path: Path
) -> None:
    """Also within a Subset, and if it is none of the ten items that are read twice."""
    for number in range(60):
        folder = tmp_path / "pictures" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[number % 40]).save(folder / f"{number:02}.png")
    whole = ImageFolder(str(tmp_path / "pictures"))
    datasets = Subset(whole, range(0, 60, 2)), Subset(whole, range(1, 60, 2))
    before = load_in("files", *datasets)
    assert identity_of(load_in("files", *datasets)) == identity_of(before)
    Image.new("RGB", (5, 6)).save(whole.samples[2][0])
    assert identity_of(load_in("files", *datasets)) != identity_of(before)


def test_items_that_are_dicts_are_named(module: ModuleType) -> None:
    dicts = Own([], [])
    dicts.items = [{"image": PIXELS[0], "label": 0}] * 9  # type: ignore[list-item]
    module.pictures = lambda: (dicts, WHOLE)  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match="train, item 0: TypeError: the item is a dict with the keys image, label"):
        load_dataset(DataOptions(name="own_pictures:pictures"))
