"""Images of any size become images of one size, as torchvision resizes and crops them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torchvision.transforms import v2

from gross_ray.data.decoding import fitted
from gross_ray.data.image_set import centre
from gross_ray.data.sizes import Sizes, parse_size, usual_resize
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import DataOptions, Experiment

SIDE = st.integers(1, 60)
ASPECTS = st.tuples(SIDE, SIDE) | st.tuples(st.integers(1, 3), st.integers(100, 400))
SHAPES = st.tuples(ASPECTS, st.booleans()).map(lambda drawn: drawn[0][::-1] if drawn[1] else drawn[0])


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """Return an image of waves and some noise, (height, width, 3), uint8."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows * a + columns * b) for a, b in generator.normal(0, 0.4, (3, 2))]
    pixels = 128 + 100 * np.stack(waves, -1) + generator.normal(0, 9, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def cut(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the centre of an image as networks take it, (H, W, 3)."""
    return centre(torch.from_numpy(pixels.copy()).permute(2, 0, 1), size).permute(1, 2, 0).numpy()


def margin(of: int) -> st.SearchStrategy[int]:
    return st.integers(of, of + 12)


SQUARES = st.integers(1, 40).flatmap(lambda side: st.tuples(st.just(side), margin(side)))


@given(SHAPES, SQUARES, st.integers(0, 99))
@example((37, 53), (224, 256), 0)
@example((500, 375), (224, 256), 0)
@example((1, 400), (40, 52), 0)
@settings(max_examples=150)
def test_the_centre_is_that_of_torchvision(shape: tuple[int, int], square: tuple[int, int], seed: int) -> None:
    (side, resize), pixels = square, smooth(*shape, seed)
    stored = fitted(pixels, Sizes.of((side, side), resize))
    assert stored.shape == (resize, resize, 3)
    as_torchvision = v2.Compose([v2.Resize(resize), v2.CenterCrop(side)])
    found = cut(stored, (side, side)).astype(int)
    assert np.abs(found - np.asarray(as_torchvision(Image.fromarray(pixels)))).max() <= 1
    of_tensor = as_torchvision(torch.from_numpy(pixels).permute(2, 0, 1).float()).permute(1, 2, 0).numpy()
    assert np.abs(found - of_tensor).mean() <= 1  # a level is 1/255


@given(SHAPES, st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 12), st.integers(0, 99))
@settings(max_examples=100)
def test_images_that_are_not_square_just_cover_what_is_stored(
    shape: tuple[int, int], size: tuple[int, int], more: int, seed: int
) -> None:
    sizes, pixels = Sizes.of(size, min(size) + more), smooth(*shape, seed)
    stored = fitted(pixels, sizes)
    assert stored.shape == (*sizes.stored, 3)
    scales = [wanted / there for wanted, there in zip(sizes.stored, shape, strict=True)]
    grid = [
        max(wanted, math.floor(max(scales) * there + 1e-9)) for wanted, there in zip(sizes.stored, shape, strict=True)
    ]
    whole = v2.CenterCrop(size)(Image.fromarray(pixels).resize(grid[::-1], Image.Resampling.BILINEAR))
    assert np.abs(cut(stored, size).astype(int) - np.asarray(whole)).max() <= 1


@given(st.tuples(st.integers(1, 99), st.integers(1, 99)), st.integers(0, 40))
def test_what_is_stored_has_the_shape_of_the_input_and_the_shorter_side(size: tuple[int, int], more: int) -> None:
    resize = min(size) + more
    stored = Sizes.of(size, resize).stored
    assert min(stored) == resize
    assert all(there >= wanted for there, wanted in zip(stored, size, strict=True))
    assert abs(stored[0] / stored[1] - size[0] / size[1]) <= max(size) / min(size) / resize


@given(SHAPES.flatmap(lambda shape: arrays(np.uint8, (*shape, 3))), st.integers(0, 9))
def test_an_image_of_the_stored_size_is_unchanged(pixels: np.ndarray, less: int) -> None:
    height, width = pixels.shape[:2]
    assume(less < min(height, width))
    assert np.array_equal(fitted(pixels, Sizes((height - less, width - less), (height, width))), pixels)
    # Of a longer image, whose shorter side is that of the grid, the middle is stored, pixel for pixel.
    short = min(height, width)
    top, left = (round((side - short) / 2) for side in (height, width))
    kept = fitted(pixels, Sizes((short, short), (short, short)))
    assert np.array_equal(kept, pixels[top : top + short, left : left + short])


# --- sizes and options


@given(st.integers(1, 99999), st.integers(1, 99999), st.sampled_from(["", " "]))
def test_sizes_are_parsed(height: int, width: int, around: str) -> None:
    assert parse_size(f"{around}{height}x{width}{around}") == (height, width)
    assert parse_size(f"{height}{around}") == (height, height)


def test_no_size() -> None:
    assert parse_size("") is None


@pytest.mark.parametrize(
    "text", ["0", "-1", "224x", "x224", "224x0", "1e3", "224.0", "a", "224 x 224", "1x2x3", "100000"]
)
def test_texts_that_are_no_sizes(text: str) -> None:
    complaint = f"data.image_size = {text!r}: must be a number of pixels like 224, or HEIGHTxWIDTH"
    for refused in (lambda: parse_size(text), lambda: DataOptions(image_size=text)):
        with pytest.raises(InvalidValueError, match=re.escape(complaint)) as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_there_is_a_margin_if_some_images_are_larger() -> None:
    assert usual_resize((224, 224), [500, 300]) == 256
    assert usual_resize((224, 224), [100, 225]) == 256
    assert usual_resize((224, 224), [224, 100]) == 224
    assert usual_resize((320, 160), [500]) == round(160 * 256 / 224)


def test_equal_sizes_have_equal_fingerprints() -> None:
    sizes: list[object] = [224, "224", "224x224", " 224", (224, 224), [224, 224]]
    experiments = [Experiment(data=DataOptions(image_size=size)) for size in sizes]  # type: ignore[arg-type]
    experiments.append(Experiment().override(["data.image_size=224"]))
    experiments.append(Experiment().override(['data.image_size="224x224"']))
    assert len({experiment.fingerprint(data="x") for experiment in experiments}) == 1
    assert {experiment.data.image_size for experiment in experiments} == {"224"}
    other = Experiment().override(["data.image_size=224x160"])
    assert other.data.image_size == "224x160"
    assert other.fingerprint(data="x") != experiments[0].fingerprint(data="x")


@pytest.mark.parametrize(("size", "resize"), [("224", 223), ("320x224", 100), ("32", -1)])
def test_stored_images_are_not_smaller_than_those_of_the_network(size: str, resize: int) -> None:
    rule = f"data.resize = {resize}: must be 0 (automatic) or more, and at least data.image_size, {size}"
    with pytest.raises(InvalidValueError, match=re.escape(rule)) as caught:
        DataOptions(image_size=size, resize=resize)
    assert "\n" not in str(caught.value)
    assert DataOptions(image_size="320x224", resize=224).resize == 224
