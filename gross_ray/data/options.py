"""Options of the data: which images, and how many of them."""

from __future__ import annotations

from dataclasses import dataclass

from gross_ray.data.names import check_dataset_name
from gross_ray.data.normalisation import DEVIATION, MEAN, Normalisation
from gross_ray.data.sizes import parse_size, size_text
from gross_ray.fields import require, settle

VALIDATION_FROM = ("train", "test")
"""The splits from which the validation split may be taken."""


def check_limit(name: str, split: str, size: int, options: DataOptions) -> None:
    """Raise InvalidValueError if more images of a split are asked for than the dataset `name` has: `size`."""
    limit = getattr(options, f"limit_{split}")
    rule = f"the {split} split of {name} has {size} images; use at most {size}, or 0 for all"
    require(limit <= size, f"data.limit_{split}", limit, rule)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which images, and how many of them."""

    name: str = "sample"
    """Dataset: folder:PATH, parquet:PATH, hf:NAME, package.module:function, which returns torch datasets, sample,
    fashion-mnist, cifar10, cifar100, svhn or stl10."""
    channels: int = 3
    """Channels of the images: 3 (RGB; grey images are repeated), or 1 (grey: the luminance)."""
    mean: tuple[float, ...] = (MEAN,)
    """Mean for the normalisation of pixels (0 to 1): one for all channels, or one for each of three."""
    std: tuple[float, ...] = (DEVIATION,)
    """Standard deviation for the normalisation of pixels: one for all channels, or one for each of three."""
    image_size: str = ""
    """Height and width of the images as networks take them, like 224 or 224x160: images of any size are resized and
    their centres taken; empty: images of one size, unchanged."""
    resize: int = 0
    """Shorter side in pixels to which images are resized, from which trainings draw crops of image_size; 0: image_size
    times 256/224, or image_size if none of the first hundred images is larger than it."""
    memory: int = 0
    """Bytes of images up to which they are kept in memory, and not in a file; 0: a quarter of the free memory."""
    validation_from: str = "train"
    """train: the validation split is the dataset's own, or part of its training images; test: half of its test split,
    for weights that were trained on all training images."""
    skip_damaged: bool = False
    """Pass over images that cannot be decoded, and report them, in place of stopping at the first (folder, parquet)."""
    image_column: str = ""
    """Column with the images of a Parquet or Hugging Face dataset; empty: found by its type."""
    label_column: str = ""
    """Column with the classes of a Parquet or Hugging Face dataset; empty: found by its type, or called label."""
    limit_train: int = 0
    """Use only the first `limit_train` training images (0: all)."""
    limit_validation: int = 0
    """Use only the first `limit_validation` validation images (0: all)."""
    limit_test: int = 0
    """Use only the first `limit_test` test images (0: all)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", size_text(self.image_size))
        settle(self, "data.")
        check_dataset_name(self.name)
        size = parse_size(self.image_size)
        rule = "must be 0 (automatic) or more" + (f", and at least data.image_size, {self.image_size}" if size else "")
        fits = self.resize == 0 or size is None or self.resize >= min(size)
        require(self.resize >= 0 and fits, "data.resize", self.resize, rule)
        require(self.memory >= 0, "data.memory", self.memory, "must be 0 (automatic) or more")
        Normalisation(self.mean, self.std)
        rule = f"must be one of {', '.join(VALIDATION_FROM)}"
        require(self.validation_from in VALIDATION_FROM, "data.validation_from", self.validation_from, rule)
        require(self.channels in (1, 3), "data.channels", self.channels, "must be 3 (RGB) or 1 (grey)")
        one_each = self.channels == 3 or len(self.mean) == len(self.std) == 1
        require(one_each, "data.channels", self.channels, "grey images take one number as data.mean, one as data.std")
        for name in ("limit_train", "limit_validation", "limit_test"):
            require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "must be 0 (all images) or more")
