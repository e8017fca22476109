"""Fit the weights of a user's file, or of a run, to a network, and say what was taken and what was passed over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gross_ray.errors import InvalidValueError, one_line
from gross_ray.weights_file import choose, is_averaged, listed, read_weights_file

_COUNTER = "num_batches_tracked"
"""Batch-norm's counter, which files of old torch versions lack; torch loads them without it."""
_COUNTERS = (_COUNTER, "total_ops", "total_params", "n_averaged")
"""Counters in a file that the network may lack: batch-norm's, the profiler thop's, that of averaged weights."""
_PREFIXES = ("module.", "_orig_mod.", "module.")
"""Prefixes that DataParallel and torch.compile, in either order, add to every name: they do not count in a hash."""
_MOST_NAMED = 3
_MOST_COMPARED = 50
"""Most names of each kind that are compared to find the closest."""


@dataclass(frozen=True)
class LoadedWeights:
    """What a network took from a file of weights."""

    taken: tuple[str, ...]
    """The names of the network's tensors that have the file's values."""
    passed_over: tuple[str, ...]
    """What else the file has: the keys beside its state dict, and the names in that which the network does not have."""
    lines: tuple[str, ...]
    """The same for people, one sentence each; none if everything in the file was taken under its own name."""


def load_weights(network: nn.Module, path: str | Path, *, key: str = "", new_classifier: bool = False) -> LoadedWeights:
    """Load the weights of a file into `network`, in place, and return what was taken.

    `path` ends in .safetensors, or is a file of torch.save, read without running its code: a state dict, or a training
    script's checkpoint that contains one. Of several, `key` chooses one, as in `read_weights_file`. The names may have
    a prefix (of DataParallel, torch.compile, Lightning) where the rest fits. Counters of profilers are passed over.
    With `new_classifier`, a classifier for another number of classes keeps the values that it has in `network`. Raises
    InvalidValueError for a missing or unreadable file, and for weights that are missing, unexpected, of another shape,
    or not finite real numbers, naming the first and the closest.
    """
    file = read_weights_file(path, key)
    found = set_weights(network, file.tensors, path, new_classifier=new_classifier)
    return replace(found, passed_over=(*file.passed_over, *found.passed_over), lines=(*file.lines, *found.lines))


def read_weights(path: str | Path, key: str = "") -> dict[str, Tensor]:
    """Return a file's tensors by name; `load_weights` describes the file and the errors."""
    return read_weights_file(path, key).tensors


def set_weights(
    network: nn.Module, tensors: Mapping[str, Tensor], path: str | Path, *, new_classifier: bool = False
) -> LoadedWeights:
    """Load `tensors`, read from the file `path`, into `network`; returns and raises as `load_weights` does."""
    expected = network.state_dict()
    fit = _fit(expected, tensors, path)
    new = _classifiers(expected, fit.tensors)
    found = fit.tensors | {name: tensor for name, tensor in expected.items() if _is_inside(name, new)}
    if _mismatch(expected, found):
        whole = fit.tensors | {name: tensors[name] for name in fit.outside}
        raise InvalidValueError(
            f"weights {path}: belong to another network: {_mismatch(expected, whole)}; name the model that they were "
            "trained in"
        )
    if new and not new_classifier:
        raise InvalidValueError(
            f"weights {path}: {_begins_anew(new, 'would begin')}; only a network that is then trained on may have a "
            "new classifier, and this one is not: bring weights for as many classes as the data have"
        )
    taken = {name: tensor for name, tensor in found.items() if not _is_inside(name, new)}
    invalid = [name for name, tensor in taken.items() if tensor.is_complex() or not tensor.isfinite().all()]
    if invalid:
        raise InvalidValueError(
            f"weights {path}: {len(invalid)} contain NaN, infinity or complex numbers ({_first(invalid)}); use weights "
            "of a training that converged"
        )
    network.load_state_dict(found)
    lines = [*fit.lines(expected), *([_begins_anew(new)] if new else [])]
    return LoadedWeights(tuple(taken), (*fit.counters, *fit.outside), tuple(lines))


def restore_state(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a run's stored state dict into a newly built network.

    Raises InvalidValueError, naming `source`, if names or shapes differ, or if the network shares what differs in
    `tensors`, because the code that builds the network has changed.
    """
    expected = network.state_dict()
    difference = _mismatch(expected, tensors) if _untied(expected, tensors) else ""
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        difference = _mismatch(expected, tensors) or one_line(error)
    if difference:
        raise InvalidValueError(
            f"{source} does not fit the network that the model's code builds now: {difference}; restore the code that "
            "the run started with, or start another run folder with --out"
        )


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal digits, of a state dict: names, dtypes, shapes and values.

    The same weights have one hash with or without the prefixes of DataParallel and torch.compile, a shared tensor under
    one of its names or all, with or without batch-norm's num_batches_tracked. Other prefixes and counters count.
    """
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
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


class _Fit(NamedTuple):
    """A file's tensors under the names of a network."""

    tensors: dict[str, Tensor]
    prefix: str
    """Dropped from the file's names."""
    added: str
    """Added to them, because all names of the network have it."""
    counters: list[str]
    """The file's counters that the network does not have."""
    outside: list[str]
    """The file's other names without the prefix."""
    others: tuple[str, ...] = ()
    """Prefixes that fit as well, of averaged weights."""

    def lines(self, expected: Mapping[str, Tensor]) -> list[str]:
        parts = []
        if self.prefix:
            parts.append(f"names are taken without the prefix {self.prefix!r}")
        if self.added:
            parts.append(f"names get the network's prefix {self.added!r}")
        if self.counters:
            parts.append(f"passed over: the counters {listed(self.counters, _MOST_NAMED)}")
        if self.outside:
            parts.append(f"passed over: {len(self.outside)} tensors beside the network ({_first(self.outside)})")
        if any(name.endswith(_COUNTER) and name not in self.tensors for name in expected):
            parts.append(f"batch-norm's counters {_COUNTER} are missing, and are not needed")
        if self.others:
            others = [other.removesuffix(".") for other in self.others]
            parts.append(f"the names under {', '.join(others)} fit too; to take others, {choose(others[0])}")
        return ["; ".join(parts)] if parts else []


def _fit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str | Path) -> _Fit:
    """Return a file's tensors under the names of the state dict `expected`, with the prefix that fits best.

    Raises InvalidValueError if the network's names are in the file several times, and none are those of averages.
    """
    fits = [_with_prefix(expected, tensors, prefix, added) for prefix, added in _prefixes(expected, tensors)]
    whole = [fit for fit in fits if not _missing(expected, fit.tensors) and fit.tensors.keys() <= expected.keys()]
    if not whole:  # a prefix after which little fits would only confuse
        known = sum(name in expected for name in fits[0].tensors)
        return fits[0] if 2 * known >= min(len(expected), len(tensors)) else _with_prefix(expected, tensors, "", "")
    raw = [fit for fit in whole if not is_averaged(fit.prefix)] or whole
    if len(raw) > 1:
        several = [fit.prefix.removesuffix(".") for fit in raw]
        raise InvalidValueError(f"weights {path}: the names under {listed(several)} all fit; {choose(several[0])}")
    return raw[0]._replace(others=tuple(fit.prefix for fit in whole if fit is not raw[0]))


def _prefixes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return the prefixes to drop from a file's names, each with the one to add, after which the most names fit.

    Among equals, those with the most equal shapes, and no prefix before any.
    """
    best, found = (0, 0), [("", "")]
    first = next(iter(expected), "")
    for added in (first[:start] for start in _starts(first)):
        if not all(name.startswith(added) for name in expected):
            break
        counted = {name: tensor.shape for name, tensor in expected.items() if not name.endswith(_COUNTER)}
        wanted = {name.removeprefix(added): shape for name, shape in counted.items()}
        scores: dict[str, tuple[int, int]] = {}
        for name, tensor in tensors.items():
            for start in _starts(name):
                if (shape := wanted.get(name[start:])) is not None:
                    names, shapes = scores.get(name[:start], (0, 0))
                    scores[name[:start]] = (names + 1, shapes + (shape == tensor.shape))
        most = max(scores.values(), default=(0, 0))
        if most > best:
            best, found = most, [(prefix, added) for prefix, score in scores.items() if score == most]
    return [pair for pair in found if not pair[0]] or found


def _starts(name: str) -> list[int]:
    """Return the places in a dotted name at which the rest of it begins."""
    return [0, *(place + 1 for place, sign in enumerate(name) if sign == ".")]


def _with_prefix(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str, added: str) -> _Fit:
    """Return a file's tensors without `prefix` and with `added`, and with all names of what the network shares.

    safetensors' save_model stores a shared tensor under one of its names.
    """
    found: dict[str, Tensor] = {}
    counters, outside = [], []
    for name, tensor in tensors.items():
        ours = added + name.removeprefix(prefix)
        has_prefix = name.startswith(prefix)
        last = name.rpartition(".")[2]
        if last in _COUNTERS and (ours not in expected if has_prefix else last != _COUNTER):
            counters.append(name)
        elif has_prefix:
            found[ours] = tensor
        else:
            outside.append(name)
    stored = {_memory(tensor): found[name] for name, tensor in expected.items() if name in found and tensor.data_ptr()}
    lacking = {name: _memory(tensor) for name, tensor in expected.items() if name not in found}
    found |= {name: stored[memory] for name, memory in lacking.items() if memory in stored}
    return _Fit(found, prefix, added, counters, outside)


def _classifiers(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return the layers that differ from the file's in the number of classes alone: that in the file, and their own.

    All differ in the same way, and only in their outputs. If these outputs went into another layer, that layer would
    have another number of inputs.
    """
    shapes = {
        name: (tuple(tensors[name].shape), tuple(tensor.shape))
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    }
    for theirs, ours in shapes.values():
        if not ours or len(theirs) != len(ours) or theirs[1:] != ours[1:] or not {*ours[2:]} <= {1}:
            return {}
    numbers = {(theirs[0], ours[0]) for theirs, ours in shapes.values()}
    if len(numbers) != 1 or all(len(ours) == 1 for _, ours in shapes.values()):
        return {}
    return dict.fromkeys((_layer_of(name) for name in shapes), numbers.pop())


def _layer_of(name: str) -> str:
    """Return the layer that a tensor belongs to, also if a parametrization computes the layer's weight from it."""
    layer, parametrized, _ = name.partition(".parametrizations.")
    return layer if parametrized else name.rpartition(".")[0]


def _is_inside(name: str, layers: Collection[str]) -> bool:
    return any(not layer or name.startswith(f"{layer}.") for layer in layers)


def _begins_anew(classifiers: Mapping[str, tuple[int, int]], verb: str = "") -> str:
    """Return in words that classifiers begin anew, because the file has another number of classes."""
    theirs, ours = next(iter(classifiers.values()))
    several = len(classifiers) > 1
    subject = f"classifier{'s' if several else ''} {', '.join(map(repr, classifiers))}"
    return (
        f"{subject} {verb or ('begin' if several else 'begins')} anew: the file has {theirs} classes, the data {ours}"
    )


def _missing(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in expected if name not in tensors and not name.endswith(_COUNTER)]


def _untied(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the pairs of names that are one tensor in `expected` and two different ones in `tensors`."""
    first: dict[object, str] = {}
    found = []
    for name, tensor in expected.items():
        if name not in tensors or not tensor.data_ptr():
            continue
        other = first.setdefault(_memory(tensor), name)
        one, two = tensors[other], tensors[name]
        if one is not two and not (one.dtype == two.dtype and torch.equal(one, two)):
            found.append(f"{other} and {name}")
    return found


def _mismatch(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Return how `tensors` differ from the state dict `expected` of a network; empty if they fit."""
    missing, unexpected = _missing(expected, tensors), [name for name in tensors if name not in expected]
    wrong = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
        "that the network shares, but that differ": _untied(expected, tensors),
    }
    parts = [f"{len(names)} {what} ({_first(names)})" for what, names in wrong.items() if names]
    if missing or unexpected:
        ours = {name: expected[name] for name in missing or expected}
        pairs = _closest(ours, {name: tensors[name] for name in unexpected or tensors})
        parts.append(f"closest, its and ours: {', '.join(pairs)}")
    return "; ".join(parts)


def _closest(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Return the pairs of names that are most alike, with their shapes; an equal shape counts as much as the name."""
    alike = [
        (SequenceMatcher(None, their, our).ratio() + (theirs[their].shape == ours[our].shape), their, our)
        for our in list(ours)[:_MOST_COMPARED]
        for their in list(theirs)[:_MOST_COMPARED]
    ]
    found: dict[str, str] = {}
    for _, their, our in sorted(alike, key=lambda each: -each[0]):
        if their not in found and our not in found.values():
            found[their] = our
    pairs = list(found.items())[:_MOST_NAMED]
    return [f"{their} {tuple(theirs[their].shape)} and {our} {tuple(ours[our].shape)}" for their, our in pairs]


def _memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _first(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
