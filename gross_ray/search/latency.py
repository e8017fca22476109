"""A model of the latency of every configuration in one runtime, fitted to the times of whole networks.

A runtime fuses layers and changes layouts between them, so that a layer timed alone says little. Instead, many networks
are timed whole, in which each decomposed layer has each of its forms (dense, or a bottleneck of one group-size) about
equally often, beside the full network. A ridge regression then gives what each bottleneck adds to the time in place of
the dense convolution that it equals. A layer counts in its faster form, because it can be exported in that form.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import nn

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.errors import InvalidValueError, one_line
from gross_ray.nn.calls import output_of
from gross_ray.nn.replace import replace_modules
from gross_ray.search.cost import LayerCosts
from gross_ray.search.forms import fold_layers, group_sizes_of
from gross_ray.search.options import RUNTIMES
from gross_ray.search.options import LatencyOptions as LatencyOptions
from gross_ray.search.runtimes import Run, Runtime, is_installed, runtime_of
from gross_ray.search.timed_networks import Times, fit
from gross_ray.search.timing import device_name, timed_device, typical_ms
from gross_ray.search.variants import Forms, Variants, balanced
from gross_ray.space import DENSE
from gross_ray.supernet.configure import check_plain

CONDITIONS = ("runtime", "version", "device", "host", "batch_size", "threads")
Added = dict[str, dict[int, float]]
"""What each form of each layer adds to the full network's time."""
_SUMMARY = (*CONDITIONS, "full_ms", "num_sampled", "median_error", "noise")
_PER_FORM, _AT_LEAST = 2.5, 20
"""Networks for each form of each layer, and the least number of networks."""
_PASSES, _EXACT = 3, 0.015
"""The most passes of so many networks; the last one is that whose median error is at most _EXACT."""


@dataclass(frozen=True, kw_only=True)
class _Conditions:
    runtime: str
    """Name of the runtime, one of RUNTIMES."""
    version: str
    """Version of the runtime."""
    device: str
    """Name of the processor or GPU."""
    host: str
    """Name of the machine."""
    batch_size: int
    """Images in a batch."""
    threads: int
    """CPU threads."""


@dataclass(frozen=True, kw_only=True)
class LatencyModel(_Conditions):
    """Predicts the time of one batch's forward pass: the full network's, plus what each layer's faster form adds."""

    full_ms: float
    """Measured time of the full network, in ms."""
    added_ms: Mapping[str, Mapping[int, float]]
    """What a layer's bottleneck at each group-size adds in place of the dense convolution, in ms; negative: it saves.
    For DENSE it is 0."""
    num_sampled: int
    """How many whole networks were timed."""
    median_error: float
    """Median relative error of the timed networks, each predicted from a fit to the others."""
    noise: float
    """Median relative error of a network's own time, from how far two halves of its rounds differ."""

    def predict(self, configuration: Sequence[int]) -> float:
        """Return the time of one batch in ms, 0 or more; raises InvalidValueError for an unknown configuration."""
        return max(self.costs.of_one(configuration), 0.0)

    def folded(self, layer: str, group_size: int) -> bool:
        """Return whether the layer is faster as the dense convolution than as a bottleneck of this group-size."""
        return group_size != DENSE and self.added_ms[layer][group_size] > 0

    def faster_forms(self, configuration: Sequence[int]) -> Forms:
        """Return the faster form of each layer, in layer order: the group-size of its bottleneck, or DENSE."""
        return tuple(
            DENSE if self.folded(layer, size) else size
            for layer, size in zip(self.added_ms, configuration, strict=True)
        )

    def predict_forms(self, forms: Mapping[str, int]) -> float:
        """Return the time of one batch in ms, 0 or more, if each layer has the form that is named.

        A form is a bottleneck's group-size, or DENSE. Raises InvalidValueError for a missing or unknown layer and for a
        group-size that was not timed.
        """
        self._check_layers(forms)
        as_named = LayerCosts("latency_ms", self.full_ms, self.added_ms)
        return max(as_named.of_one([forms[layer] for layer in self.added_ms]), 0.0)

    def predict_network(self, network: nn.Module) -> float:
        """Return the time of one batch in ms, 0 or more, of a plain network in the forms that its layers have.

        Raises InvalidValueError for a layer or group-size that was not timed.
        """
        return self.predict_forms(dict.fromkeys(self.added_ms, DENSE) | group_sizes_of(network))

    def fold(self, network: nn.Module) -> tuple[nn.Module, dict[str, float]]:
        """Return a copy of a plain network with each layer in its faster form, and what each bottleneck adds, in ms.

        `network` is what `extract` returns of the supernet that was timed. A bottleneck that adds more than 0 ms is
        folded. Raises InvalidValueError for a supernet, and for a layer or group-size that was not timed.
        """
        check_plain(network, "fold")
        sizes = group_sizes_of(network)
        self._check_layers(dict.fromkeys(self.added_ms, DENSE) | sizes)
        for name, size in sizes.items():
            if size not in self.added_ms[name]:
                raise InvalidValueError(f"group-size {size} of layer {name!r}: must be one of {[*self.added_ms[name]]}")
        added = {name: self.added_ms[name][size] for name, size in sizes.items()}
        return fold_layers(network, [name for name, size in sizes.items() if self.folded(name, size)]), added

    def _check_layers(self, layers: Collection[str]) -> None:
        if wrong := sorted({*layers} ^ {*self.added_ms}):
            timed = ", ".join(self.added_ms)
            raise InvalidValueError(f"layers {', '.join(wrong)}: missing or unknown; the timed layers are {timed}")

    @cached_property
    def costs(self) -> LayerCosts:
        """The prediction as a sum over the layers, in ms; a negative sum means 0."""
        faster = {name: {size: min(ms, 0.0) for size, ms in added.items()} for name, added in self.added_ms.items()}
        return LayerCosts("latency_ms", self.full_ms, faster)

    def predict_many(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the time of one batch in ms, 0 or more, for many configurations: float64 (N,).

        `columns` maps each decomposed layer's name to its group-sizes, (N,). Raises InvalidValueError for a missing or
        unknown layer and for a group-size that was not timed.
        """
        self._check_layers(columns)
        return np.maximum(self.costs.of(np.column_stack([columns[name] for name in self.added_ms])), 0.0)

    def timed_here(self) -> torch.device | None:
        """Return this machine's device that was timed; None for another machine's, or a runtime that is missing."""
        devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
        here = [each for each in devices if (device_name(each), socket.gethostname()) == (self.device, self.host)]
        return here[0] if here and is_installed(self.runtime) else None

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table `layer_latencies`."""
        where = {name: getattr(self, name) for name in CONDITIONS}
        return [
            where | {"layer": layer, "group_size": size, "added_ms": ms}
            for layer, added in self.added_ms.items()
            for size, ms in added.items()
        ]

    def summary(self) -> dict[str, Any]:
        """Return the row of the table `runtime_latencies`."""
        return {name: getattr(self, name) for name in _SUMMARY}

    def save(self, path: Path) -> None:
        """Write the model as one Parquet table for `load`, which also works on another machine."""
        with whole_or_not_at_all(path) as partial:
            pd.DataFrame(self.rows()).assign(**self.summary()).to_parquet(partial, index=False)

    @classmethod
    def load(cls, path: Path) -> LatencyModel:
        """Read a file that `save` wrote; raises InvalidValueError if it is missing, damaged or of another kind."""
        try:
            frame = pd.read_parquet(path)
            if "offset_ms" in frame:
                raise InvalidValueError(
                    f"{path}: was written by an earlier gross_ray, which timed layers alone; measure again with "
                    "gross latency"
                )
            summary = frame[list(_SUMMARY)].drop_duplicates()
            if unknown := {*summary["runtime"]} - {*RUNTIMES}:
                raise InvalidValueError(
                    f"{path}: was measured in {', '.join(unknown)}, which this gross_ray does not know"
                )
            return cls.from_tables(frame[[*CONDITIONS, "layer", "group_size", "added_ms"]], summary)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InvalidValueError):
                raise
            raise InvalidValueError(
                f"{path}: not a table of latencies ({one_line(error)}); write one with gross latency"
            ) from None

    @classmethod
    def from_tables(cls, latencies: pd.DataFrame, summary: pd.DataFrame) -> LatencyModel:
        """Return the model stored in the tables `layer_latencies` and `runtime_latencies`.

        `summary` has one row; `latencies` may also contain other measurements. Raises InvalidValueError unless exactly
        one belongs to that row.
        """
        if len(summary) != 1:
            raise InvalidValueError(f"runtime_latencies has {len(summary)} rows: choose the one to predict with")
        row: dict[str, Any] = summary.to_dict("records")[0]
        times = [*latencies["added_ms"], *(row[name] for name in ("full_ms", "median_error", "noise"))]
        if not np.isfinite(np.array(times, dtype=np.float64)).all():
            raise InvalidValueError("layer_latencies: not all are finite numbers; measure them again")
        parts = latencies[np.logical_and.reduce([latencies[name] == row[name] for name in CONDITIONS])]
        if parts.empty or parts.duplicated(["layer", "group_size"]).any():
            where = ", ".join(f"{name} = {row[name]}" for name in CONDITIONS)
            raise InvalidValueError(
                f"layer_latencies of {where}: {len(parts)} rows, must be one for each layer's group-sizes; "
                "measure it again"
            )
        added_ms: dict[str, dict[int, float]] = {}
        for layer, size, ms in parts[["layer", "group_size", "added_ms"]].itertuples(index=False):
            added_ms.setdefault(layer, {})[int(size)] = float(ms)
        return cls(added_ms=added_ms, **row)


def measure_latency(
    supernet: nn.Module,
    input_shape: Sequence[int],
    options: LatencyOptions,
    *,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    on_part: Callable[[int, int], object] | None = None,
) -> LatencyModel:
    """Return a latency model of all configurations of `supernet`, measured on `device` (default: the supernet's).

    `input_shape` is (C, H, W). `generator` draws the timed networks (all different) and the input. `on_part` is called
    after each group of networks with the number done and the most that may be timed. The supernet and torch's number of
    threads stay unchanged. Raises InvalidValueError for a network without decomposed layers, a runtime that is not
    installed or cannot take the network, a device other than cpu and cuda, and a network that cannot run such an input.
    """
    parameter = next(supernet.parameters())
    target = timed_device(parameter.device if device is None else device)
    runtime = runtime_of(options.runtime, target, options.threads)
    output_of(supernet, input_shape)
    variants = Variants(supernet, target, input_shape)
    forms = variants.forms
    if variants.size == 1:
        raise InvalidValueError("each decomposed layer may only stay dense: there is no latency to choose by")
    images = torch.randn(options.batch_size, *input_shape, generator=generator, device=generator.device)
    number = num_networks(forms, options)
    passes = 1 if options.num_sampled else _PASSES
    with runtime.settings():
        load = runtime.variants(variants, images.to("cpu", parameter.dtype))
        times = Times((DENSE,) * len(forms), load, runtime, options.repeats, number * passes, on_part)
        added: Added = {}
        for _ in range(passes):
            drawn = balanced(forms, number, generator, besides=[times.full, *times.networks])
            times.add(_in_faster_forms(drawn, added, besides=[times.full, *times.networks]))
            added, errors = fit(forms, [*times.networks, times.full], np.array([*times.relative, 1.0]))
            if np.median(errors) <= _EXACT or len(times.networks) == variants.size - 1:
                break
    if on_part is not None:
        on_part(len(times.networks), len(times.networks))
    return LatencyModel(
        full_ms=times.full_ms,
        added_ms={name: {size: times.full_ms * ms for size, ms in each.items()} for name, each in added.items()},
        num_sampled=len(times.networks),
        median_error=float(np.median(errors)),
        noise=times.noise,
        **_conditions(runtime, target, options),
    )


def num_networks(forms: Mapping[str, Sequence[int]], options: LatencyOptions) -> int:
    """Return the number of networks in a pass of a measurement; `forms` are the choices of each layer, with DENSE."""
    most = max(map(len, forms.values()))  # so that each form is drawn
    return max(most, options.num_sampled or max(_AT_LEAST, math.ceil(_PER_FORM * sum(map(len, forms.values())))))


def _in_faster_forms(networks: Sequence[Forms], added: Added, besides: Collection[Forms]) -> list[Forms]:
    """Return the networks with each layer dense that `added` says is faster so; without those of `besides`.

    Configurations run in these forms, which is where a prediction has to hold: what a layer adds depends a little on
    the forms of the others. Without an earlier fit, the networks stay unchanged.
    """
    effects = list(added.values()) or [dict[int, float]()] * len(next(iter(networks), ()))
    faster = (
        tuple(DENSE if each.get(size, 0.0) > 0 else size for size, each in zip(one, effects, strict=True))
        for one in networks
    )
    return [one for one in dict.fromkeys(faster) if one not in besides]


def measure_relative(
    supernet: nn.Module,
    input_shape: Sequence[int],
    options: LatencyOptions,
    networks: Sequence[Forms],
    *,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Return the time of each network, divided by the full network's: float64 (N,).

    `networks` has the form of each layer, in layer order. Raises as `measure_latency` does, except for a supernet whose
    layers may only stay dense.
    """
    target = timed_device(device)
    runtime = runtime_of(options.runtime, target, options.threads)
    output_of(supernet, input_shape)
    variants = Variants(supernet, target, input_shape)
    images = torch.randn(options.batch_size, *input_shape, generator=torch.Generator().manual_seed(0))
    images = images.to(next(supernet.parameters()).dtype)
    with runtime.settings():
        load = runtime.variants(variants, images)
        times = Times((DENSE,) * len(variants.forms), load, runtime, options.repeats)
        times.add(networks)
    return np.array(times.relative)


@dataclass(frozen=True, kw_only=True)
class Timing(_Conditions):
    """The measured time of one batch's forward pass of a network."""

    latency_ms: float
    """Median over the rounds, in ms."""


def time_networks(
    networks: Mapping[str, nn.Module | Path],
    input_shape: Sequence[int],
    options: LatencyOptions,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Return the time of each network in `options.runtime` on `device`; each round times all of them.

    A path names an ONNX file, for the runtimes that read ONNX. `input_shape` is (C, H, W); `options.num_sampled` is not
    used. The networks and torch's number of threads stay unchanged. Raises InvalidValueError for cuda on a machine
    without it, a runtime that is not installed or cannot take a network, and for a network that cannot run such an
    image.
    """
    target = timed_device(device)
    runtime = runtime_of(options.runtime, target, options.threads)
    images = torch.randn(options.batch_size, *input_shape, generator=torch.Generator().manual_seed(0))
    works: dict[str, Run] = {}
    with runtime.settings():
        for name, network in networks.items():
            if isinstance(network, Path):
                works[name] = runtime.read(network, images)
                continue
            copied = replace_modules(network, {}).eval()
            output_of(copied, input_shape)
            like = next(copied.parameters(), images)
            works[name] = runtime.load(copied, images.to(like.dtype))
        times = typical_ms(works, options.repeats, runtime.clock())
    conditions = _conditions(runtime, target, options)
    return {name: Timing(latency_ms=ms, **conditions) for name, ms in times.items()}


def dominated(model: LatencyModel) -> dict[int, tuple[int, int, int]]:
    """Return the group-sizes that clearly cost more than a larger one or the dense layer: those are no less accurate.

    By group-size: the larger group-size that costs less in the most layers, or DENSE for the layers that are slower as
    a bottleneck than dense; the number of these layers; and the number of layers that have both. A difference counts
    only if it exceeds the noise of the timings. Group-sizes are compared in the faster form of each layer.
    """
    clearly = model.noise * model.full_ms
    found: dict[int, tuple[int, int, int]] = {}
    sizes = sorted({size for added in model.added_ms.values() for size in added} - {DENSE})
    for size in sizes:
        having = [added for added in model.added_ms.values() if size in added]
        best = (DENSE, sum(added[size] > clearly for added in having), len(having))
        for larger in (other for other in sizes if other > size):
            both = [added for added in having if larger in added]
            beaten = sum(min(added[larger], 0.0) < min(added[size], 0.0) - clearly for added in both)
            best = max(best, (larger, beaten, len(both)), key=lambda one: one[1])
        if best[1]:
            found[size] = best
    return found


def _conditions(runtime: Runtime, device: torch.device, options: LatencyOptions) -> dict[str, Any]:
    where = (device_name(device), socket.gethostname(), options.batch_size, options.threads)
    return dict(zip(CONDITIONS, (runtime.name, runtime.version, *where), strict=True))
