"""Batches of an image set: residing, and streamed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.functional import center_crop

from gross_ray.data.identity import DataIdentity, identity_of
from gross_ray.data.image_set import AHEAD, ImageSet, MappedSplit, Splits, ahead, centre


@pytest.fixture
def images() -> ImageSet:
    pixels = torch.arange(11, dtype=torch.uint8)[:, None, None, None].expand(11, 3, 2, 2).contiguous()
    return ImageSet(pixels, torch.arange(100, 111))


@pytest.mark.parametrize("place", [lambda one: one, lambda one: one.stream_to("cpu")], ids=["residing", "streamed"])
@pytest.mark.parametrize("size", [1, 4, 11, 20])
def test_batches_are_the_images_in_order(images: ImageSet, place: Callable[[ImageSet], ImageSet], size: int) -> None:
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    for chosen in (None, order):
        expected = torch.arange(11) if chosen is None else order
        batches = list(place(images).batches(size, chosen))
        assert [len(labels) for _, labels in batches] == [len(part) for part in expected.split(size)]
        assert torch.equal(torch.cat([labels for _, labels in batches]), expected + 100)
        assert torch.equal(torch.cat([pixels for pixels, _ in batches]), images.images[expected])


@pytest.mark.gpu
def test_streamed_batches_reach_the_device(images: ImageSet) -> None:
    streamed = images.stream_to("cuda")
    assert streamed.device.type == "cuda"
    assert streamed.images.device.type == "cpu"
    batches = list(streamed.batches(4, torch.arange(10, -1, -1)))
    assert all(part.device.type == "cuda" for batch in batches for part in batch)
    assert torch.equal(torch.cat([labels for _, labels in batches]).cpu(), images.labels.flip(0))


def test_what_is_streamed_stays_so_in_parts_of_it(images: ImageSet) -> None:
    part = images.stream_to("meta").first(3)
    assert (part.device.type, part.images.device.type, len(part)) == ("meta", "cpu", 3)
    assert all(one.device.type == "meta" for one in next(part.batches(2)))
    residing = part.to("cpu")
    assert residing.device.type == "cpu"


def test_only_so_many_batches_are_on_their_way() -> None:
    made: list[int] = []
    most = 0
    wanted = 0

    def make(number: int) -> int:
        nonlocal most
        made.append(number)
        most = max(most, len(made) - wanted)
        return number

    for number in ahead(make, 50):
        wanted += 1
        assert number == wanted - 1
    assert made == list(range(50))
    assert most <= AHEAD + 1  # and the one that is worked on


def test_the_thread_ends_with_the_iteration() -> None:
    before = threading.active_count()
    iterator = ahead(lambda number: number, 50)
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_is_raised_where_its_batch_is_wanted() -> None:
    def make(number: int) -> Tensor:
        if number == 1:
            raise RuntimeError("no second batch")
        return torch.zeros(number)

    iterator = ahead(make, 3)
    assert len(next(iterator)) == 0
    with pytest.raises(RuntimeError, match="no second batch"):
        next(iterator)


# --- images with a margin, and images in files

SIZE = (3, 4)
MAPPED = MappedSplit("root", "key", "train", "hash", 11)


@pytest.fixture
def wide() -> ImageSet:
    """Images of 3x4 pixels with a margin, the first ones of a file."""
    pixels = torch.arange(11 * 3 * 6 * 8).remainder(251).to(torch.uint8).reshape(11, 3, 6, 8)
    return replace(ImageSet.centred(pixels, SIZE, torch.arange(11)), mapped=MAPPED)


def assert_centred(images: ImageSet) -> None:
    """Assert that the images are the centres of those with a margin, as torchvision takes them, and their memory."""
    assert images.wider is not None and images.stored is images.wider
    assert torch.equal(images.images, center_crop(images.wider, list(SIZE)))
    pixels, wider = images.images.untyped_storage(), images.wider.untyped_storage()
    assert pixels.data_ptr() == wider.data_ptr()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 8), st.integers(0, 8))
def test_the_centre_is_that_of_torchvision(height: int, width: int, more: int, wider: int) -> None:
    pixels = torch.arange((height + more) * (width + wider), dtype=torch.uint8).reshape(1, 1, height + more, -1)
    assert torch.equal(centre(pixels, (height, width)), center_crop(pixels, [height, width]))


@pytest.mark.parametrize(
    ("change", "in_file"),
    [
        (lambda images: images.first(4), True),
        (lambda images: images.first(0), True),
        (lambda images: images.stream_to("cpu"), True),
        (lambda images: images.part(torch.tensor([7, 2, 2])), False),
        (lambda images: images.to("cpu"), False),
        (lambda images: images.with_stored(images.stored.flip(0), images.labels.flip(0)), False),
        (lambda images: images.stream_to("cpu").first(4).part(torch.tensor([1])), False),
    ],
    ids=["first", "all", "streamed", "part", "to", "with_stored", "several"],
)
def test_images_stay_the_centre_of_those_with_a_margin(
    wide: ImageSet, change: Callable[[ImageSet], ImageSet], in_file: bool
) -> None:
    changed = change(wide)
    assert_centred(changed)
    assert changed.mapped == (MAPPED if in_file else None)  # only the first images of a file are a name and a number
    for image, label in zip(changed.stored, changed.labels.tolist(), strict=True):
        assert torch.equal(image, wide.stored[label])


def test_images_of_the_stored_size_have_no_margin(images: ImageSet) -> None:
    same = ImageSet.centred(images.images, (2, 2), images.labels)
    assert same.wider is None and same.stored is same.images is images.images
    assert same.part(torch.tensor([1])).wider is None


@pytest.mark.parametrize("place", [lambda one: one, lambda one: one.stream_to("cpu")], ids=["residing", "streamed"])
def test_batches_with_the_margin(wide: ImageSet, place: Callable[[ImageSet], ImageSet]) -> None:
    order = torch.tensor([10, 3, 5, 0, 3])
    for margin, source in ((True, wide.stored), (False, wide.images)):
        batches = list(place(wide).batches(2, order, wider=margin))
        assert torch.equal(torch.cat([pixels for pixels, _ in batches]), source[order])
        assert torch.equal(torch.cat([labels for _, labels in batches]), order)


def test_batches_without_a_margin_are_the_images(images: ImageSet) -> None:
    for (pixels, _), (same, _) in zip(images.batches(4, wider=True), images.batches(4), strict=True):
        assert torch.equal(pixels, same)


@pytest.mark.parametrize("n", [0, 1, 5, 11])
def test_the_first_images_of_a_file_have_the_identity_of_those_in_memory(wide: ImageSet, n: int) -> None:
    def identity(images: ImageSet) -> DataIdentity:
        return identity_of(Splits("made", images, images, images, ("a",)))

    resident = replace(wide, mapped=None)
    in_file = replace(wide, mapped=replace(MAPPED, hash=identity(resident).train.hash))
    assert identity(in_file.first(n)) == identity(resident.first(n))
    other = replace(wide, mapped=replace(MAPPED, hash="of another file"))
    assert (identity(other.first(n)) == identity(resident.first(n))) == (
        n in (1, 5)
    )  # the file's hash is for all of it
    assert identity(other.part(torch.arange(11))) == identity(resident)
