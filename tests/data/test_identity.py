"""The identity of a dataset: equal for equal images, labels and class names, and for nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset

from gross_ray.data.identity import SPLITS, DataIdentity, identity_of
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import DatasetError, InvalidValueError
from gross_ray.experiment import DataOptions

CLASSES = ("cat", "dog", "owl")


def drawn(seed: int, counts: tuple[int, int, int] = (7, 5, 4)) -> Splits:
    """Three splits of random images, of which no two are equal."""
    generator = np.random.default_rng(seed)
    sets = [
        ImageSet(
            torch.from_numpy(generator.integers(256, size=(count, 3, 4, 5), dtype=np.uint8)),
            torch.arange(count) % len(CLASSES),
        )
        for count in counts
    ]
    return Splits("drawn", *sets, CLASSES)


def laid_out(images: ImageSet, layout: str) -> ImageSet:
    """The same images and labels in other memory."""
    pixels, labels = images.images, images.labels
    if layout == "channels_last":
        return replace(images, images=pixels.to(memory_format=torch.channels_last))
    if layout == "sliced":
        more = torch.cat([torch.zeros_like(pixels), pixels], 3)[..., pixels.shape[3] :]
        return replace(images, images=more, labels=torch.stack([labels, labels + 1], 1)[:, 0])
    if layout == "reversed":
        return replace(images, images=pixels.flip(0).clone()[torch.arange(len(images) - 1, -1, -1)])
    return images.stream_to("cpu")


@given(st.integers(0, 1000), st.lists(st.sampled_from(["channels_last", "sliced", "reversed", "streamed"]), max_size=3))
def test_memory_layouts_do_not_count(seed: int, layouts: list[str]) -> None:
    splits = drawn(seed)
    other = splits
    for layout in layouts:
        other = replace(other, **{split: laid_out(getattr(other, split), layout) for split in SPLITS})
    assert identity_of(other) == identity_of(splits)
    identity_of(splits).check(identity_of(other), "a run")
    assert identity_of(other).hash == identity_of(splits).hash


@given(st.data(), st.sampled_from(SPLITS), st.sampled_from(["pixel", "label", "order", "count", "class", "shape"]))
def test_any_single_change_gives_another_identity(data: st.DataObject, split: str, change: str) -> None:
    splits = drawn(data.draw(st.integers(0, 1000)))
    images: ImageSet = getattr(splits, split)
    pixels, labels, classes = images.images.clone(), images.labels.clone(), splits.classes
    place = data.draw(st.integers(0, len(images) - 2))
    if change == "pixel":
        where = (place, *(data.draw(st.integers(0, size - 1)) for size in pixels.shape[1:]))
        pixels[where] = (int(pixels[where]) + data.draw(st.integers(1, 255))) % 256
    elif change == "label":
        labels[place] += 1
    elif change == "order":
        order = torch.arange(len(images))
        order[place], order[place + 1] = place + 1, place
        pixels, labels = pixels[order], labels[order]
    elif change == "count":
        pixels, labels = pixels[:-1], labels[:-1]
    elif change == "class":
        classes = (*classes[:2], "crow")
    else:
        pixels = pixels.reshape(len(pixels), 3, 5, 4)
    other = replace(splits, classes=classes, **{split: ImageSet(pixels, labels)})
    stored, loaded = identity_of(splits), identity_of(other)
    assert loaded != stored and loaded.hash != stored.hash
    with pytest.raises(DatasetError) as caught:
        stored.check(loaded, "runs/a")
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "runs/a" in message and "--out" in message
    if change == "class":
        assert "class 2 is 'crow', not 'owl'" in message
    else:
        then, now = getattr(stored, split).hash, getattr(loaded, split).hash
        assert f"the {split} split differs" in message
        assert now[:12] in message and then[:12] in message


def test_the_identity_is_that_of_another_process() -> None:
    """A constant of the data alone: not of Python's hash seed, the machine's threads or the process."""
    program = (
        "import json; from gross_ray.data.identity import identity_of; from gross_ray.data.images import load_dataset; "
        "from gross_ray.experiment import DataOptions; "
        "print(json.dumps(identity_of(load_dataset(DataOptions(limit_train=30))).to_dict()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    there = DataIdentity.from_dict(json.loads(told.stdout))
    here = identity_of(load_dataset(DataOptions(limit_train=30)))
    assert here == there
    assert (here.train.count, here.validation.count) == (30, len(load_dataset(DataOptions()).validation))
    assert here.train != identity_of(load_dataset(DataOptions(limit_train=29))).train


class Pictures(Dataset[tuple[np.ndarray, int]]):
    classes = CLASSES

    def __init__(self, splits: Splits, split: str) -> None:
        images: ImageSet = getattr(splits, split)
        order = images.labels.argsort(stable=True)  # as the folders of classes have them
        self.pixels = images.images[order].permute(0, 2, 3, 1).numpy()
        self.labels = images.labels[order].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        return self.pixels[place], self.labels[place]


def three() -> list[Pictures]:
    return [Pictures(drawn(0), split) for split in SPLITS]


def test_a_folder_and_a_function_of_equal_images_are_the_same_data(tmp_path: Path) -> None:
    for split, pictures in zip(SPLITS, three(), strict=True):
        for number, (pixels, label) in enumerate(pictures):
            place = tmp_path / split / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number:03}.png")
    folder = identity_of(load_dataset(DataOptions(name=f"folder:{tmp_path}")))
    assert folder == identity_of(load_dataset(DataOptions(name=f"{__name__}:three")))


def test_json_gives_an_identity_back_and_nothing_else_is_one() -> None:
    identity = identity_of(drawn(3))
    assert DataIdentity.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity
    for wrong in (
        {},
        [],
        {"train": 1},
        identity.to_dict() | {"test": {"hash": "a"}},
        identity.to_dict() | {"classes": 3},
    ):
        with pytest.raises(InvalidValueError, match="not the hashes of a dataset's splits"):
            DataIdentity.from_dict(wrong)  # type: ignore[arg-type]
