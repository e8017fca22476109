"""A run folder's images and given weights are pinned: it stores their hashes, and other ones are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gross_ray.data.identity import ANOTHER_RUN, SHORT, DataIdentity, identity_of
from gross_ray.errors import InvalidValueError
from gross_ray.run.store import RunStore

if TYPE_CHECKING:  # a fingerprint is read without torch
    from torch import Tensor

    from gross_ray.data.image_set import Splits

_ANOTHER_RUN = "restore the first file, or start another run folder with --out"


def pin(store: RunStore, splits: Splits) -> None:
    """Store the identity of a run's images, or compare them with the stored one.

    Raises DatasetError, naming the split and both hashes, where the images differ from the stored identity.
    """
    stored, loaded = stored_data(store), identity_of(splits)
    if stored is None:
        store.write_pin("data", loaded.to_dict())
    else:
        stored.check(loaded, str(store.storage))


def pin_weights(store: RunStore, tensors: Mapping[str, Tensor]) -> None:
    """Store the hash of the weights that a run was given, or compare `tensors` with the stored one.

    Raises InvalidValueError, naming both hashes, where the tensors differ.
    """
    from gross_ray.weights import hash_of_tensors

    found = hash_of_tensors(tensors)
    if stored_weights(store) is None:
        store.write_pin("weights", {"hash": found})
    else:
        check_weights(store, store.experiment.weights, found)


def check_data(store: RunStore, splits: Splits, remedy: str = ANOTHER_RUN) -> None:
    """Raise DatasetError where the images differ from the identity that `store` has, if it has one."""
    if (stored := stored_data(store)) is not None:
        stored.check(identity_of(splits), str(store.storage), remedy)


def check_weights(store: RunStore, path: str, found: str, remedy: str = _ANOTHER_RUN) -> None:
    """Raise InvalidValueError where `found`, the hash of the file `path`, is not the one that `store` has, if any."""
    stored = stored_weights(store)
    if stored is not None and stored != found:
        raise InvalidValueError(
            f"weights {path}: the tensors differ from those that {store.storage} was made with: their hash is "
            f"{found[:SHORT]}, not {stored[:SHORT]}; {remedy}"
        )


def stored_data(store: RunStore) -> DataIdentity | None:
    """Return the identity of the images that a run folder was made with; None before any were loaded."""
    return store.read_pin("data", DataIdentity.from_dict)


def stored_weights(store: RunStore) -> str | None:
    """Return the hash of the weights that a run folder was made with; None where none were given."""
    return store.read_pin("weights", lambda values: str(values["hash"]))


def fingerprint(store: RunStore) -> str:
    """Return the fingerprint of a run's experiment, with the stored hashes in place of its paths."""
    data = stored_data(store)
    return store.experiment.fingerprint(weights=stored_weights(store) or "", data="" if data is None else data.hash)
