"""MACs of whole networks: functional operations and attention against formulas, layers against their closed form."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gross_ray.nn.calls import network_calls
from gross_ray.report.inspection import inspection
from gross_ray.search.cost import LayerCosts, configuration_macs, count_macs, layer_costs, plain_macs
from gross_ray.search.operations import count_operations
from gross_ray.space import SearchSpace
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.configure import extract, set_configuration
from gross_ray.supernet.layers import choice_of

IMAGE = (3, 8, 9)


class Functional(nn.Module):
    """Convolutions of three kinds: called, functional, and by a module whose class torch's own layers are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 6, (3, 1), padding=(1, 0), bias=False)
        self.kernel = nn.Parameter(torch.zeros(8, 3, 3, 3))
        self.head = nn.Parameter(torch.zeros(10, 8))
        self.scores = nn.Parameter(torch.zeros(8))

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.conv2d(self.body(self.stem(images)), self.kernel, stride=2, groups=2)
        vectors = hidden.flatten(2).transpose(1, 2)
        weights = (vectors @ self.scores).softmax(dim=1)
        return torch.einsum("bn,bnc->bc", weights, vectors) @ self.head.T


FUNCTIONAL_MACS = 72 * 4 * 3 * 9 + 72 * 6 * 4 * 3 + 3 * 4 * 8 * 3 * 9 + 12 * 8 + 12 * 8 + 8 * 10


class Attentive(nn.Module):
    """Self-attention over the places of an image, 12 channels and `heads` heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.conv = nn.Conv2d(12, 12, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(12, heads, dim_feedforward=20, batch_first=True)
        self.norm = nn.LayerNorm([12, 8, 9])
        self.position = nn.Parameter(torch.zeros(1, 72, 12))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv(self.stem(images))).flatten(2).transpose(1, 2)
        return self.encoder(hidden + self.position).mean(dim=1)


# Queries, keys, values and the output; scores and what they weigh; the two layers behind.
ATTENTIVE_MACS = 72 * 12 * (3 + 12 * 9) + 72 * 12 * 12 * 4 + 2 * 72 * 72 * 12 + 2 * 72 * 12 * 20


@pytest.mark.parametrize(
    ("network", "macs"),
    [(Functional(), FUNCTIONAL_MACS), (Attentive(1), ATTENTIVE_MACS), (Attentive(3), ATTENTIVE_MACS)],
    ids=["functional", "attention", "attention of three heads"],
)
def test_functional_operations_and_attention_are_counted(network: nn.Module, macs: int) -> None:
    assert count_macs(network.train(), IMAGE) == macs
    assert network.training and count_operations(network, IMAGE).uncounted == {}


@pytest.mark.parametrize("make", [Functional, lambda: Attentive(2)], ids=["functional", "attention"])
def test_a_configuration_costs_what_its_extracted_network_costs(make: type[nn.Module]) -> None:
    network = make()
    supernet = empty_supernet(network, choice_of(network).group_sizes)
    space = SearchSpace.of(supernet)
    costs = layer_costs(supernet, IMAGE, "macs")
    assert len(space) > 2
    counted = [count_macs(extract(supernet, one), IMAGE) for one in space]
    assert costs.of(list(space)).tolist() == counted
    assert len(set(counted)) == len(space)
    for one, macs in zip(space, counted, strict=True):
        set_configuration(supernet, one)  # what is active makes no difference to the costs of all
        assert configuration_macs(supernet, space[0], IMAGE) == counted[0]
        assert count_macs(supernet, IMAGE) == macs


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Module:
    groups = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
    channels = (groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 4)))
    if transposed:
        return nn.ConvTranspose2d(*channels, kernel, stride, dilation=dilation, groups=groups)
    mode = draw(st.sampled_from(["zeros", "reflect", "circular"]))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()), padding_mode=mode)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(7, 11), st.integers(7, 11), st.integers(1, 5))
def test_the_closed_form_of_layers_is_what_torch_counts(
    conv: nn.Conv2d | nn.ConvTranspose2d, height: int, width: int, features: int
) -> None:
    stem = nn.Conv2d(3, conv.in_channels, 1)
    network = nn.Sequential(stem, conv, nn.AdaptiveAvgPool2d(2), nn.Linear(2, features))
    shape = (3, height, width)
    assert count_macs(network, shape) == sum(plain_macs(call) for call in network_calls(network, shape))


class Products(nn.Module):
    """A linear layer as products and sums of single elements, of which torch's counter knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 4))

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors[..., None, :] * self.weight).sum(dim=-1)


class Combined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.own = Products()
        self.pair = nn.Bilinear(5, 5, 2)
        self.unused = nn.Bilinear(5, 5, 2)
        self.gated = nn.GRU(4, 5, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        places = self.stem(images).flatten(2).transpose(1, 2)
        return self.pair(self.own(places[:, -1]), self.gated(places)[0][:, -1])


def test_modules_for_which_nothing_is_counted_are_named_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        macs = count_macs(Combined(), IMAGE)
    assert macs == 42 * 4 * 3 * 9 + 42 * 3 * 5 * (4 + 5)  # the stem, and the three gates of the GRU
    (warning,) = caught
    assert "own (Products), pair (Bilinear):" in str(warning.message)
    assert warning.filename == __file__
    network = Combined()
    _, whole = inspection(network, choice_of(network, ["stem"]), IMAGE)
    assert list(whole.notes) == [str(warning.message)]


def test_a_weight_that_is_derived_is_no_module_that_lacks_a_count() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    nn.utils.parametrizations.weight_norm(network[1])
    counted = count_operations(network, IMAGE)
    assert (counted.macs, counted.uncounted) == (42 * 4 * 3 * 9 + 20 * 4 * 4 * 9, {})


class Drawing(nn.Module):
    """Draws noise in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(F.dropout(images, training=True)))


@pytest.mark.parametrize("fast", [True, False])
def test_counting_changes_nothing(fast: bool) -> None:
    network = Drawing().train()
    network.norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state, was_fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        assert count_macs(network, IMAGE) == 42 * 4 * 27
        assert torch.backends.mha.get_fastpath_enabled() == fast
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
    assert torch.equal(state, torch.get_rng_state())
    assert (network.training, network.conv.training, network.norm.training) == (True, True, False)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


PARTS = st.dictionaries(st.integers(1, 64), st.integers(0, 2**40), min_size=1, max_size=5)


@given(st.lists(PARTS, min_size=1, max_size=4), st.integers(0, 2**50), st.booleans())
def test_a_cost_is_the_sum_of_its_parts(parts: list[dict[int, int]], shared: int, whole: bool) -> None:
    unit = 1 if whole else 0.5
    by_layer = {f"layer{place}": {size: cost * unit for size, cost in one.items()} for place, one in enumerate(parts)}
    costs = LayerCosts("macs", shared, by_layer)
    every = list(costs.space)
    expected = [
        shared + sum(one[size] for one, size in zip(by_layer.values(), configuration, strict=True))
        for configuration in every
    ]
    assert costs.of(every).tolist() == [costs.of_one(one) for one in every] == expected
    assert {type(one) for one in costs.of(every).tolist()} == {int if whole else float}
    assert (costs.minimum, costs.maximum) == (min(expected), max(expected))
    assert costs.cheapest == every[expected.index(min(expected))]
