"""Run a decomposed layer at several group-sizes at once, each as a bottleneck or as the equal dense convolution.

A bottleneck has no non-linearity between its three convolutions, so both forms are equal up to rounding. Which is
faster depends on the layer, the group-size and the device: `fastest_form` times them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.errors import InvalidValueError
from gross_ray.search.options import FORMS
from gross_ray.space import DENSE
from gross_ray.supernet.series import SeriesConv2d

REPEATS = 3
"""How often each form is timed; the fastest time counts."""
CLEARLY = 0.8
"""Another form is chosen only if it needs less than this share of the time of the stacked dense convolution: otherwise
noise in the timings would change the choice, and with it the rounding, from run to run."""


@dataclass(frozen=True)
class LayerForm:
    """In which form one layer runs."""

    by_size: Mapping[int, str]
    """dense or bottleneck, for each group-size."""
    stacked: bool = True
    """Whether dense group-sizes run as one convolution with the output channels of all of them."""

    def __post_init__(self) -> None:
        for form in self.by_size.values():
            if form not in FORMS:
                raise InvalidValueError(f"form = {form!r}: must be one of {', '.join(FORMS)}")

    @classmethod
    def uniform(cls, layer: SeriesConv2d, form: str) -> LayerForm:
        """Return a LayerForm with the same form at every group-size of `layer`; DENSE is always dense."""
        return cls({size: "dense" if size == DENSE else form for size in layer.group_sizes})


class Siblings:
    """One decomposed layer, prepared to run at any of its group-sizes; later changes of its weights are ignored."""

    def __init__(
        self, layer: SeriesConv2d, form: LayerForm, memory_format: torch.memory_format = torch.channels_last
    ) -> None:
        """Derive one dense kernel or one bottleneck for each group-size, as `form` says, for images in that format."""
        self._layer, self.form, self._memory_format = layer, form, memory_format
        dense = [size for size in layer.group_sizes if form.by_size[size] == "dense"]
        self._dense_index = {size: index for index, size in enumerate(dense)}
        kernels = [layer.dense_kernel(size) for size in dense]
        self._kernels = self._laid_out(torch.cat(kernels)) if kernels else None
        self._bottlenecks: dict[int, Bottleneck] = {}
        for size in layer.group_sizes:
            if form.by_size[size] == "bottleneck":
                terms = layer.bottleneck(size)
                self._bottlenecks[size] = Bottleneck(
                    *(self._laid_out(part) for part in (terms.pointwise_in, terms.grouped, terms.pointwise_out))
                )

    def run(self, images: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the layer's outputs at `sizes`, concatenated: (len(sizes) * N, C_out, H', W')."""
        outputs = []
        for run in self._runs(sizes):
            if run[0] in self._dense_index:
                outputs.append(self._run_dense(images, run))
            else:
                terms = self._bottlenecks[run[0]]
                outputs.append(self._layer.convolve(images, terms.pointwise_in, terms.grouped, terms.pointwise_out))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _runs(self, sizes: Sequence[int]) -> list[list[int]]:
        """Split `sizes` into runs of neighbouring dense group-sizes that one convolution computes, and single ones."""
        index = self._dense_index
        runs: list[list[int]] = []
        for size in sizes:
            if self.form.stacked and runs and index.get(size, -1) == index.get(runs[-1][-1], -3) + 1:
                runs[-1].append(size)
            else:
                runs.append([size])
        return runs

    def _run_dense(self, images: Tensor, sizes: list[int]) -> Tensor:
        layer, channels = self._layer, self._layer.out_channels
        assert self._kernels is not None
        images, padding = layer.padded(images)
        first = self._dense_index[sizes[0]] * channels
        kernels = self._kernels[first : first + len(sizes) * channels]
        bias = None if layer.bias is None else layer.bias.repeat(len(sizes))
        stacked = F.conv2d(images, kernels, bias, layer.stride, padding, layer.dilation)
        if len(sizes) == 1:
            return stacked
        num, _, height, width = stacked.shape
        apart = stacked.permute(0, 2, 3, 1).unflatten(3, (len(sizes), channels)).permute(3, 0, 1, 2, 4)
        joined = apart.reshape(len(sizes) * num, height, width, channels).permute(0, 3, 1, 2)
        return self._laid_out(joined)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self._memory_format)


def fastest_form(
    layer: SeriesConv2d, images: Tensor, memory_format: torch.memory_format = torch.channels_last
) -> LayerForm:
    """Time the forms of `layer` on `images`, which are in that format, on their device, and return the fastest."""
    sizes = layer.group_sizes
    stacked = Siblings(layer, LayerForm.uniform(layer, "dense"), memory_format)
    apart = Siblings(layer, LayerForm(stacked.form.by_size, stacked=False), memory_format)
    bottleneck = Siblings(layer, LayerForm.uniform(layer, "bottleneck"), memory_format)
    together = _seconds(images, lambda: stacked.run(images, sizes))
    one_each = _seconds(images, lambda: [apart.run(images, (size,)) for size in sizes])
    dense = min(together, one_each if one_each < CLEARLY * together else together) / len(sizes)
    by_size = {DENSE: "dense"} if DENSE in sizes else {}
    for size in layer.series_sizes:
        alone = _seconds(images, lambda size=size: bottleneck.run(images, (size,)))  # type: ignore[misc]
        by_size[size] = "bottleneck" if alone < CLEARLY * dense else "dense"
    return LayerForm(by_size, stacked=one_each >= CLEARLY * together)


def _seconds(images: Tensor, work: Callable[[], object]) -> float:
    def timed() -> float:
        started = time.perf_counter()
        work()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - started

    timed()  # warm-up
    return min(timed() for _ in range(REPEATS))
