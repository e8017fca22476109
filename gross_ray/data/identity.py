"""The identity of a dataset: hashes of the decoded images and labels, to compare two loads.

It does not depend on the images' source (a folder, a Parquet file, a function) or their memory layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gross_ray.errors import DatasetError, InvalidValueError

if TYPE_CHECKING:
    from gross_ray.data.image_set import ImageSet, Splits

SPLITS = ("train", "validation", "test")
SHORT = 12
"""How many hexadecimal digits of a hash a message shows."""
ANOTHER_RUN = (
    "restore the images (a data function must split with a seed, like torch.Generator().manual_seed(0)), "
    "or start another run folder with --out"
)
"""The remedy if a run folder was made with other images."""
_BYTES_AT_A_TIME = 2**24


@dataclass(frozen=True)
class SplitIdentity:
    """The identity of one split."""

    hash: str
    """SHA-256 of its images and labels in their order, in hexadecimal digits."""
    count: int
    """Number of images."""


@dataclass(frozen=True)
class DataIdentity:
    """The identity of the three splits, and the names of the classes."""

    train: SplitIdentity
    validation: SplitIdentity
    test: SplitIdentity
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""

    @property
    def hash(self) -> str:
        """SHA-256 of all of it, in hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as plain values for JSON."""
        return dataclasses.asdict(self) | {"classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataIdentity:
        """Return the identity that `to_dict` converted; raises InvalidValueError for anything else."""
        try:
            train, validation, test = (
                SplitIdentity(str(values[split]["hash"]), int(values[split]["count"])) for split in SPLITS
            )
            return cls(train, validation, test, tuple(map(str, values["classes"])))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidValueError(
                f"not the hashes of a dataset's splits: {error!r}; write what to_dict returns"
            ) from None

    def check(self, other: DataIdentity, where: str, remedy: str = ANOTHER_RUN) -> None:
        """Raise DatasetError unless `other`, of the images loaded now, equals this identity, stored in `where`.

        The message names the first split that differs and both hashes, or the first class name that differs.
        """
        for split in SPLITS:
            stored, loaded = getattr(self, split), getattr(other, split)
            if stored != loaded:
                raise DatasetError(
                    f"the {split} split differs from the one that {where} was made with: its hash is {_text(loaded)}, "
                    f"not {_text(stored)}; {remedy}"
                )
        if self.classes != other.classes:
            raise DatasetError(
                f"the class names differ from those that {where} was made with: {_difference(other, self)}; {remedy}"
            )


def identity_of(splits: Splits) -> DataIdentity:
    """Return the identity of loaded images: equal, on any machine, if images, labels, class names and order are."""
    train, validation, test = (_split_identity(getattr(splits, split)) for split in SPLITS)
    return DataIdentity(train, validation, test, tuple(splits.classes))


def _split_identity(images: ImageSet) -> SplitIdentity:
    """Hash shape, dtype and values of images, with their margin, and labels, in slices to avoid a second copy."""
    if images.mapped is not None and images.mapped.count == len(images):
        return SplitIdentity(images.mapped.hash, len(images))
    digest = hashlib.sha256()
    for tensor, dtype in ((images.stored, "u1"), (images.labels, "<i8")):
        digest.update(json.dumps([dtype, list(tensor.shape)]).encode())
        for part in tensor.split(max(1, _BYTES_AT_A_TIME // max(1, tensor[:1].nbytes))):
            values = part.cpu().contiguous().numpy()
            digest.update(values.astype(dtype, copy=False).data)
    return SplitIdentity(digest.hexdigest(), len(images))


def _text(split: SplitIdentity) -> str:
    return f"{split.hash[:SHORT]} ({split.count} images)"


def _difference(loaded: DataIdentity, stored: DataIdentity) -> str:
    if len(loaded.classes) != len(stored.classes):
        return f"{len(loaded.classes)} names, not {len(stored.classes)}"
    pairs = enumerate(zip(loaded.classes, stored.classes, strict=True))
    number, (now, then) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    return f"class {number} is {now!r}, not {then!r}"
