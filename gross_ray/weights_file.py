"""Read the weights in a user's file, whatever a training script stored beside them, without running its code."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gross_ray.errors import InvalidValueError, one_line

KEYS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "net_state_dict", "network_state_dict"),
    *("params", "weights", "model_weights", "module", "backbone", "encoder", "teacher", "student"),
)
"""Keys under which training scripts store a state dict, the preferred one first; averaged weights come after these."""
_AVERAGED = frozenset(("ema", "swa", "shadow", "average", "averaged", "avg"))
"""Words, in a key or a prefix, of weights that are averages over the training."""
_LEVELS = 6
"""Deepest nesting that is searched for state dicts: a file may nest without end."""
_MOST_NAMED = 8
_ZIP = b"PK\x03\x04"
_LEGACY_PICKLES = 4
"""A file that is no zip begins with a magic number, a version, a description of the machine, and the object."""
_PICKLES = (pickle.UnpicklingError, IndexError, EOFError, ValueError, zipfile.BadZipFile)
"""Errors for pickles that torch refuses, and for files that are not pickles."""

Key = tuple[str, ...]
"""The keys that lead to a state dict; none if the file is one."""


@dataclass(frozen=True)
class WeightsFile:
    """The weights in a file, and what else is in it."""

    tensors: dict[str, Tensor]
    """The tensors of one state dict by name, on the CPU."""
    passed_over: tuple[str, ...]
    """The keys of everything else."""
    lines: tuple[str, ...]
    """Which state dict was taken and what was passed over, for people; none if there is nothing else."""


def read_weights_file(path: str | Path, key: str = "") -> WeightsFile:
    """Return the weights in a file: safetensors, or a file of torch.save, read by torch's weights-only loader.

    Such a file is a state dict, or has one under a key, also of a nested dict. Of several, `key` chooses: the keys with
    dots between, or the prefix of the tensors' names. Without it the order is that of KEYS, then averaged weights.
    Objects of classes that the loader does not know, like argparse.Namespace, are passed over without running their
    code. Raises InvalidValueError for a missing or unreadable file, for one without a state dict, for a `key` that it
    does not have, and for several state dicts of which none is preferred.
    """
    if not Path(path).is_file():
        raise InvalidValueError(f"weights {path}: there is no such file; check the path")
    found = _content(path)
    dicts = dict(_state_dicts(found))
    if not dicts:
        raise InvalidValueError(f"weights {path}: {_what(found)}")
    chosen, prefix = _named(dicts, key, path) if key else (_preferred(dicts, path), "")
    taken = {name: tensor for name, tensor in dicts[chosen].items() if name.startswith(prefix)}
    others = [".".join(other) for other in dicts if other != chosen and 2 * len(dicts[other]) >= len(taken)]
    beside = [
        name
        for name in _beside(found, chosen, taken)
        if not any(other == name or other.startswith(f"{name}.") for other in others)
    ]
    return WeightsFile(
        {name.removeprefix(prefix): tensor for name, tensor in taken.items()},
        (*others, *beside),
        _lines(".".join(chosen), prefix, others, beside),
    )


def is_averaged(name: str) -> bool:
    """Return whether a key or a prefix of names is that of weights averaged over the training."""
    return not _AVERAGED.isdisjoint(re.split(r"[\W_]+", name.lower()))


def listed(names: list[str], most: int = _MOST_NAMED) -> str:
    """Return the first names in one text, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _content(path: str | Path) -> Any:
    """Return what is in a file, with placeholders for objects of classes that torch's loader does not know."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused anyway
            if Path(path).suffix == ".safetensors":
                return load_file(path)
            with torch.serialization.safe_globals(_placeholders(path)):
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, if torch did not write the file
        # Do not repeat torch's own advice, which is to run the code in the file.
        advises = isinstance(error, _PICKLES) or "weights_only" in str(error)
        reason = "a pickle of code, a TorchScript program, or not a file of torch.save" if advises else one_line(error)
        raise InvalidValueError(
            f"weights {path}: cannot be read ({reason}); save a state dict with safetensors or torch.save"
        ) from None


class _Empty:
    """Takes the place of a class or function in a file: each object of it becomes an empty dict."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()  # the loader sets its items and attributes; of torch's own classes it takes no other


class _Opaque:
    """Takes the place of a class whose objects have a state of another form: nothing of them is kept."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _placeholders(path: str | Path) -> list[Any]:
    """Return an allow-list for torch's loader, with a placeholder for each class and function that a file names.

    The loader looks up its own harmless ones first, and runs nothing but those and the placeholders.
    """
    named = torch.serialization.get_safe_globals()  # the user's own
    allowed = {each[1] if isinstance(each, tuple) else f"{each.__module__}.{each.__qualname__}" for each in named}
    names = sorted(_named_globals(path) - allowed)
    return [(_Opaque if name.startswith(("numpy.", "functools.")) else _Empty, name) for name in names]


def _named_globals(path: str | Path) -> set[str]:
    """Return the classes and functions that a file's pickles name, by dotted name; nothing in them is run."""
    with Path(path).open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
        file.seek(0)
        pickles: list[Any] = [file] * _LEGACY_PICKLES
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                (name,) = [each for each in archive.namelist() if each.split("/")[-1] == "data.pkl"]
                pickles = [io.BytesIO(archive.read(name))]
        found = set()
        for each in pickles:
            for operation, argument, _ in pickletools.genops(each):
                if operation.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                    renamed = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                    found |= {f"{module}.{name}", ".".join(renamed)}  # Python 2's name, and Python 3's
        return found


def _state_dicts(found: Any, above: Key = ()) -> Iterator[tuple[Key, dict[str, Tensor]]]:
    """Yield each state dict in a file's dicts, with the keys that lead to it."""
    if not isinstance(found, Mapping) or len(above) == _LEVELS:
        return
    if found.keys() >= {"state", "param_groups"}:  # of an optimizer
        return
    tensors = {name: value for name, value in found.items() if _is_entry(name, value)}
    nested = [(name, value) for name, value in found.items() if isinstance(name, str)]
    inner = [each for name, value in nested for each in _state_dicts(value, (*above, name))]
    # Beside other state dicts, tensors whose names have no dot are a script's own, like an accuracy.
    if tensors and (not inner or any("." in name for name in tensors)):
        yield above, tensors
    else:
        yield from inner


def _is_entry(name: object, value: object) -> bool:
    """Return whether a name and a value can be an entry of a network's state dict."""
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


def _what(found: Any) -> str:
    """Return what a file without a state dict is, and what to do."""
    values = [("", found), *(found.items() if isinstance(found, Mapping) else ())]
    for name, value in values:
        if "_modules" in getattr(value, "__dict__", {}):
            where = f"has a pickled network under {name!r}" if name else "is a pickled network"
            return f"{where}, whose code is not run; load it with its code, and save network.state_dict()"
    kind = "dict" if isinstance(found, Mapping) else type(found).__name__
    return f"is a {kind}, not a state dict of tensors; save network.state_dict()"


def _rank(key: Key) -> tuple[int, ...]:
    """Return the place of a state dict's keys in the order of preference."""
    averaged = len(KEYS)
    return tuple(
        KEYS.index(part.lower()) if part.lower() in KEYS else averaged + (not is_averaged(part)) for part in key
    )


def _preferred(dicts: Mapping[Key, Mapping[str, Tensor]], path: str | Path) -> Key:
    """Return the keys of the state dict to take; raises InvalidValueError if several are equally good."""
    best = min(map(_rank, dicts))
    first = [key for key in dicts if _rank(key) == best]
    most = max(len(dicts[key]) for key in first)
    large = [key for key in first if 2 * len(dicts[key]) >= most]
    if len(large) > 1:
        several = [f"{'.'.join(key)} ({len(dicts[key])} tensors)" for key in large]
        remedy = choose(".".join(large[0]))
        raise InvalidValueError(f"weights {path}: has several state dicts: {listed(several)}; {remedy}")
    return large[0]


def choose(key: str) -> str:
    """Return the remedy for a file with several networks, of which `key` is one."""
    return f"choose one, like weights_key={key} (--weights-key {key}; in Python key={key!r})"


def _named(dicts: Mapping[Key, dict[str, Tensor]], key: str, path: str | Path) -> tuple[Key, str]:
    """Return the keys of the state dict that the user's `key` names, and the prefix of its names that it names."""
    under = {each: tensors for each, tensors in dicts.items() if f"{'.'.join(each)}.".startswith(f"{key}.")}
    if under:
        return _preferred(under, path), ""
    prefix = f"{key}."
    having = {each: tensors for each, tensors in dicts.items() if any(name.startswith(prefix) for name in tensors)}
    if having:
        return _preferred(having, path), prefix
    names = [".".join(each) for each in dicts if each] + sorted(
        {name.partition(".")[0] for tensors in dicts.values() for name in tensors}
    )
    raise InvalidValueError(
        f"weights {path}: has no state dict and no prefix of names weights_key = {key!r}; it has: {listed(names)}"
    )


def _beside(found: Any, key: Key, taken: Mapping[str, Tensor]) -> list[str]:
    """Return the dotted keys of everything in a file but the tensors taken from the state dict at `key`."""
    names = []
    for depth, part in enumerate(key):
        names += [".".join((*key[:depth], str(name))) for name in found if name != part]
        found = found[part]
    return names + [str(name) for name in found if name not in taken]


def _lines(key: str, prefix: str, others: list[str], beside: list[str]) -> tuple[str, ...]:
    parts = []
    if beside:
        parts.append(f"passed over: {listed(beside)}")
    if others:
        parts.append(f"there too: {listed(others)}; to take another, {choose(others[0])}")
    if not parts:
        return ()
    where = ".".join(part for part in (key, prefix.removesuffix(".")) if part)
    return ("; ".join([f"{where!r} is taken", *parts] if where else parts),)
