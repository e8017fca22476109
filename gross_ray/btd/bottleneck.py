"""The 1x1 -> grouped kxk -> 1x1 bottleneck that equals a block term decomposition."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gross_ray.btd.expansion import expand_grouped_weight
from gross_ray.errors import InvalidValueError


def bottleneck_macs(
    in_channels: int, out_channels: int, kernel: int, group_size: int, positions_before: int, positions_after: int
) -> int:
    """Return the MACs of a bottleneck; `kernel` is kH * kW, positions are N * H * W of the input and the output."""
    pointwise_in = positions_before * in_channels * in_channels
    grouped = positions_after * in_channels * group_size * kernel
    return pointwise_in + grouped + positions_after * in_channels * out_channels


@dataclass(frozen=True)
class Bottleneck:
    """The three weights of a bottleneck. It has no non-linearity, so it equals one dense convolution."""

    pointwise_in: Tensor
    """P, (C_in, C_in, 1, 1)."""
    grouped: Tensor
    """R, (C_in, g, kH, kW): a convolution with group-size g, C_in / g groups."""
    pointwise_out: Tensor
    """Q, (C_out, C_in, 1, 1)."""

    def __post_init__(self) -> None:
        channels, group_size = self.grouped.shape[:2]
        shape_in, shape_out = tuple(self.pointwise_in.shape), tuple(self.pointwise_out.shape)
        if shape_in != (channels, channels, 1, 1) or shape_out[1:] != (channels, 1, 1):
            raise InvalidValueError(
                f"a bottleneck of {channels} channels needs pointwise_in ({channels}, {channels}, 1, 1) and "
                f"pointwise_out (C_out, {channels}, 1, 1), not {shape_in} and {shape_out}"
            )
        if channels % group_size:
            raise InvalidValueError(f"group-size (={group_size}) must divide the channels (={channels})")

    @property
    def group_size(self) -> int:
        """Number of input channels that each output channel of the grouped convolution sees."""
        return self.grouped.shape[1]

    def dense_kernel(self) -> Tensor:
        """Return the kernel (C_out, C_in, kH, kW) of the dense convolution that equals this bottleneck."""
        channels, group_size, *kernel = self.grouped.shape
        groups = channels // group_size
        spatial = kernel[0] * kernel[1]
        out_channels = self.pointwise_out.shape[0]
        # r: group, b: output in group, a: input in group, k: position in the kernel
        grouped_rbka = self.grouped.reshape(groups, group_size, group_size, spatial).transpose(2, 3)
        pointwise_in_rai = self.pointwise_in.reshape(groups, group_size, channels)
        seen_rbki = grouped_rbka.reshape(groups, group_size * spatial, group_size) @ pointwise_in_rai
        pointwise_out_oc = self.pointwise_out.reshape(out_channels, channels)
        dense = pointwise_out_oc @ seen_rbki.reshape(channels, spatial * channels)
        return dense.reshape(out_channels, *kernel, channels).permute(0, 3, 1, 2)

    def expand(self, target_group_size: int) -> Bottleneck:
        """Return the same function as a bottleneck of a larger group-size (Psi on the grouped weight, Eq. 5)."""
        return Bottleneck(self.pointwise_in, expand_grouped_weight(self.grouped, target_group_size), self.pointwise_out)
