"""What `EngineOptions.kernels` changes while steps are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gross_ray.supernet.series import SeriesConv2d
from gross_ray.training.options import CUDNN_BENCHMARK, EngineOptions


@contextmanager
def kernels_of(engine: EngineOptions, network: nn.Module) -> Iterator[None]:
    """Within the block, run the series of `network` composed, and cuDNN with its benchmark, where `engine` says so."""
    composed = "composed" in engine.kernels
    layers = [module for module in network.modules() if composed and isinstance(module, SeriesConv2d)]
    benchmark = torch.backends.cudnn.benchmark
    for layer in layers:
        layer.composed = True
    torch.backends.cudnn.benchmark = benchmark or CUDNN_BENCHMARK in engine.kernels
    try:
        yield
    finally:
        for layer in layers:
            layer.composed = False
        torch.backends.cudnn.benchmark = benchmark
