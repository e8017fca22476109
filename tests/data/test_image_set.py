"""Batches of an image set: residing, and streamed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gross_ray.data.image_set import AHEAD, ImageSet, ahead


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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
