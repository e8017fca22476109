"""The embedded sample: 10,000 images of Fashion-MNIST in a Parquet file.

Shapes: H height, W width.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from gross_ray.data.decoding import PIL_ERRORS
from gross_ray.data.fashion_mnist import FASHION_SIZE, padded_rgb
from gross_ray.data.identity import SPLITS
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.options import DataOptions
from gross_ray.errors import DatasetError, one_line

SAMPLE_FILE = Path(__file__).with_name("sample.parquet")
SAMPLE_SCHEMA = pa.schema([("split", pa.string()), ("label", pa.int8()), ("png", pa.binary())])


def read_sample(path: Path, limits: DataOptions) -> Splits:
    """Read a file that scripts/make_sample.py wrote; raises DatasetError if it is damaged.

    Of each split, only the images within its limit are decoded.
    """
    remedy = "reinstall gross_ray, or make the file with scripts/make_sample.py"
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"sample: {path} cannot be read ({one_line(error)}); {remedy}") from error
    metadata = table.schema.metadata or {}
    if table.schema.remove_metadata() != SAMPLE_SCHEMA or b"classes" not in metadata:
        expected = ", ".join(f"{field.name} {field.type}" for field in SAMPLE_SCHEMA)
        found = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        raise DatasetError(f"sample: {path} has the columns {found}, not {expected} and class names; {remedy}")
    names, labels = (table[column].to_pylist() for column in ("split", "label"))
    rows = {split: [row for row, name in enumerate(names) if name == split] for split in SPLITS}
    kept = {split: indices[: getattr(limits, f"limit_{split}") or None] for split, indices in rows.items()}
    pngs = table["png"].take(pa.array([row for indices in kept.values() for row in indices], pa.int64())).to_pylist()
    try:
        classes = tuple(json.loads(metadata[b"classes"]))
        images = [_grey_pixels(png) for png in pngs]
    except PIL_ERRORS as error:
        wrong = f"holds an unreadable image or class names ({one_line(error)})"
        raise DatasetError(f"sample: {path} {wrong}; {remedy}") from error
    size = (FASHION_SIZE, FASHION_SIZE)
    strange = {*names} - {*SPLITS} | {*labels} - {*range(len(classes))} | {image.shape for image in images} - {size}
    if strange or not images:
        wrong = f"has {len(images)} images and the unknown splits, labels or image sizes {strange or 'none'}"
        raise DatasetError(f"sample: {path} {wrong}; {remedy}")
    pixels = padded_rgb(torch.from_numpy(np.stack(images))).split([len(indices) for indices in kept.values()])
    train, validation, test = (
        ImageSet(images, torch.tensor(labels)[indices]) for images, indices in zip(pixels, kept.values(), strict=True)
    )
    return Splits("sample", train, validation, test, classes)


def _grey_pixels(png: bytes) -> np.ndarray:
    """Return uint8 pixels (H, W); raises one of PIL_ERRORS."""
    with Image.open(BytesIO(png)) as image:
        return np.asarray(image.convert("L"))
