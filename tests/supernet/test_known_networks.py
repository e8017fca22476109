"""torchvision's networks as supernets: a configuration equals the network with its bottlenecks' dense kernels."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gross_ray.models import model_of
from gross_ray.search.cost import configuration_macs, count_macs, layer_costs
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.configure import extract, series_layers, set_configuration
from gross_ray.supernet.layers import choice_of

SIZES = (1, 4, 16, 32)
NETWORKS = {
    "torchvision.models:vgg16": (12, 0),
    "torchvision.models:vgg16_bn": (12, 0),
    "torchvision.models:resnet18": (16, 3),
    "torchvision.models:resnet50": (16, 36),
}
"""Number of decomposed layers, and of layers that are left alone because they are 1x1."""


def dense_kernel(weights: list[Tensor], groups: int) -> Tensor:
    """Return a bottleneck's dense kernel by definition, from its response to a unit impulse in each channel."""
    first, grouped, last = (weight.double() for weight in weights)
    channels, kernel = first.shape[1], grouped.shape[2:]
    response = torch.zeros(channels, len(first), 2 * kernel[0] - 1, 2 * kernel[1] - 1, dtype=torch.float64)
    response[..., kernel[0] - 1, kernel[1] - 1] = first[..., 0, 0].T  # of the first convolution: where the impulse is
    hidden = nn.functional.conv2d(response, grouped, groups=groups)
    return nn.functional.conv2d(hidden, last).flip(2, 3).transpose(0, 1)


@pytest.fixture(scope="module", params=NETWORKS)
def named(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """A network and its supernet; random weights keep the responses of all layers at about the same scale."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = model_of(request.param, num_classes=10, image_size=64).eval()
        if "vgg" in request.param:
            network.classifier = nn.Linear(512 * 7 * 7, 10)  # three layers of 120 million weights, in float64 too
        choice = choice_of(network, sizes=SIZES)
        decomposed, pointwise = NETWORKS[request.param]
        reasons = list(choice.left_alone.values())
        assert len(choice.convs) == decomposed
        assert (reasons.count("1x1"), reasons.count("the network's first convolution")) == (pointwise, 1)
        assert len(reasons) == pointwise + 1
        supernet = empty_supernet(network, choice.group_sizes).eval()
        with torch.no_grad():
            for layer in series_layers(supernet).values():
                for parameter in layer.series_parameters():
                    parameter.normal_(std=(parameter.shape[-3] * parameter[0, 0].numel()) ** -0.5)
    yield request.param, network, supernet


def test_configurations_equal_the_network_with_dense_kernels(named: tuple[str, nn.Module, nn.Module]) -> None:
    _, network, supernet = named
    network, precise = copy.deepcopy(network).double(), copy.deepcopy(supernet).double()
    space, shape = SearchSpace.of(supernet), (3, 64, 64)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, *shape, generator=generator)
    macs, parameters = (layer_costs(supernet, shape, name) for name in ("macs", "parameters"))
    mixed = Configuration([SIZES[int(torch.randint(4, (), generator=generator))] for _ in space.layers])
    for configuration in (mixed, Configuration([32] * len(space.layers))):
        plain = extract(supernet, configuration)
        assert {type(module).__module__.split(".")[0] for module in plain.modules()} <= {"torch", "torchvision"}
        with torch.no_grad():
            for layer, kernel in dense_kernels(network, extract(precise, configuration), space).items():
                network.get_submodule(layer).weight.copy_(kernel)
            expected = network(images.double())
            scale = float(expected.abs().max())
            for compressed, tolerance in ((precise, 1e-12), (supernet, 1e-5), (plain, 1e-5)):
                if compressed is not plain:
                    set_configuration(compressed, configuration)
                outputs = compressed(images.to(next(compressed.parameters()).dtype))
                torch.testing.assert_close(outputs.double(), expected, rtol=0, atol=tolerance * scale)
        counted = count_macs(plain, shape)
        assert counted == configuration_macs(supernet, configuration, shape) == macs.of_one(configuration)
        assert sum(parameter.numel() for parameter in plain.parameters()) == parameters.of_one(configuration)


def dense_kernels(network: nn.Module, plain: nn.Module, space: SearchSpace) -> dict[str, Tensor]:
    found = {}
    for layer in space.layers:
        bottleneck = plain.get_submodule(layer)
        assert isinstance(bottleneck, nn.Sequential)
        convs = [module for module in bottleneck if isinstance(module, nn.Conv2d)]
        original = network.get_submodule(layer)
        assert isinstance(original, nn.Conv2d)
        assert (convs[1].stride, convs[1].padding) == (original.stride, original.padding)
        found[layer] = dense_kernel([conv.weight.detach() for conv in convs], convs[1].groups)
    return found


def test_a_plain_network_is_pickled_and_loaded_without_gross_ray(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = model_of("torchvision.models:resnet18", num_classes=10, image_size=64).eval()
        supernet = empty_supernet(network, choice_of(network, sizes=SIZES).group_sizes).eval()
        with torch.no_grad():
            for layer in series_layers(supernet).values():
                for parameter in layer.series_parameters():
                    parameter.normal_(std=0.05)
    plain = extract(supernet, [4] * 16)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (tmp_path / "network.pickle").write_bytes(pickle.dumps((plain, images, plain(images))))
    code = """
import pickle, sys
sys.modules["gross_ray"] = None
import torch
network, images, expected = pickle.load(open("network.pickle", "rb"))
torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
