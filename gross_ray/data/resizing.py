"""Resizing of images that are in memory already."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from gross_ray.data.decoding import fitted
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.options import DataOptions
from gross_ray.data.sizes import Sizes, parse_size, usual_resize


def resized(splits: Splits, options: DataOptions) -> Splits:
    """Return the images, all of one size, (N, 3, h, w), resized as `options` say."""
    size = parse_size(options.image_size)
    if size is None:
        return splits
    shorter = min(splits.train.images.shape[2:])
    sizes = Sizes.of(size, options.resize or usual_resize(size, [shorter]))

    def resized(images: ImageSet) -> ImageSet:
        stored = np.empty((len(images), 3, *sizes.stored), np.uint8)
        for number, image in enumerate(images.images.numpy()):
            stored[number] = fitted(np.ascontiguousarray(image.transpose(1, 2, 0)), sizes).transpose(2, 0, 1)
        return ImageSet.centred(torch.from_numpy(stored), sizes.size, images.labels)

    number = sum(len(each) for each in (splits.train, splits.validation, splits.test))
    before = splits.train.images.shape[2:]
    smaller = any(size < stored for size, stored in zip(before, sizes.stored, strict=True))
    notes = [sizes.note(number, number * smaller)] if sizes.stored != tuple(before) else []
    sets = [resized(each) for each in (splits.train, splits.validation, splits.test)]
    return replace(splits, train=sets[0], validation=sets[1], test=sets[2], notes=(*splits.notes, *notes), sizes=sizes)
