"""Read trained weights from a user's file: safetensors, or a state dict that torch reads without running code."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gross_ray.errors import InvalidValueError, one_line

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts store the state dict in a file."""
_COUNTER = "num_batches_tracked"
"""Batch-norm's counter, which files of old torch versions lack; torch loads them without it."""
_PREFIXES = ("module.", "_orig_mod.", "module.")
"""Prefixes that DataParallel and torch.compile, in either order, add to every name."""
_PICKLES = (pickle.UnpicklingError, IndexError, EOFError)
"""Errors that torch raises for pickles that it refuses, and for files that are not pickles."""
_MOST_NAMED = 3


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load the weights of a file into `network`, in place.

    `path` ends in .safetensors, or is a file of torch.save, read with weights_only: a state dict, or a dict with the
    state dict under one of WRAPPERS, with or without the prefixes of DataParallel and torch.compile. Raises
    InvalidValueError for a missing or unreadable file, and for weights that are missing, unexpected, of another shape,
    or not finite real numbers, naming the first.
    """
    set_weights(network, read_weights(path), path)


def set_weights(network: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Load `tensors`, read from the file `path`, into `network`; raises InvalidValueError if they do not fit."""
    expected = network.state_dict()
    tensors = _by_names_of(expected, tensors)
    if mismatch := _mismatch(expected, tensors):
        raise InvalidValueError(
            f"weights {path}: belong to another network: {mismatch}; name the model that they were trained in"
        )
    invalid = [name for name, tensor in tensors.items() if tensor.is_complex() or not tensor.isfinite().all()]
    if invalid:
        raise InvalidValueError(
            f"weights {path}: {len(invalid)} contain NaN, infinity or complex numbers ({_first(invalid)}); use weights "
            "of a training that converged"
        )
    network.load_state_dict(tensors)


def restore_state(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a run's stored state dict into a newly built network.

    Raises InvalidValueError, naming `source`, if names or shapes differ because the code that builds the network has
    changed.
    """
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        difference = _mismatch(network.state_dict(), tensors) or one_line(error)
        raise InvalidValueError(
            f"{source} does not fit the network that the model's code builds now: {difference}; restore the code that "
            "the run started with, or start another run folder with --out"
        ) from None


def _mismatch(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Return how `tensors` differ in names and shapes from the state dict `expected`; empty if they fit."""
    wrong = {
        "missing": [name for name in expected if name not in tensors and not name.endswith(_COUNTER)],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    }
    return "; ".join(f"{len(names)} {what} ({_first(names)})" for what, names in wrong.items() if names)


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal digits, of a state dict: names, dtypes, shapes and values.

    The same weights have one hash in every form that `load_weights` accepts: with or without the prefixes of
    DataParallel and torch.compile, a shared tensor under one of its names or all, with or without batch-norm's
    num_batches_tracked.
    """
    tensors = _without_prefixes(tensors)
    digest, seen = hashlib.sha256(), set()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if name.endswith(_COUNTER) or (tensor.numel() and _memory(tensor) in seen):
            continue
        seen.add(_memory(tensor))
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return a file's tensors by name; `load_weights` describes the file and the errors."""
    if not Path(path).is_file():
        raise InvalidValueError(f"weights {path}: there is no such file; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused anyway
            found: Any = (
                load_file(path)
                if Path(path).suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
    except Exception as error:  # of any kind, if torch did not write the file
        # Do not repeat torch's own advice on a pickle, which is to run the code in it.
        reason = "a pickle of code, or not a file of torch.save" if isinstance(error, _PICKLES) else one_line(error)
        raise InvalidValueError(
            f"weights {path}: cannot be read ({reason}); save a state dict with safetensors or torch.save"
        ) from None
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found or not all(map(_is_entry, found.items())):
        raise InvalidValueError(
            f"weights {path}: is a {type(found).__name__}, not a state dict of tensors; save network.state_dict()"
        )
    return dict(found)


def _is_entry(entry: tuple[Any, Any]) -> bool:
    """Return whether a name and a value can be an entry of a network's state dict."""
    name, value = entry
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


def _by_names_of(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors under the names of the network's state dict `expected`.

    Drops prefixes that the network itself does not have, and adds the other names of shared tensors, of which
    safetensors' save_model keeps only one.
    """
    tensors = _without_prefixes(tensors, expected)
    stored = {_memory(tensor): tensors[name] for name, tensor in expected.items() if name in tensors and tensor.numel()}
    missing = {name: _memory(tensor) for name, tensor in expected.items() if name not in tensors}
    return tensors | {name: stored[memory] for name, memory in missing.items() if memory in stored}


def _without_prefixes(tensors: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
    """Drop each prefix of DataParallel and torch.compile that all names have, unless a name is in `keep`."""
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) and name not in keep for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _first(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
