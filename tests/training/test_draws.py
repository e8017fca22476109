"""The batches of an epoch: their order, and images that are centres, crops or resized crops of images with a margin."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gross_ray.data.augment import Crop, ResizedCrop
from gross_ray.data.image_set import ImageSet
from gross_ray.training.draws import EpochDraws
from gross_ray.training.options import AUGMENTATIONS, Schedule

SIZE, BATCH = (8, 6), 12
KINDS = {"crop": Crop, "resized-crop": ResizedCrop}


@pytest.fixture(params=[(8, 6), (12, 9)], ids=["no margin", "margin"])
def images(request: pytest.FixtureRequest) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(256, (40, 3, *request.param), dtype=torch.uint8, generator=generator)
    return ImageSet.centred(stored, SIZE, torch.arange(40))


def schedule(augment: str) -> Schedule:
    return Schedule(epochs=1, lr=0.1, batch_size=BATCH, augment=augment)


def epoch(images: ImageSet, augment: str, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(EpochDraws(images, seed, schedule(augment)).batches(BATCH))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches_are_the_augmentation_of_the_images_in_the_drawn_order(images: ImageSet, augment: str) -> None:
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(40, generator=generator)
    expected = images.images[order]
    if augment != "none":
        augmentation = KINDS[augment](tuple(images.stored.shape[2:]), SIZE)
        expected = augmentation(images.stored[order], augmentation.draw(40, generator))
    batches = epoch(images, augment)
    assert [tuple(inputs.shape) for inputs, _ in batches] == [(12, 3, *SIZE)] * 3 + [(4, 3, *SIZE)]
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), expected)
    assert torch.equal(torch.cat([labels for _, labels in batches]), order)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_streamed_batches_are_the_same(images: ImageSet, augment: str) -> None:
    for one, other in zip(epoch(images, augment), epoch(images.stream_to("cpu"), augment), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("kind", ["resident", "streamed", "sets of their own"])
@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_stacked_batches_are_those_of_each_training(images: ImageSet, augment: str, kind: str) -> None:
    used = images.stream_to("cpu") if kind == "streamed" else images
    sets = [replace(used) if kind == "sets of their own" else used for _ in range(3)]
    draws = [EpochDraws(each, seed, schedule(augment)) for seed, each in enumerate(sets)]
    stacked = list(EpochDraws.batches_of_all(draws, BATCH))
    assert len(stacked) == 4
    for member in range(3):
        for (inputs, labels), (alone, own) in zip(stacked, epoch(images, augment, member), strict=True):
            assert torch.equal(inputs[member], alone)
            assert torch.equal(labels[member], own)


@pytest.mark.gpu
def test_resized_crops_are_the_same_at_every_precision(images: ImageSet) -> None:
    from gross_ray.nn.precision import products_at

    draws = EpochDraws(images.to("cuda"), 5, schedule("resized-crop"))
    plain = torch.cat([inputs for inputs, _ in draws.batches(BATCH)])
    with products_at("tf32", torch.device("cuda")):
        assert torch.equal(torch.cat([inputs for inputs, _ in draws.batches(BATCH)]), plain)
