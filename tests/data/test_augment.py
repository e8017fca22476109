import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchvision.transforms import functional as oracle
from torchvision.transforms import v2

from gross_ray.data import augment as module
from gross_ray.data.augment import PADDING, Augmentation, Crop, ResizedCrop
from gross_ray.data.normalisation import Normalisation
from gross_ray.errors import InvalidValueError


def augmented(augmentation: Augmentation, images: Tensor, seed: int) -> Tensor:
    drawn = augmentation.draw(len(images), torch.Generator().manual_seed(seed))
    return augmentation(images, drawn.to(images.device))


def random_images(num_images: int, height: int = 32, width: int = 32) -> Tensor:
    # 1 to 255: only padding is 0
    generator = torch.Generator().manual_seed(num_images)
    return torch.randint(1, 256, (num_images, 3, height, width), dtype=torch.uint8, generator=generator)


def crops_and_flips(image: Tensor, size: tuple[int, int], padding: int) -> Tensor:
    """Return all possible results, (tops lefts 2, 3, H, W), ordered by top, left, flip."""
    padded = oracle.pad(image, [padding] * 4)
    tops, lefts = (range(there - wanted + 1) for there, wanted in zip(padded.shape[1:], size, strict=True))
    crops = [oracle.crop(padded, top, left, *size) for top in tops for left in lefts]
    return torch.stack([choice for crop in crops for choice in (crop, oracle.hflip(crop))])


SIZES = [
    ((32, 32), (32, 32)),
    ((8, 5), (8, 5)),
    ((6, 9), (6, 9)),
    ((9, 12), (6, 7)),
    ((9, 6), (5, 6)),
    ((7, 7), (1, 1)),
]
"""Height and width of images and of crops: without a margin, with one, and with one in one direction only."""


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_each_image_is_one_of_its_own_crops_and_flips(source: tuple[int, int], size: tuple[int, int]) -> None:
    images = random_images(60, *source)
    results = augmented(Crop(source, size), images, 0)
    assert results.dtype == torch.uint8
    assert results.shape == (60, 3, *size)
    for image, result in zip(images, results, strict=True):
        choices = crops_and_flips(image, size, PADDING if source == size else 0)
        assert (choices == result).flatten(1).all(1).any()


@pytest.mark.parametrize("source", [(8, 8), (12, 10)])
def test_all_crops_and_flips_are_equally_likely_and_independent(source: tuple[int, int]) -> None:
    (image,) = random_images(1, *source)
    results = augmented(Crop(source, (8, 8)), image.expand(20_000, -1, -1, -1), 1)
    choices = crops_and_flips(image, (8, 8), PADDING if source == (8, 8) else 0)
    counts = torch.stack([(results == choice).flatten(1).all(1).sum() for choice in choices])
    assert counts.sum() == 20_000
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_crops_without_a_margin_are_those_of_earlier_versions() -> None:
    images, generator = random_images(50, 8, 8), torch.Generator().manual_seed(3)
    top, left, flip = (torch.randint(high, (50,), generator=generator) for high in (5, 5, 2))
    expected = []
    for image, *drawn in zip(images, top.tolist(), left.tolist(), flip.tolist(), strict=True):
        crop = oracle.crop(oracle.pad(image, [2] * 4), drawn[0], drawn[1], 8, 8)
        expected.append(oracle.hflip(crop) if drawn[2] else crop)
    assert torch.equal(augmented(Crop((8, 8), (8, 8)), images, 3), torch.stack(expected))
    drawn_now = Crop((8, 8), (8, 8)).draw(4, torch.Generator().manual_seed(3))
    assert drawn_now.tolist() == [[1, 3, 2, 2], [0, 0, 0, 0], [1, 1, 0, 1]]


EVERY_KIND = [Crop((32, 32), (32, 32)), Crop((32, 32), (24, 28)), ResizedCrop((32, 32), (24, 28))]


@pytest.mark.parametrize("augmentation", EVERY_KIND)
def test_generator_alone_decides(augmentation: Augmentation) -> None:
    images = random_images(100)
    before = images.clone()
    first, again, other = (augmented(augmentation, images, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(augmentation(images, augmentation.draw(100, generator)), first)
    assert not torch.equal(augmentation(images, augmentation.draw(100, generator)), first)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", EVERY_KIND)
def test_device_does_not_change_the_result(augmentation: Augmentation) -> None:
    images = random_images(100)
    on_gpu = augmented(augmentation, images.cuda(), 5)
    assert on_gpu.is_cuda
    difference = (on_gpu.cpu().int() - augmented(augmentation, images, 5).int()).abs()
    assert difference.max() <= isinstance(augmentation, ResizedCrop)  # of a level: products are rounded otherwise


sides = st.integers(1, 48)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int], bool]:
    """Sizes of an image and of its resized crop, the crop's top, left, height and width, and whether it is flipped."""
    source, size = (draw(sides), draw(sides)), (draw(sides), draw(sides))
    height, width = draw(st.integers(1, source[0])), draw(st.integers(1, source[1]))
    top, left = draw(st.integers(0, source[0] - height)), draw(st.integers(0, source[1] - width))
    return source, size, (top, left, height, width), draw(st.booleans())


@given(st.lists(boxes(), min_size=1, max_size=4), st.integers(0, 2**31))
def test_resized_crops_are_torchvisions(
    cases: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int], bool]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for source, size, box, flip in cases:
        image = torch.randint(256, (3, *source), dtype=torch.uint8, generator=generator)
        (result,) = ResizedCrop(source, size)(image[None], torch.tensor([*box, flip])[:, None])
        assert result.dtype == torch.uint8 and result.shape == (3, *size)
        result = oracle.hflip(result) if flip else result
        difference = (result.int() - v2.functional.resized_crop(image, *box, size, antialias=True).int()).abs()
        assert difference.max() <= 2  # torchvision rounds twice: after the width and after the height
        assert difference.float().mean() <= 1
        crop = oracle.crop(image, *box).double()[None]
        exact = F.interpolate(crop, size, mode="bilinear", antialias=True)[0]
        assert (result - exact).abs().max() <= 0.5 + 1e-2


@pytest.mark.parametrize("size", [(224, 224), (20, 150), (300, 40)])
def test_resized_crops_of_a_whole_batch_are_torchvisions(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 3 * 256 * 200)  # three parts of 3, 3 and 2 images
    augmentation, images = ResizedCrop((256, 200), size), random_images(8, 256, 200)
    drawn = augmentation.draw(8, torch.Generator().manual_seed(0))
    for image, result, (*box, flip) in zip(images, augmentation(images, drawn), drawn.T.tolist(), strict=True):
        expected = v2.functional.resized_crop(image, *box, size, antialias=True)
        difference = (result.int() - (oracle.hflip(expected) if flip else expected).int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.3


def test_a_box_of_the_whole_size_is_a_copy() -> None:
    images = random_images(2, 40, 30)
    box = torch.tensor([[3, 0], [2, 5], [31, 31], [25, 25], [0, 0]])
    expected = torch.stack([images[0, :, 3:34, 2:27], images[1, :, :31, 5:30]])
    assert torch.equal(ResizedCrop((40, 30), (31, 25))(images, box), expected)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
def test_every_box_lies_within_its_image(height: int, width: int, seed: int) -> None:
    drawn = ResizedCrop((height, width), (8, 8)).draw(200, torch.Generator().manual_seed(seed))
    top, left, heights, widths, flip = drawn
    assert drawn.dtype == torch.int64 and drawn.shape == (5, 200)
    assert (heights >= 1).all() and (widths >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + heights <= height).all() and (left + widths <= width).all()
    assert set(flip.tolist()) == {0, 1}


def torchvisions_boxes(source: tuple[int, int], count: int) -> Tensor:
    """Return boxes (top, left, height, width) that torchvision draws: (4, count)."""
    transform = v2.RandomResizedCrop(8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [transform.make_params([torch.empty(3, *source)]) for _ in range(count)]
    return torch.tensor([[each[name] for each in drawn] for name in ("top", "left", "height", "width")])


@pytest.mark.parametrize("source", [(64, 64), (48, 90), (90, 40), (20, 200), (200, 20), (5, 4), (2, 2), (1, 1)])
def test_boxes_have_the_distribution_of_torchvisions(source: tuple[int, int]) -> None:
    count = 3000
    top, left, height, width, flip = ResizedCrop(source, (8, 8)).draw(4 * count, torch.Generator().manual_seed(0))
    theirs = torchvisions_boxes(source, count)
    ours = torch.stack([top, left, height, width])
    for what in (
        *(lambda boxes, row=row: boxes[row] for row in range(4)),
        lambda boxes: boxes[2] * boxes[3],
        lambda boxes: boxes[2] / boxes[3],
        lambda boxes: boxes[0] / (source[0] - boxes[2]).clamp(min=1),  # where in its room a box lies
        lambda boxes: boxes[1] / (source[1] - boxes[3]).clamp(min=1),
        lambda boxes: boxes[0] * boxes[1],
    ):
        assert stats.ks_2samp(what(ours).numpy(), what(theirs).numpy()).pvalue > 1e-4
    assert stats.binomtest(int(flip.sum()), 4 * count).pvalue > 1e-4
    if source in ((20, 200), (200, 20)):  # nearly no box fits: the fallback's
        fallback = (ours == module._centred_box(source)[:, None]).all(0)
        assert fallback.float().mean() > 0.1


@given(st.integers(1, 100), st.integers(1, 100))
def test_the_box_for_an_image_that_no_box_fits_is_torchvisions(height: int, width: int) -> None:
    never = v2.RandomResizedCrop(8, scale=(4.0, 4.0))  # larger than the image
    expected = never.make_params([torch.empty(3, height, width)])
    box = [expected[name] for name in ("top", "left", "height", "width")]
    assert module._centred_box((height, width)).tolist() == box


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
