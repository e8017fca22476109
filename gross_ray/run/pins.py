"""Pins of a run folder: it stores hashes of its images and of the user's weights, and refuses others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gross_ray.data.identity import ANOTHER_RUN, SHORT, DataIdentity, identity_of
from gross_ray.errors import InvalidValueError
from gross_ray.run.store import RunStore

if TYPE_CHECKING:  # a fingerprint is read without torch
    from torch import Tensor

    from gross_ray.data.image_set import Splits

_RESTORE_OR_RESTART = "restore the first file, or start another run folder with --out"


def pin(store: RunStore, splits: Splits) -> None:
    """Store the identity of a run's images, or compare it with the stored identity.

    Raises DatasetError, naming the split and both hashes, if they differ.
    """
    stored, loaded = stored_data(store), identity_of(splits)
    if stored is None:
        store.write_pin("data", loaded.to_dict())
    else:
        stored.check(loaded, str(store.storage))


def pin_weights(store: RunStore, tensors: Mapping[str, Tensor]) -> None:
    """Store the hash of the user's weights, or compare it with the stored hash.

    Raises InvalidValueError, naming both hashes, if they differ.
    """
    from gross_ray.weights import hash_of_tensors

    found = hash_of_tensors(tensors)
    if stored_weights(store) is None:
        store.write_pin("weights", {"hash": found})
    else:
        check_weights(store, store.experiment.weights, found)


def check_data(store: RunStore, splits: Splits, remedy: str = ANOTHER_RUN) -> None:
    """Raise DatasetError if `store` has an identity of its images and these images differ from it."""
    if (stored := stored_data(store)) is not None:
        stored.check(identity_of(splits), str(store.storage), remedy)


def check_weights(store: RunStore, path: str, found: str, remedy: str = _RESTORE_OR_RESTART) -> None:
    """Raise InvalidValueError if `store` has a hash of weights and `found`, the hash of the file `path`, differs."""
    stored = stored_weights(store)
    if stored is not None and stored != found:
        raise InvalidValueError(
            f"weights {path}: the tensors differ from those that {store.storage} was made with: their hash is "
            f"{found[:SHORT]}, not {stored[:SHORT]}; {remedy}"
        )


def stored_data(store: RunStore) -> DataIdentity | None:
    """Return the identity of the images that a run folder was made with; None if none is stored yet."""
    return store.read_pin("data", DataIdentity.from_dict)


def stored_weights(store: RunStore) -> str | None:
    """Return the hash of the user's weights that a run folder was made with; None if it trains its own."""
    return store.read_pin("weights", lambda values: str(values["hash"]))


def fingerprint(store: RunStore) -> str:
    """Return the fingerprint of a run's experiment, in which the stored hashes replace paths."""
    data = stored_data(store)
    return store.experiment.fingerprint(weights=stored_weights(store) or "", data="" if data is None else data.hash)
