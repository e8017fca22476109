"""SeriesConv2d: one layer's decompositions at all group-sizes, as a sum of terms (Eq. 6, 7)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.btd.expansion import sum_of_expansions
from gross_ray.errors import InvalidValueError
from gross_ray.space import DENSE, listed, ordered

Conv2d = Callable[..., Tensor]
"""Takes the arguments of torch.nn.functional.conv2d and returns its result."""


class SeriesConv2d(nn.Module):
    """A convolution whose bottleneck at group-size s_n is the sum of the first n terms of a series (Eq. 6).

    The n-th terms are the differences p_n, r_n, q_n to the next smaller group-size (Eq. 7), so that a step at a large
    group-size trains the smaller ones too. `group_size` is the active one. If DENSE is among the group-sizes, the
    original convolution is a choice beside the series: its weight is a frozen buffer, which the state dict leaves out,
    or after `train_dense` a parameter.
    Stride, padding and dilation belong to the grouped convolution. Input (N, C_in, H, W) and output (N, C_out, H', W')
    are those of the replaced convolution.
    """

    dense_weight: Tensor
    """(C_out, C_in, kH, kW): the original weight; None without DENSE."""

    def __init__(self, conv: nn.Conv2d, group_sizes: Iterable[int]) -> None:
        """Make a series of zeros in place of `conv`; `from_bottlenecks` fills it. `group_sizes` may include DENSE.

        Raises InvalidValueError for a grouped convolution, or if a group-size does not divide the next.
        """
        super().__init__()
        self.group_sizes = ordered(group_sizes)
        """All choices: the group-sizes of the series, ascending, and DENSE last if it is one."""
        self.series_sizes = tuple(size for size in self.group_sizes if size != DENSE)
        """The group-sizes of the series, ascending."""
        _check_series(conv, self.series_sizes, alone=DENSE not in self.group_sizes)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size = cast(tuple[int, int], conv.kernel_size)
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.padding_mode = conv.padding_mode
        self._padding_both_sides = conv._reversed_padding_repeated_twice
        self._active = (self.series_sizes or self.group_sizes)[-1]
        self.composed = False
        """Whether `forward` runs a bottleneck as the dense convolution that it equals."""
        channels = conv.in_channels

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=conv.weight.dtype, device=conv.weight.device))

        self.pointwise_in = nn.ParameterList(zeros(channels, channels, 1, 1) for _ in self.series_sizes)
        self.grouped = nn.ParameterList(zeros(channels, size, *self.kernel_size) for size in self.series_sizes)
        self.pointwise_out = nn.ParameterList(zeros(conv.out_channels, channels, 1, 1) for _ in self.series_sizes)
        dense = conv.weight.detach().clone() if DENSE in self.group_sizes else None
        self.register_buffer("dense_weight", dense, persistent=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())

    @classmethod
    def from_bottlenecks(
        cls, conv: nn.Conv2d, bottlenecks: Iterable[Bottleneck], *, keep_dense: bool = False
    ) -> SeriesConv2d:
        """Return the series that equals each bottleneck at its group-size (Eq. 7), with `keep_dense` also at DENSE.

        The differences are computed in the bottlenecks' dtype and stored in that of `conv`, whose bias is kept. Raises
        InvalidValueError for bottlenecks of another convolution, or two of the same group-size.
        """
        ascending = sorted(bottlenecks, key=lambda bottleneck: bottleneck.group_size)
        sizes = [bottleneck.group_size for bottleneck in ascending]
        series = cls(conv, [*sizes, DENSE] if keep_dense else sizes)
        _check_bottlenecks(conv, ascending)
        with torch.no_grad():
            for n, bottleneck in enumerate(ascending):
                terms = (bottleneck.pointwise_in, bottleneck.grouped, bottleneck.pointwise_out)
                if n:
                    smaller = ascending[n - 1].expand(bottleneck.group_size)
                    before = (smaller.pointwise_in, smaller.grouped, smaller.pointwise_out)
                    terms = cast(
                        tuple[Tensor, Tensor, Tensor], tuple(a - b for a, b in zip(terms, before, strict=True))
                    )
                for parameters, term in zip(series._terms(), terms, strict=True):
                    parameters[n].copy_(term)
        return series

    def train_dense(self) -> None:
        """Make the original weight, if DENSE is a choice, a parameter: it can be trained, and is in the state dict."""
        if DENSE in self.group_sizes and not isinstance(self.dense_weight, nn.Parameter):
            weight = self.dense_weight
            del self.dense_weight
            self.dense_weight = nn.Parameter(weight)

    @property
    def group_size(self) -> int:
        """The active group-size; setting a value that is not in `group_sizes` raises InvalidValueError."""
        return self._active

    @group_size.setter
    def group_size(self, group_size: int) -> None:
        _check_choice(group_size, self.group_sizes)
        self._active = group_size

    def bottleneck(self, group_size: int) -> Bottleneck:
        """Return the sum of the series up to `group_size` (Eq. 6), differentiable."""
        _check_choice(group_size, self.series_sizes)
        count = self.series_sizes.index(group_size) + 1
        pointwise_in, grouped, pointwise_out = (list(terms)[:count] for terms in self._terms())
        return Bottleneck(_total(pointwise_in), sum_of_expansions(grouped), _total(pointwise_out))

    def forward(self, input: Tensor) -> Tensor:
        """Run the active choice, a bottleneck or the original; the argument has the same name as nn.Conv2d's."""
        if self._active == DENSE:
            return self.convolve_dense(input, self.dense_weight, self.bias)
        weights = self.bottleneck(self._active)
        terms = weights.pointwise_in, weights.grouped, weights.pointwise_out
        return self.convolve(input, *terms, composed=self.composed)

    def convolve(
        self,
        images: Tensor,
        pointwise_in: Tensor,
        grouped: Tensor,
        pointwise_out: Tensor,
        *,
        composed: bool = False,
        conv2d: Conv2d | None = None,
    ) -> Tensor:
        """Run a bottleneck of any group-size with this layer's stride, padding, dilation and bias.

        With `composed`, run the dense convolution that it equals. `conv2d` does the convolutions in place of torch's.
        """
        conv2d = conv2d or F.conv2d
        if composed:
            kernel = Bottleneck(pointwise_in, grouped, pointwise_out).dense_kernel()
            kernel = kernel.contiguous() if images.is_contiguous() else kernel  # it is made channels-last
            return self.convolve_dense(images, kernel, self.bias, conv2d=conv2d)
        hidden, padding = self.padded(conv2d(images, pointwise_in))
        groups = self.in_channels // grouped.shape[1]
        hidden = conv2d(hidden, grouped, None, self.stride, padding, self.dilation, groups)
        return conv2d(hidden, pointwise_out, self.bias)

    def convolve_dense(
        self, images: Tensor, weight: Tensor, bias: Tensor | None, *, conv2d: Conv2d | None = None
    ) -> Tensor:
        """Run a dense convolution with this layer's geometry; `conv2d` does it in place of torch's."""
        images, padding = self.padded(images)
        return (conv2d or F.conv2d)(images, weight, bias, self.stride, padding, self.dilation)

    def dense_kernel(self, choice: int) -> Tensor:
        """Return the kernel (C_out, C_in, kH, kW) of the dense convolution that a choice equals."""
        return self.dense_weight if choice == DENSE else self.bottleneck(choice).dense_kernel()

    def padded(self, images: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
        """Return the grouped convolution's input, padded unless with zeros, and the padding that F.conv2d must add."""
        if self.padding_mode == "zeros":
            return images, self.padding
        return F.pad(images, self._padding_both_sides, mode=self.padding_mode), (0, 0)

    def to_modules(self, group_size: int) -> nn.Sequential | nn.Conv2d:
        """Return the bottleneck at `group_size` as three plain torch.nn.Conv2d; at DENSE the original as one."""
        geometry: dict[str, Any] = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "padding_mode": self.padding_mode,
        }
        if group_size == DENSE:
            _check_choice(DENSE, self.group_sizes)
            return _plain_conv(self.dense_weight, self.bias, **geometry)
        bottleneck = self.bottleneck(group_size)
        grouped = _plain_conv(bottleneck.grouped, groups=self.in_channels // group_size, **geometry)
        return nn.Sequential(
            OrderedDict(
                pointwise_in=_plain_conv(bottleneck.pointwise_in),
                grouped=grouped,
                pointwise_out=_plain_conv(bottleneck.pointwise_out, self.bias),
            )
        )

    def extra_repr(self) -> str:
        """Return the layer's text in `print(model)`."""
        sizes = listed(self.group_sizes)
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, group_sizes=({sizes})"

    def series_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all terms: everything but the bias."""
        return [parameter for terms in self._terms() for parameter in terms]

    def _terms(self) -> tuple[nn.ParameterList, nn.ParameterList, nn.ParameterList]:
        return self.pointwise_in, self.grouped, self.pointwise_out


def _check_choice(choice: int, choices: tuple[int, ...]) -> None:
    if choice not in choices:
        raise InvalidValueError(
            f"group-size {listed([choice])} is not in this layer's series; choose one of: {listed(choices)}"
        )


def _total(terms: list[nn.Parameter]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(dim=0)  # type: ignore[arg-type]


def _plain_conv(weight: Tensor, bias: Tensor | None = None, *, groups: int = 1, **geometry: Any) -> nn.Conv2d:
    out_channels, inputs, *kernel = weight.shape
    like = {"dtype": weight.dtype, "device": weight.device}
    options = {"groups": groups, "bias": bias is not None} | geometry | like
    conv = nn.Conv2d(inputs * groups, out_channels, (kernel[0], kernel[1]), **options)
    with torch.no_grad():
        conv.weight.copy_(weight)
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
    return conv


def _check_bottlenecks(conv: nn.Conv2d, ordered: list[Bottleneck]) -> None:
    for bottleneck in ordered:
        shape = (bottleneck.pointwise_out.shape[0], bottleneck.grouped.shape[0], *bottleneck.grouped.shape[2:])
        if shape != tuple(conv.weight.shape):
            raise InvalidValueError(
                f"a bottleneck of (C_out, C_in, kH, kW) = {shape} cannot replace a convolution of weight "
                f"{tuple(conv.weight.shape)}"
            )
    sizes = [bottleneck.group_size for bottleneck in ordered]
    if len(set(sizes)) < len(sizes):
        raise InvalidValueError(
            f"bottlenecks of group-sizes {', '.join(map(str, sizes))}: must differ; give one for each group-size"
        )


def _check_series(conv: nn.Conv2d, group_sizes: tuple[int, ...], *, alone: bool) -> None:
    if conv.groups != 1:
        raise InvalidValueError(
            f"groups = {conv.groups} of {conv.in_channels} input channels: only a convolution with groups=1 can be "
            "decomposed"
        )
    if not group_sizes and alone:
        raise InvalidValueError("group-sizes (): a series needs one or more")
    for smaller, larger in pairwise((*group_sizes, conv.in_channels)):
        if smaller < 1 or larger % smaller:
            raise InvalidValueError(f"group-size {smaller} must divide {larger}, the next group-size or C_in")
