import re

import pytest
import torch
from scipy import stats
from torchvision.transforms import functional as oracle
from torchvision.transforms import v2

from gross_ray.data.augment import cropped_and_flipped, draw_crops
from gross_ray.data.normalisation import Normalisation
from gross_ray.errors import InvalidValueError


def augment(images: torch.Tensor, generator: torch.Generator, padding: int = 2) -> torch.Tensor:
    crops = draw_crops(len(images), generator, padding=padding)
    return cropped_and_flipped(images, crops.to(images.device), padding=padding)


def random_images(num_images: int, height: int = 32, width: int = 32) -> torch.Tensor:
    # 1 to 255: only padding is 0
    generator = torch.Generator().manual_seed(num_images)
    return torch.randint(1, 256, (num_images, 3, height, width), dtype=torch.uint8, generator=generator)


def crops_and_flips(image: torch.Tensor, padding: int) -> torch.Tensor:
    """Return all possible results, ((2 padding + 1)^2 * 2, 3, H, W), ordered by top, left, flip."""
    padded = oracle.pad(image, [padding] * 4)
    offsets = range(2 * padding + 1)
    crops = [oracle.crop(padded, top, left, *image.shape[1:]) for top in offsets for left in offsets]
    return torch.stack([choice for crop in crops for choice in (crop, oracle.hflip(crop))])


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 2), (8, 5, 1), (6, 9, 3), (4, 4, 0)])
def test_each_image_is_one_of_its_own_crops_and_flips(height: int, width: int, padding: int) -> None:
    images = random_images(60, height, width)
    results = augment(images, torch.Generator().manual_seed(0), padding=padding)
    assert results.dtype == torch.uint8
    assert results.shape == images.shape
    for image, result in zip(images, results, strict=True):
        choices = crops_and_flips(image, padding)
        assert (choices == result).flatten(1).all(1).sum() == 1


def test_all_crops_and_flips_are_equally_likely_and_independent() -> None:
    (image,) = random_images(1, 8, 8)
    results = augment(image.expand(20_000, -1, -1, -1), torch.Generator().manual_seed(1))
    choices = crops_and_flips(image, 2)
    counts = torch.stack([(results == choice).flatten(1).all(1).sum() for choice in choices])
    assert counts.sum() == 20_000
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_generator_alone_decides() -> None:
    images = random_images(100)
    before = images.clone()
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(augment(images, generator), first)
    assert not torch.equal(augment(images, generator), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_does_not_change_the_result() -> None:
    images = random_images(100)
    on_gpu = augment(images.cuda(), torch.Generator().manual_seed(5))
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), augment(images, torch.Generator().manual_seed(5)))


def test_normalise_is_torchvisions() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    values[1] = values[1].flip(1)
    scale = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.225] * 3)])
    before = values.clone()
    result = Normalisation()(values)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, scale(values), rtol=0, atol=1e-6)
    assert torch.equal(values, before)


def test_each_channel_has_its_own_normalisation() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    values = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    torch.testing.assert_close(Normalisation(mean, std)(values), scale(values), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std", "complaint"),
    [
        ((0.5, 0.5), (0.2,), "mean = (0.5, 0.5): must be one number"),
        ((0.5, 0.5, 123.0), (0.2,), "mean = (0.5, 0.5, 123.0): must be from 0 (black) to 1 (white)"),
        ((0.5,), (), "std = (): must be one number"),
        ((0.5,), (0.2, 0.0, 0.2), "std = (0.2, 0.0, 0.2): must be above 0"),
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(
    mean: tuple[float, ...], std: tuple[float, ...], complaint: str
) -> None:
    with pytest.raises(InvalidValueError, match=re.escape(complaint)):
        Normalisation(mean, std)
