"""The 1x1 -> grouped kxk -> 1x1 bottleneck that a block term decomposition is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gross_ray.btd.expansion import expand_grouped_weight
from gross_ray.errors import InvalidValueError


@dataclass(frozen=True)
class Bottleneck:
    """The three weights of a bottleneck; between them stands no non-linearity, so it equals one dense convolution."""

    pointwise_in: Tensor
    """P, (C_in, C_in, 1, 1)."""
    grouped: Tensor
    """R, (C_in, g, kH, kW): a convolution with group-size g, C_in / g groups."""
    pointwise_out: Tensor
    """Q, (C_out, C_in, 1, 1)."""

    def __post_init__(self) -> None:
        channels, group_size = self.grouped.shape[:2]
        if tuple(self.pointwise_in.shape) != (channels, channels, 1, 1) or tuple(self.pointwise_out.shape[1:]) != (
            channels,
            1,
            1,
        ):
            raise InvalidValueError(
                f"a bottleneck of {channels} channels needs pointwise_in ({channels}, {channels}, 1, 1) and "
                f"pointwise_out (C_out, {channels}, 1, 1), not {tuple(self.pointwise_in.shape)} and "
                f"{tuple(self.pointwise_out.shape)}"
            )
        if channels % group_size:
            raise InvalidValueError(f"group-size (={group_size}) must divide the channels (={channels})")

    @property
    def group_size(self) -> int:
        """Input channels each output channel of the grouped convolution sees."""
        return self.grouped.shape[1]

    def dense_kernel(self) -> Tensor:
        """Return the (C_out, C_in, kH, kW) kernel of the dense convolution that this bottleneck equals."""
        channels, group_size, *kernel = self.grouped.shape
        groups = channels // group_size
        spatial = kernel[0] * kernel[1]
        out_channels = self.pointwise_out.shape[0]
        # r: group, b: output in group, a: input in group, k: place in the kernel
        grouped_rbka = self.grouped.reshape(groups, group_size, group_size, spatial).transpose(2, 3)
        pointwise_in_rai = self.pointwise_in.reshape(groups, group_size, channels)
        seen_rbki = grouped_rbka.reshape(groups, group_size * spatial, group_size) @ pointwise_in_rai
        pointwise_out_oc = self.pointwise_out.reshape(out_channels, channels)
        dense = pointwise_out_oc @ seen_rbki.reshape(channels, spatial * channels)
        return dense.reshape(out_channels, *kernel, channels).permute(0, 3, 1, 2)

    def expand(self, target_group_size: int) -> Bottleneck:
        """Return the equal bottleneck of a larger group-size (Psi on the grouped weight, Eq. 5)."""
        return Bottleneck(self.pointwise_in, expand_grouped_weight(self.grouped, target_group_size), self.pointwise_out)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Bottleneck:
        """Return the bottleneck with its weights in another dtype or on another device."""
        weights = (self.pointwise_in, self.grouped, self.pointwise_out)
        return Bottleneck(*(weight.to(device=device, dtype=dtype) for weight in weights))
