"""A model of the latency of every configuration, measured on one device.

Each decomposed layer's bottleneck is timed alone at each group-size. The rest is timed as the network with decomposed
layers that return precomputed tensors (a difference of two measurements would be less steady). A sample of whole
configurations then corrects the sum of the parts: offset_ms + slope x sum. All modules are contiguous, as `extract`
returns them, and run in eval and inference mode.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor, nn

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.errors import InvalidValueError, is_whole, one_line
from gross_ray.fields import require
from gross_ray.nn.calls import input_of, network_errors_as_invalid_value, output_of, zero_images
from gross_ray.nn.replace import replace_modules
from gross_ray.search.cost import LayerCosts
from gross_ray.search.timing import Work, device_name, threads, timed_device, typical_ms
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.configure import extract, largest_decomposed, series_layers

REST = "rest"
"""The part of the table `latencies` that is everything but the decomposed layers; it has no group-size."""
_WHERE = ("device", "host", "batch_size", "threads")
_SUMMARY = (*_WHERE, "offset_ms", "slope", "num_sampled", "median_error")


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """What latency measurements time, and how often."""

    batch_size: int = 1
    """Images in a batch."""
    threads: int = 1
    """CPU threads. One is timed by its CPU time; several by wall time, which needs an otherwise idle machine."""
    repeats: int = 50
    """Rounds; each takes one sample of every part and of every whole network."""
    num_sampled: int = 20
    """How many whole configurations are timed; all, if the space has fewer."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("threads", 1), ("repeats", 1), ("num_sampled", 2)):
            value = getattr(self, name)
            require(is_whole(value, least), f"latency.{name}", value, f"must be a whole number, {least} or more")


@dataclass(frozen=True, kw_only=True)
class _Conditions:
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
    """Predicts the time of one batch's forward pass: offset_ms + slope x (rest + one time for each layer)."""

    rest_ms: float
    """Time of everything but the decomposed layers, in ms."""
    layer_ms: Mapping[str, Mapping[int, float]]
    """Time of each decomposed layer at each group-size, in ms, summed over its calls in one forward pass."""
    offset_ms: float
    """Offset in ms, fitted to whole configurations; may be negative."""
    slope: float
    """Slope fitted to whole configurations; 0 or more."""
    num_sampled: int
    """How many whole configurations were timed."""
    median_error: float
    """Median relative error of the timed configurations, each predicted from a fit to the others."""

    def predict(self, configuration: Sequence[int]) -> float:
        """Return the time of one batch in ms, 0 or more; raises InvalidValueError for an unknown configuration."""
        return max(self.costs.of_one(configuration), 0.0)

    @cached_property
    def costs(self) -> LayerCosts:
        """The prediction as a sum over the layers, in ms; a negative sum means 0."""
        layers = {name: {size: self.slope * ms for size, ms in times.items()} for name, times in self.layer_ms.items()}
        return LayerCosts("latency_ms", self.offset_ms + self.slope * self.rest_ms, layers)

    def predict_many(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the time of one batch in ms, 0 or more, for many configurations: float64 (N,).

        `columns` maps each decomposed layer's name to its group-sizes, (N,). Raises InvalidValueError for a missing or
        unknown layer and for a group-size that was not timed.
        """
        if wrong := columns.keys() ^ self.layer_ms.keys():
            timed = ", ".join(self.layer_ms)
            raise InvalidValueError(f"layers {', '.join(columns)}: {', '.join(wrong)} is missing or not of {timed}")
        return np.maximum(self.costs.of(np.column_stack([columns[name] for name in self.layer_ms])), 0.0)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table `latencies`."""
        where = {name: getattr(self, name) for name in _WHERE}
        rows = [where | {"part": REST, "group_size": None, "latency_ms": self.rest_ms}]
        for part, times in self.layer_ms.items():
            rows += [where | {"part": part, "group_size": size, "latency_ms": ms} for size, ms in times.items()]
        return rows

    def summary(self) -> dict[str, Any]:
        """Return the row of the table `latency_models`."""
        return {name: getattr(self, name) for name in _SUMMARY}

    def save(self, path: Path) -> None:
        """Write the model as one Parquet table for `load`, which also works on another machine."""
        frame = pd.DataFrame(self.rows()).assign(**self.summary())
        with whole_or_not_at_all(path) as partial:
            frame.astype({"group_size": "Int64"}).to_parquet(partial, index=False)

    @classmethod
    def load(cls, path: Path) -> LatencyModel:
        """Read a file that `save` wrote; raises InvalidValueError if it is missing, damaged or of another kind."""
        columns = [*_WHERE, "part", "group_size", "latency_ms"]
        try:
            frame = pd.read_parquet(path)
            summary = frame[list(_SUMMARY)].drop_duplicates()
            return cls.from_tables(frame[columns], summary)
        except (OSError, pa.ArrowException, KeyError, TypeError) as error:
            raise InvalidValueError(
                f"{path}: not a table of latencies ({one_line(error)}); write one with gross latency"
            ) from None

    @classmethod
    def from_tables(cls, latencies: pd.DataFrame, summary: pd.DataFrame) -> LatencyModel:
        """Return the model stored in the tables `latencies` and `latency_models`.

        `summary` has one row; `latencies` may also contain other devices, batch sizes and threads. Raises
        InvalidValueError unless exactly one measurement belongs to that row.
        """
        if len(summary) != 1:
            raise InvalidValueError(f"latency_models has {len(summary)} rows: choose the one to predict with")
        row: dict[str, Any] = summary.to_dict("records")[0]
        times = [*latencies["latency_ms"], row["offset_ms"], row["slope"], row["median_error"]]
        if not np.isfinite(np.array(times, dtype=np.float64)).all():
            raise InvalidValueError("latencies: not all are finite numbers; measure them again")
        parts = latencies[np.logical_and.reduce([latencies[name] == row[name] for name in _WHERE])]
        is_rest = parts["group_size"].isna()
        if not is_rest.any() or is_rest.all() or parts.duplicated(["part", "group_size"]).any():
            where = ", ".join(f"{name} = {row[name]}" for name in _WHERE)
            raise InvalidValueError(
                f"latencies of {where}: {len(parts)} rows, must be one for {REST!r} and one for each layer's "
                "group-sizes; measure it again"
            )
        layer_ms: dict[str, dict[int, float]] = {}
        for part, size, ms in parts.loc[~is_rest, ["part", "group_size", "latency_ms"]].itertuples(index=False):
            layer_ms.setdefault(part, {})[int(size)] = float(ms)
        return cls(rest_ms=float(parts.loc[is_rest, "latency_ms"].iloc[0]), layer_ms=layer_ms, **row)


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

    `input_shape` is (C, H, W). `generator` draws the sampled configurations (all different) and the input. `on_part` is
    called after each timing with the number done and the total. The supernet and torch's number of threads stay
    unchanged. Raises InvalidValueError for a network without decomposed layers, a space of one configuration, a device
    other than cpu and cuda, and a network that cannot run such an input.
    """
    space = SearchSpace.of(supernet)
    sampled = _sample(space, options.num_sampled, generator)
    parameter = next(supernet.parameters())
    target = timed_device(parameter.device if device is None else device)
    images = torch.randn(options.batch_size, *input_shape, generator=generator, device=generator.device)
    with threads(options.threads), torch.inference_mode():
        works = _works(supernet, sampled, images.to(target, parameter.dtype))
        times = typical_ms(works, options.repeats, target, on_part)
    layer_ms = {name: {size: times[name, size] for size in sizes} for name, sizes in space.group_sizes.items()}
    sums = LayerCosts("latency_ms", times[REST], layer_ms).of(sampled)
    measured = np.array([times[configuration] for configuration in sampled])
    offset_ms, slope = _fit(sums, measured)
    return LatencyModel(
        rest_ms=times[REST],
        layer_ms=layer_ms,
        offset_ms=offset_ms,
        slope=slope,
        num_sampled=len(sampled),
        median_error=_leave_one_out_error(sums, measured),
        **_conditions(target, options),
    )


@dataclass(frozen=True, kw_only=True)
class Timing(_Conditions):
    """The measured time of one batch's forward pass of a network."""

    latency_ms: float
    """Median over the rounds, in ms."""


def time_networks(
    networks: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    options: LatencyOptions,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Return the time of each network on `device`, timed alternately, in eval and inference mode.

    `input_shape` is (C, H, W); `options.num_sampled` is not used. The networks and torch's number of threads stay
    unchanged. Raises InvalidValueError for cuda on a machine without it, and for a network that cannot run such an
    image.
    """
    target = timed_device(device)
    works: dict[Any, Work] = {}
    for name, network in networks.items():
        copied = replace_modules(network, {}).eval().to(target)
        output_of(copied, input_shape)
        images = torch.randn(options.batch_size, *input_shape, generator=torch.Generator().manual_seed(0))
        works[name] = (copied, [images.to(zero_images(copied, 1, input_shape))])
    with threads(options.threads), torch.inference_mode():
        times = typical_ms(works, options.repeats, target)
    conditions = _conditions(target, options)
    return {name: Timing(latency_ms=ms, **conditions) for name, ms in times.items()}


def _conditions(device: torch.device, options: LatencyOptions) -> dict[str, Any]:
    values = (device_name(device), socket.gethostname(), options.batch_size, options.threads)
    return dict(zip(_WHERE, values, strict=True))


class _Precomputed(nn.Module):
    """Replaces a decomposed layer and returns a precomputed tensor of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.outputs: dict[torch.Size, Tensor] = {}

    def record(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        images = input_of(args, kwargs)
        self.inputs.append(images)
        self.outputs[images.shape] = torch.zeros_like(output)

    def forward(self, input: Tensor) -> Tensor:
        return self.outputs[input.shape]


def _works(supernet: nn.Module, sampled: Sequence[Configuration], batch: Tensor) -> dict[Any, Work]:
    """Return the modules to time, with the inputs of their calls: REST, (layer, group-size) and each configuration.

    The whole networks equal those of `extract`, but share the weights of the modules that are timed alone: twenty
    copies may not fit into memory.
    """
    layers, device = series_layers(supernet), batch.device
    network = extract(supernet, largest_decomposed(supernet)).eval().to(device)
    free = {name: _Precomputed() for name in layers}
    handles = [
        network.get_submodule(name).register_forward_hook(stub.record, with_kwargs=True) for name, stub in free.items()
    ]
    with network_errors_as_invalid_value(batch.shape[1:]):
        network(batch)
    for handle in handles:
        handle.remove()
    works: dict[Any, Work] = {REST: (replace_modules(network, free, share_weights=True), [batch])}
    for name, layer in layers.items():
        for size in layer.group_sizes:
            works[name, size] = (layer.to_modules(size).eval().to(device), free[name].inputs)
    for configuration in sampled:
        chosen = {name: works[name, size][0] for name, size in zip(layers, configuration, strict=True)}
        works[configuration] = (replace_modules(network, chosen, share_weights=True), [batch])
    return works


def _sample(space: SearchSpace, num_sampled: int, generator: torch.Generator) -> list[Configuration]:
    """Draw different configurations uniformly from the space; return all of a space no larger than `num_sampled`."""
    sizes = list(space.group_sizes.values())
    total = prod(map(len, sizes))  # len(space) fails above 2^63
    if total < 2:
        raise InvalidValueError("latency of a space of one configuration: needs two group-sizes or more in a layer")
    if total <= num_sampled:
        return list(space)
    chosen: dict[Configuration, None] = {}
    while len(chosen) < num_sampled:
        indices = [int(torch.randint(len(s), (), generator=generator, device=generator.device)) for s in sizes]
        chosen[Configuration([s[index] for s, index in zip(sizes, indices, strict=True)])] = None
    return list(chosen)


def _fit(sums: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """Return offset (ms) and slope, 0 or more, of a least-squares fit; slope 1 if all sums are equal."""
    spread = sums - sums.mean()
    slope = max(0.0, float(spread @ measured / (spread @ spread))) if np.ptp(sums) else 1.0
    return float(measured.mean() - slope * sums.mean()), slope


def _leave_one_out_error(sums: np.ndarray, measured: np.ndarray) -> float:
    """Return the median of |predicted - measured| / measured, each configuration left out of its own fit."""
    errors = []
    for left_out in range(len(sums)):
        offset_ms, slope = _fit(np.delete(sums, left_out), np.delete(measured, left_out))
        predicted = max(0.0, offset_ms + slope * sums[left_out])
        errors.append(abs(predicted - measured[left_out]) / measured[left_out])
    return float(np.median(errors))
