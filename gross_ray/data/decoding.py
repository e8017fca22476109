"""Decoding of images to 8-bit RGB, from any file that Pillow reads.

Shapes: h and w height and width of an image, H and W of a network's input, RH and RW of a stored image
(`gross_ray.data.sizes`).
"""

from __future__ import annotations

import re
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from gross_ray.data.sizes import Sizes

# What PIL raised for damaged files in tests: not all are OSErrors.
PIL_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
TURNED = "turned as EXIF says"
UNREADABLE_EXIF = "with EXIF data that cannot be read"
ALPHA = "with alpha put over white"
SIXTEEN = "of 16 bits a channel"
_KINDS = {"1": "grey", "L": "grey", "LA": "grey", "La": "grey", "P": "palette", "PA": "palette", "CMYK": "CMYK"}
_DEEP_COLOUR = re.compile(r"'(RGB|RGBA|LA);16")
"""How Pillow describes pixels of 16 bits a channel, of which it decodes the high byte."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow names, but cannot decode without another program."""


def image_endings() -> frozenset[str]:
    """Return the endings of the files that Pillow can decode, in lower case, with their dots."""
    known = Image.registered_extensions()
    return frozenset(
        ending.lower() for ending, kind in known.items() if kind in Image.OPEN and kind not in _NOT_DECODED
    )


def decoded(source: Path | bytes) -> tuple[np.ndarray, list[str]]:
    """Decode a file, or its content: return its pixels, (h, w, 3) uint8 RGB, and the names of the conversions made.

    The first image of a file is turned as its EXIF data says, and converted by `as_rgb`. Raises one of PIL_ERRORS.
    """
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
        pixels, conversions = as_rgb(image)  # loads the image: Pillow may find the EXIF data only then
        try:
            orientation = image.getexif().get(_ORIENTATION, 1)
        except PIL_ERRORS:
            return pixels, [*conversions, UNREADABLE_EXIF]
    if orientation not in _TURNS:
        return pixels, conversions
    return np.asarray(Image.fromarray(pixels).transpose(_TURNS[orientation])), [*conversions, TURNED]


def as_rgb(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """Return an image's pixels, (h, w, 3) uint8 RGB, and the names of the conversions that were made.

    Grey and CMYK images and palettes are converted as Pillow does, and transparent pixels are put over white. Grey
    values of 16 bits are divided by 257 and rounded; of colours of 16 bits a channel, Pillow decodes the high byte,
    which differs from that by at most 1. Raises ValueError for floating-point and 32-bit pixels, and otherwise one of
    PIL_ERRORS.
    """
    conversions = [SIXTEEN] if _DEEP_COLOUR.search(str(getattr(image, "tile", ""))) else []
    image.load()
    if image.mode.startswith("F"):
        raise ValueError("its pixels are floating-point numbers; only 8 and 16 bits a channel can be read")
    if image.mode.startswith("I"):
        return _from_16_bits(image), ["grey", SIXTEEN]
    if image.mode in _KINDS:
        conversions.append(_KINDS[image.mode])
    if _may_be_transparent(image):
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            conversions.append(ALPHA)
    return np.asarray(image.convert("RGB")), conversions


def fitted(pixels: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Return an image (h, w, 3), uint8, as it is stored, (RH, RW, 3): resized, and cut to the part around its centre.

    It is resized as by torchvision's Resize (bilinear, antialiased): the pixels are those of Pillow, and the centre
    of H x W pixels is that of CenterCrop.
    """
    grid, top, left = sizes.kept(pixels.shape[:2])
    (height, width), (whole_height, whole_width) = sizes.stored, pixels.shape[:2]
    if grid == (whole_height, whole_width):
        return pixels[top : top + height, left : left + width]
    down, right = whole_height / grid[0], whole_width / grid[1]
    # Pillow computes only the pixels in the box, and reads those around it where its filter reaches them.
    box = (left * right, top * down, (left + width) * right, (top + height) * down)
    box = (*box[:2], min(box[2], whole_width), min(box[3], whole_height))
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box))


def _may_be_transparent(image: Image.Image) -> bool:
    """Return whether an image has an alpha channel, a transparent colour, or a palette with alpha."""
    palette = image.palette is not None and image.palette.mode.endswith("A")
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or palette or "transparency" in image.info


def _from_16_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() < 2**16:
        found = f"its pixels are from {values.min()} to {values.max()}"
        raise ValueError(f"{found}; only 8 and 16 bits a channel (0 to 65535) can be read")
    grey = ((values + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return np.repeat(grey[..., None], 3, axis=2)
