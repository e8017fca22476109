"""Assertions on the three splits of a dataset, for several files of tests."""

from __future__ import annotations

import torch

from gross_ray.data.identity import SPLITS
from gross_ray.data.image_set import ImageSet, Splits


def sizes(splits: Splits) -> tuple[int, ...]:
    return tuple(len(getattr(splits, split)) for split in SPLITS)


def keys(images: ImageSet) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.images]


def assert_equal(a: Splits, b: Splits) -> None:
    for split in SPLITS:
        assert torch.equal(getattr(a, split).images, getattr(b, split).images)
        assert torch.equal(getattr(a, split).labels, getattr(b, split).labels)
    assert a.classes == b.classes


def assert_prefixes_balanced(labels: torch.Tensor, num_classes: int) -> None:
    """For classes of one size: no prefix has two more images of one class than of another."""
    counts = torch.nn.functional.one_hot(labels, num_classes).cumsum(0)
    assert (counts.max(1).values - counts.min(1).values).max() <= 1


def assert_well_formed(splits: Splits, size: tuple[int, int]) -> None:
    for split in SPLITS:
        images = getattr(splits, split)
        assert images.images.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert images.images.shape == (len(images.labels), 3, *size)
        assert images.images.is_contiguous()
        assert_prefixes_balanced(images.labels, len(splits.classes))
