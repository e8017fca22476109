"""The networks of `benchmarks/peers.py`: uncut ones equal the original, and cut ones are within their budgets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_pruning as tp
from hooked import hooked_macs
from hypothesis import given
from hypothesis import strategies as st
from peer_decisions import STEPS, nearest_within
from peer_networks import (
    Cut,
    _rank,
    decomposed,
    narrower,
    pruned,
    tucker,
    tucker_layer,
    uniform_configurations,
    with_convolved_shortcuts,
    with_gradients,
)
from torch import nn

from gross_ray.btd.options import BTDOptions
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.models import build_model
from gross_ray.nn.batch_norm import as_if_trained
from gross_ray.space import DENSE
from gross_ray.supernet.layers import choice_of

SHAPE = (3, 32, 32)


def made(name: str) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    network = build_model(name, num_classes=10, generator=generator).eval()
    as_if_trained(network, generator)
    return network


NETWORKS = {name: made(name) for name in ("four-conv", "resnet20")}
IMAGES = load_dataset(DataOptions(name="sample", limit_train=64, limit_validation=10, limit_test=10)).train


def magnitude(network: nn.Module) -> Cut:
    return pruned(network, SHAPE, tp.importance.GroupMagnitudeImportance(p=2))


def taylor(network: nn.Module) -> Cut:
    return pruned(with_gradients(network, IMAGES), SHAPE, tp.importance.GroupTaylorImportance())


CUTS: list[Callable[[nn.Module], Cut]] = [magnitude, taylor, tucker]


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one(images), other(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("cut_of", CUTS)
def test_a_ratio_of_zero_leaves_the_function_unchanged(name: str, cut_of: Callable[[nn.Module], Cut]) -> None:
    network = NETWORKS[name]
    uncut = cut_of(network)(0.0, 1)
    assert_equal(uncut, network)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in uncut.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("cut_of", [*CUTS, lambda network: narrower(network, SHAPE, 0)])
@pytest.mark.parametrize("limit", [0.6, 0.4])
def test_cut_networks_are_within_their_budget(name: str, cut_of: Callable[[nn.Module], Cut], limit: float) -> None:
    network, cut = NETWORKS[name], cut_of(NETWORKS[name])
    full = hooked_macs(network)
    ratio = nearest_within(cut, 1, lambda one: hooked_macs(one) / full, limit, STEPS["macs"])
    share = hooked_macs(cut(ratio, 1)) / full
    assert 0.95 * limit < share <= limit
    assert 0.99 * limit < share or cut_of not in (magnitude, taylor)  # even cuts have few widths, ranks few numbers


def test_the_original_stays_unchanged() -> None:
    network = NETWORKS["resnet20"]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for cut_of in CUTS:
        cut_of(network)(0.3, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_channels_and_ranks_are_multiples() -> None:
    network = NETWORKS["resnet20"]
    for cut_of in CUTS:
        layers = [module for module in cut_of(network)(0.3, 4).modules() if isinstance(module, nn.Conv2d)]
        assert all(layer.out_channels % 4 == 0 or layer.in_channels == 3 for layer in layers)


def test_shortcuts_as_convolutions_equal_those_of_kind_a() -> None:
    network = NETWORKS["resnet20"]
    convolved = with_convolved_shortcuts(network)
    assert_equal(convolved, network)
    assert not any(isinstance(module, nn.ConstantPad3d) for module in convolved.modules())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_tucker_with_all_ranks_equals_the_convolution(stride: int, bias: bool) -> None:
    conv = nn.Conv2d(6, 10, 3, stride=stride, padding=1, bias=bias)
    images = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(tucker_layer(conv, 10, 6)(images), conv(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tucker_layer(conv, 5, 3)(images), conv(images), rtol=1e-2)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.floats(0, 0.99), st.sampled_from([1, 4, 8]))
def test_a_rank_is_the_smallest_that_keeps_the_energy(energies: list[float], lost: float, round_to: int) -> None:
    spectrum = torch.tensor(sorted(energies, reverse=True), dtype=torch.float64)
    rank, total = _rank(spectrum, lost, 1), float(spectrum.sum())
    assert float(spectrum[rank:].sum()) <= lost * total + 1e-9
    assert rank == 1 or float(spectrum[rank - 1 :].sum()) > lost * total - 1e-9
    rounded = _rank(spectrum, lost, round_to)
    assert rank <= rounded <= len(spectrum) and (rounded % round_to == 0 or rounded == len(spectrum))


def test_weights_of_a_narrower_network_depend_on_the_seed_alone() -> None:
    first, same, other = (narrower(NETWORKS["four-conv"], SHAPE, seed)(0.25, 1) for seed in (0, 0, 1))
    weights = [one.state_dict()["conv2.weight"] for one in (first, same, other)]
    assert weights[0].shape == (24, 24, 3, 3)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_uniform_configurations_take_the_size_where_it_pays() -> None:
    choice = choice_of(NETWORKS["resnet20"], keep_dense=True, input_shape=SHAPE)
    found = uniform_configurations(choice)
    sizes = [max(one) for one in found]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
    for size, one in zip(sizes, found, strict=True):
        assert all(
            chosen == (size if size in each else DENSE)
            for chosen, each in zip(one, choice.group_sizes.values(), strict=True)
        )


def test_decomposed_networks_equal_the_original_where_nothing_is_cut() -> None:
    network, options = NETWORKS["four-conv"], BTDOptions(max_steps=3)
    dense = dict.fromkeys(("conv2", "conv3", "conv4"), DENSE)
    assert_equal(decomposed(network, dense, [], options, 0), network)
    cut = dense | {"conv3": 1, "conv4": 4}
    as_bottlenecks = decomposed(network, cut, [], options, 0)
    folded = decomposed(network, cut, ["conv3"], options, 0)
    assert_equal(folded, as_bottlenecks)
    assert isinstance(folded.get_submodule("conv3"), nn.Conv2d)
    assert hooked_macs(as_bottlenecks) < hooked_macs(folded) < hooked_macs(network)
