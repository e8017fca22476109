from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.supernet.build import build_supernet
from gross_ray.supernet.layers import choose_layers

if TYPE_CHECKING:
    from s3_server import Door

torch.set_num_threads(1)
settings.register_profile("gross_ray", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("gross_ray")
sys.path.insert(0, str(Path(__file__).parent))  # s3_server.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch has no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of an S3 server on loopback with an empty bucket called runs."""
    from s3_server import serving

    with serving() as port:
        yield port


@pytest.fixture
def door(s3_port: int) -> Iterator[Door]:
    """The same server behind a proxy that can answer requests itself; `door.port` is the proxy's."""
    from s3_server import Door

    with Door.opened(s3_port) as door:
        yield door


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="session")
def trained_like_weight() -> Callable[..., Tensor]:
    """Weights like trained ones: few strong directions in the channels, and a tail of noise."""

    def make(out_channels: int, in_channels: int, *kernel: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        decay_o = 0.7 ** torch.arange(out_channels, dtype=torch.float64)
        decay_i = 0.7 ** torch.arange(in_channels, dtype=torch.float64)
        directions = (
            _normal(generator, out_channels, in_channels, *kernel) * (decay_o[:, None] * decay_i)[..., None, None]
        )
        mix_o = torch.linalg.qr(_normal(generator, out_channels, out_channels))[0]
        mix_i = torch.linalg.qr(_normal(generator, in_channels, in_channels))[0]
        strong = torch.einsum("xyhw,ox,iy->oihw", directions, mix_o, mix_i)
        return strong + 0.02 * _normal(generator, *strong.shape)

    return make


@pytest.fixture(scope="session")
def random_bottleneck() -> Callable[..., Bottleneck]:
    """A float64 bottleneck of random weights that preserve the scale of their input."""

    def make(conv: nn.Conv2d, group_size: int, generator: torch.Generator) -> Bottleneck:
        channels, (height, width) = conv.in_channels, conv.kernel_size
        return Bottleneck(
            _normal(generator, channels, channels, 1, 1) * channels**-0.5,
            _normal(generator, channels, group_size, height, width) * (2 / (group_size * height * width)) ** 0.5,
            _normal(generator, conv.out_channels, channels, 1, 1) * channels**-0.5,
        )

    return make


@pytest.fixture(scope="session")
def random_supernet(random_bottleneck: Callable[..., Bottleneck]) -> Callable[..., nn.Module]:
    """A supernet in evaluation mode whose group-sizes are independent functions."""

    def make(model: nn.Module, group_sizes: Mapping[str, Sequence[int]], seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        convs = choose_layers(model, list(group_sizes))
        return build_supernet(
            model,
            {
                name: [random_bottleneck(conv, size, generator) for size in group_sizes[name]]
                for name, conv in convs.items()
            },
        ).eval()

    return make
