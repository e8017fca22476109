"""Images of every kind that Pillow reads become 8-bit RGB."""

from __future__ import annotations

import struct
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from gross_ray.data.decoding import PIL_ERRORS, as_rgb, decoded, image_endings

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 6))
CHANNELS = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}


def content(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(mode: str) -> st.SearchStrategy[np.ndarray]:
    return SHAPES.flatmap(lambda shape: arrays(np.uint8, (*shape, *CHANNELS[mode])))


@given(st.sampled_from(["L", "RGB"]).flatmap(pixels_of), st.sampled_from(["PNG", "BMP", "TIFF", "PPM", "TGA"]))
@settings(deadline=None)
def test_eight_bits_stay_what_they_are(pixels: np.ndarray, kind: str) -> None:
    found, conversions = decoded(content(Image.fromarray(pixels), kind))
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1))
    assert conversions == ([] if pixels.ndim == 3 else ["grey"])


@given(SHAPES.flatmap(lambda shape: arrays(np.uint16, shape)), st.sampled_from(["PNG", "TIFF"]))
@settings(deadline=None)
def test_sixteen_bits_are_divided_by_257(pixels: np.ndarray, kind: str) -> None:
    found, conversions = decoded(content(Image.fromarray(pixels), kind))
    assert np.array_equal(found, np.repeat(np.rint(pixels / 257)[..., None], 3, axis=2))
    assert conversions == ["grey", "of 16 bits a channel"]


def test_pixels_of_32_bits_are_taken_for_16_bits_or_refused() -> None:
    pixels = np.array([[0, 257, 65535]], np.int32)
    assert as_rgb(Image.fromarray(pixels))[0][0, :, 0].tolist() == [0, 1, 255]
    for wrong in (-1, 65536):
        with pytest.raises(ValueError, match=r"from (-1|257) to (65535|65536); only 8 and 16 bits a channel"):
            as_rgb(Image.fromarray(np.array([[257, 65535, wrong]], np.int32)))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point numbers; only 8 and 16 bits"):
        decoded(content(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


@given(st.sampled_from(["LA", "RGBA"]).flatmap(pixels_of))
@settings(deadline=None)
def test_alpha_is_put_over_white(pixels: np.ndarray) -> None:
    found, conversions = decoded(content(Image.fromarray(pixels)))
    colour, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
    assert np.abs(found - (colour * alpha + 255 * (1 - alpha))).max() <= 1
    assert ("with alpha put over white" in conversions) == bool((alpha < 1).any())
    pixels[..., -1] = 255
    found, conversions = decoded(content(Image.fromarray(pixels)))
    assert np.array_equal(found, np.broadcast_to(pixels[..., :-1], found.shape))  # no rounding where it is opaque
    assert "with alpha put over white" not in conversions


@given(pixels_of("CMYK"))
@settings(deadline=None)
def test_cmyk_is_converted_as_pillow_does(pixels: np.ndarray) -> None:
    found, conversions = decoded(content(Image.fromarray(pixels, "CMYK"), "TIFF"))
    cyan_magenta_yellow, black = pixels[..., :3].astype(float), pixels[..., 3:].astype(float)
    assert np.abs(found - (255 - cyan_magenta_yellow) * (255 - black) / 255).max() <= 1
    assert conversions == ["CMYK"]


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00\x80"])
def test_palettes(transparency: int | bytes | None) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
    options = {} if transparency is None else {"transparency": transparency}
    found, conversions = decoded(content(image, **options))
    expected = [[200, 0, 0], [0, 100, 0], [0, 0, 50]]
    if transparency is not None:
        expected[1] = [255, 255, 255]
    if isinstance(transparency, bytes):
        expected[2] = [127, 127, 152]
    assert np.abs(found[0].astype(int) - expected).max() <= 1
    assert conversions == ["palette"] + ["with alpha put over white"] * (transparency is not None)


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7)), ("I;16", 700)])
def test_a_transparent_colour_is_white(mode: str, key: int | tuple[int, int, int]) -> None:
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), key)
    found, _ = decoded(content(image, transparency=key))
    assert found[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def deep_png(rows: np.ndarray, kind: int) -> bytes:
    """Return a PNG of 16 bits a channel, which Pillow cannot write: (H, W, channels) uint16, colour type `kind`."""
    import zlib

    def chunk(name: bytes, inner: bytes) -> bytes:
        return struct.pack(">I", len(inner)) + name + inner + struct.pack(">I", zlib.crc32(name + inner))

    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("channels", "kind"), [(3, 2), (2, 4), (4, 6)])
def test_colours_of_sixteen_bits_are_scaled(channels: int, kind: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 2**16, (5, 4, channels), dtype=np.uint16)
    if channels != 3:
        pixels[..., -1] = 65535
    found, conversions = decoded(deep_png(pixels, kind))
    expected = (pixels if channels == 3 else pixels[..., :-1]) / 257
    assert np.abs(found - expected).max() <= 1
    assert "of 16 bits a channel" in conversions


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = 250, 90, 170
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    found, conversions = decoded(content(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= (12 if kind == "JPEG" else 0)
    if kind != "TIFF":  # Pillow turns these itself
        assert conversions == ["turned as EXIF says"] * (orientation > 1)


def test_exif_data_that_cannot_be_read_is_counted() -> None:
    found, conversions = decoded(content(Image.new("RGB", (2, 1)), "PNG", exif=b"Exif\0\0MM\0*"))
    assert found.shape == (1, 2, 3)
    assert conversions == ["with EXIF data that cannot be read"]


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_damaged_files_raise_known_errors_only(data: st.DataObject) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX"]))
    file = bytearray(content(image, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {})))
    for _ in range(data.draw(st.integers(1, 3))):
        file[data.draw(st.integers(0, min(len(file), 150) - 1))] = data.draw(st.integers(0, 255))
    file = file[: data.draw(st.integers(1, len(file)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found, _ = decoded(bytes(file))
        except PIL_ERRORS:
            return
    assert found.ndim == 3 and found.shape[2] == 3 and found.dtype == np.uint8


def test_files_and_their_content_are_the_same(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    assert np.array_equal(decoded(tmp_path / "a.png")[0], decoded((tmp_path / "a.png").read_bytes())[0])


def test_endings_are_those_of_files_that_pillow_decodes_by_itself() -> None:
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".tga"} <= image_endings()
    assert not {".h5", ".eps", ".ps", ".pdf", ".mpg", ".txt", ""} & image_endings()
