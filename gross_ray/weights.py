"""Trained weights of one's own, from a file: safetensors, or a state dict that torch reads without running code."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gross_ray.errors import InvalidValueError, one_line

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Names under which training scripts put the state dict into a file."""
_COUNTED = "num_batches_tracked"
"""Of batch-norm; files of before torch had it lack it, and torch does without."""
_PREFIXES = ("module.", "_orig_mod.", "module.")
"""What DataParallel and torch.compile, in either order, put before every name."""
_PICKLES = (pickle.UnpicklingError, IndexError, EOFError)
"""What torch raises for pickles that it refuses, and for files that are none."""
_MOST_NAMED = 3


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Put the weights of a file into `network`, in place.

    `path` ends in .safetensors, or is a file of torch.save, read with weights_only: a state dict by itself or under one
    of WRAPPERS, its names with or without the prefixes of DataParallel and torch.compile. Raises InvalidValueError for
    a file that is missing or no such file, and for weights that are missing, unexpected, of another shape or no finite
    real numbers, naming the first.
    """
    set_weights(network, read_weights(path), path)


def set_weights(network: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Put `tensors`, those of the file `path`, into `network`; raises InvalidValueError where they do not fit it."""
    expected = network.state_dict()
    tensors = fitted(expected, tensors)
    if told := misfit(expected, tensors):
        raise InvalidValueError(
            f"weights {path}: they are another network's: {told}; give the model that they were trained in"
        )
    strange = [name for name, one in tensors.items() if one.is_complex() or not one.isfinite().all()]
    if strange:
        raise InvalidValueError(
            f"weights {path}: {len(strange)} hold NaN, infinity or complex numbers ({_first(strange)}); give those of "
            "a training that ended well"
        )
    network.load_state_dict(tensors)


def restore_state(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put a stored state dict back into a network that was built anew.

    Raises InvalidValueError, naming `source`, where the code that builds the network has changed since, so that names
    or shapes differ.
    """
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        difference = misfit(network.state_dict(), tensors) or one_line(error)
        raise InvalidValueError(
            f"{source} does not fit the network that the model's code builds now: {difference}; restore the code that "
            "the run was started with, or start another run folder with --out"
        ) from None


def misfit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Return how `tensors` differ in names and shapes from the state dict `expected`; empty where they fit."""
    wrong = {
        "missing": [name for name in expected if name not in tensors and not name.endswith(_COUNTED)],
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

    The same weights have one hash in every form that `load_weights` takes: with or without the prefixes of
    DataParallel and torch.compile, with a shared tensor under one of its names or under all, with or without
    batch-norm's num_batches_tracked.
    """
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    digest, seen = hashlib.sha256(), set()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if name.endswith(_COUNTED) or (tensor.numel() and _place(tensor) in seen):
            continue
        seen.add(_place(tensor))
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their names; the file and the errors are those of `load_weights`."""
    if not Path(path).is_file():
        raise InvalidValueError(f"weights {path}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are refused anyway
            found: Any = (
                load_file(path)
                if Path(path).suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
    except Exception as error:  # of any kind where the file is none of torch's
        # torch's own advice on a pickle, which is to run the code in it, is none of ours
        reason = "a pickle of code, or no file of torch.save" if isinstance(error, _PICKLES) else one_line(error)
        raise InvalidValueError(
            f"weights {path}: cannot be read ({reason}); save a state dict, by safetensors or torch.save"
        ) from None
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found or not all(map(_is_entry, found.items())):
        raise InvalidValueError(
            f"weights {path}: holds a {type(found).__name__}, no state dict of tensors; save network.state_dict()"
        )
    return dict(found)


def _is_entry(entry: tuple[Any, Any]) -> bool:
    """Return whether a name and a value are those of a state dict that any network can take."""
    name, value = entry
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


def fitted(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file by the names of the state dict `expected`, as far as they are the same.

    Without the prefixes of DataParallel and torch.compile, unless the network itself has them, and under every name of
    a shared one.
    """
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) and name not in expected for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return _with_shared(expected, tensors)


def _with_shared(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` under every name of a shared one: safetensors' save_model keeps one of the names alone."""
    given = {_place(tensor): tensors[name] for name, tensor in expected.items() if name in tensors and tensor.numel()}
    alike = {name: given[_place(one)] for name, one in expected.items() if name not in tensors and _place(one) in given}
    return tensors | alike


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _first(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
