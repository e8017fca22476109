import copy
from itertools import product

import pytest
import torch
from torch import nn

from gross_ray.btd.options import BTDOptions
from gross_ray.btd.solver import block_term_decomposition
from gross_ray.errors import InvalidValueError
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet import build
from gross_ray.supernet.build import build_supernet, decompose_model, empty_supernet
from gross_ray.supernet.configure import extract, get_configuration, series_layers, set_configuration
from gross_ray.supernet.layers import decomposable_layers, default_group_sizes
from gross_ray.supernet.series import SeriesConv2d

QUICK = BTDOptions(max_steps=3)


class Network(nn.Module):
    """Every kind of convolution; `body` is used under two names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.again = nn.ModuleList([self.body[0]])
        self.down = nn.Conv2d(8, 6, (3, 1), stride=2, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        hidden = self.body(self.stem(images)).relu()
        hidden = self.depthwise(self.pointwise(hidden)).relu()
        hidden = self.again[0](hidden).relu()
        return self.head(self.down(hidden).mean(dim=(2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().double().eval()


@pytest.fixture
def images(generator):
    return torch.randn(2, 3, 7, 6, generator=generator, dtype=torch.float64)


def test_only_dense_convolutions_after_the_first_are_decomposed(network):
    assert list(decomposable_layers(network)) == ["body.0", "down"]
    supernet = decompose_model(network, options=QUICK)
    assert list(series_layers(supernet)) == ["body.0", "down"]
    for name in ("stem", "pointwise", "depthwise"):
        kept, original = supernet.get_submodule(name), network.get_submodule(name)
        assert type(kept) is nn.Conv2d
        assert kept is not original and torch.equal(kept.weight, original.weight)


def test_the_original_model_stays_unchanged(network, images):
    network.body[1].train()
    before, modules = copy.deepcopy(network.state_dict()), list(network.modules())
    supernet = decompose_model(network, options=QUICK)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.zero_()
    assert list(network.modules()) == modules
    assert network.body[1].training and not network.training
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_at_full_rank_the_outputs_are_those_of_the_original(network, images):
    supernet = decompose_model(network, group_sizes={"body.0": [8], "down": [8]})
    torch.testing.assert_close(supernet(images), network(images), rtol=0, atol=1e-9)
    torch.testing.assert_close(extract(supernet, (8, 8))(images), network(images), rtol=0, atol=1e-9)


def test_a_shared_layer_is_replaced_everywhere_by_one_series(network, images):
    supernet = decompose_model(network, options=QUICK)
    assert isinstance(supernet.body[0], SeriesConv2d)
    assert supernet.again[0] is supernet.body[0]
    plain = extract(supernet, SearchSpace.of(supernet)[0])
    assert plain.again[0] is plain.body[0]


def test_an_extracted_network_is_plain_torch_and_gives_equal_outputs(network, images):
    supernet = decompose_model(network, group_sizes={"body.0": [1, 4, 8], "down": [2, 8]}, options=QUICK)
    seen = []
    for configuration in product([1, 4, 8], [2, 8]):
        set_configuration(supernet, configuration)
        assert get_configuration(supernet) == configuration
        plain = extract(supernet, configuration)
        for module in plain.modules():
            assert type(module) is Network or type(module).__module__.startswith("torch.nn")
        assert not any(module.training for module in plain.modules())
        seen.append(plain(images).detach())
        torch.testing.assert_close(seen[-1], supernet(images), rtol=0, atol=1e-12)
    assert len({float(outputs.sum()) for outputs in seen}) == len(seen)


def test_extracting_does_not_depend_on_the_active_configuration_nor_share_weights(network, images):
    supernet = decompose_model(network, group_sizes={"body.0": [1, 8], "down": [2]}, options=QUICK)
    set_configuration(supernet, (1, 2))
    plain = extract(supernet, (8, 2))
    assert get_configuration(supernet) == (1, 2)
    expected = plain(images)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.zero_()
    assert torch.equal(plain(images), expected)


@pytest.mark.parametrize("configuration", [(3, 2), (1, 2, 4), (1,), (8, 4), (-1, 2)])
def test_a_refused_configuration_changes_nothing(network, configuration):
    supernet = decompose_model(network, group_sizes={"body.0": [1, 8], "down": [2]}, options=QUICK)
    set_configuration(supernet, (1, 2))
    for refused in (set_configuration, extract):
        with pytest.raises(InvalidValueError, match="-".join(map(str, configuration)) + "|" + str(configuration)[1:-1]):
            refused(supernet, configuration)
    assert get_configuration(supernet) == Configuration((1, 2))


def test_a_series_contains_the_decompositions_of_its_layer(network):
    supernet = decompose_model(network, layers=["down"], group_sizes={"down": [2, 4]}, options=QUICK, seed=3)
    for size in (2, 4):
        terms = block_term_decomposition(network.down.weight, size, options=QUICK, seed=3)
        kernel = supernet.down.bottleneck(size).dense_kernel()
        torch.testing.assert_close(kernel, terms.reconstruct(), rtol=0, atol=1e-12)


def test_nested_decompositions_never_get_worse_with_size(trained_like_weight):
    conv = nn.Conv2d(8, 10, 3).double()
    with torch.no_grad():
        conv.weight.copy_(trained_like_weight(10, 8, 3, 3))
    options = BTDOptions(ridge=0.0, max_steps=5)

    def errors(nested):
        series = decompose_model(conv, layers=[""], group_sizes={"": [4, 1, 2, 8]}, options=options, nested=nested)
        assert series.group_sizes == (1, 2, 4, 8)
        kernels = [series.bottleneck(size).dense_kernel() for size in series.group_sizes]
        return [float((kernel - conv.weight).norm().detach()) for kernel in kernels]

    nested, independent = errors(True), errors(False)
    assert all(larger <= smaller + 1e-9 for smaller, larger in zip(nested, nested[1:], strict=False))
    assert nested[0] == independent[0] and nested[1] != independent[1]


@pytest.mark.parametrize("nested", [False, True])
def test_equal_layers_are_decomposed_in_one_pass_with_the_results_of_single_passes(monkeypatch, nested):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)
    )
    passes = []
    solve = build.block_term_decompositions
    monkeypatch.setattr(
        build,
        "block_term_decompositions",
        lambda weights, size, **options: passes.append((len(weights), size)) or solve(weights, size, **options),
    )
    sizes = {name: [2, 4] for name in "1234"}
    supernet = decompose_model(network.double(), group_sizes=sizes, options=QUICK, nested=nested, seed=5)
    assert sorted(passes) == [(1, 2), (1, 2), (1, 4), (1, 4), (2, 2), (2, 4)]
    assert list(SearchSpace.of(supernet).layers) == list("1234")
    for name in "1234":
        conv = network.get_submodule(name)
        alone = decompose_model(conv, layers=[""], group_sizes={"": [2, 4]}, options=QUICK, nested=nested, seed=5)
        for size in (2, 4):
            kernel = supernet.get_submodule(name).bottleneck(size).dense_kernel()
            torch.testing.assert_close(kernel, alone.bottleneck(size).dense_kernel(), rtol=0, atol=1e-6)


def test_an_empty_supernet_takes_a_checkpoint(network, images):
    sizes = {"body.0": [1, 8], "down": [2, 4]}
    supernet = decompose_model(network, group_sizes=sizes, options=QUICK)
    empty = empty_supernet(network, sizes)
    empty.load_state_dict(supernet.state_dict())
    assert torch.equal(empty(images), supernet(images))


def test_a_convolution_alone_can_be_decomposed(generator):
    conv = nn.Conv2d(4, 3, 3).double()
    series = decompose_model(conv, layers=[""], group_sizes={"": [4]})
    images = torch.randn(1, 4, 5, 5, generator=generator, dtype=torch.float64)
    assert isinstance(series, SeriesConv2d)
    torch.testing.assert_close(series(images), conv(images), rtol=0, atol=1e-9)
    torch.testing.assert_close(extract(series, (4,))(images), conv(images), rtol=0, atol=1e-9)


def test_a_frozen_layer_keeps_its_mode(network):
    network.train()
    network.body.eval()
    supernet = decompose_model(network, options=QUICK)
    modes = {name: module.training for name, module in supernet.named_modules()}
    for name, module in network.named_modules():
        assert modes[name] == module.training


@pytest.mark.parametrize("channels", range(1, 70))
def test_default_group_sizes_are_all_powers_of_two_that_divide(channels):
    expected = [size for size in range(1, channels + 1) if channels % size == 0 and size.bit_count() == 1]
    assert list(default_group_sizes(channels)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["body.9"]}, "'body.9' is not a dense convolution .*: stem, body.0, pointwise, down"),
        ({"layers": ["depthwise"]}, "'depthwise' has groups = 8 of 8 input channels: only .* groups=1"),
        ({"group_sizes": {"stem": [1]}}, "'stem', which is not decomposed; known names: body.0, down"),
        ({"group_sizes": {"down": [3]}}, "'down': none of the group-sizes 3 divides its 8 input channels"),
        ({"group_sizes": {"down": [0, 1]}}, r"group-sizes \[0, 1\]: must be whole numbers above 0"),
    ],
)
def test_layers_and_sizes_that_do_not_fit_are_refused(network, options, message):
    with pytest.raises(InvalidValueError, match=message):
        decompose_model(network, options=QUICK, **options)


def test_a_layer_takes_the_sizes_by_name_that_divide_its_channels(network):
    supernet = decompose_model(network, options=QUICK, group_sizes={"d*": [3, 1, 8, 16]})
    assert SearchSpace.of(supernet).group_sizes["down"] == (1, 8)


def test_networks_without_a_fitting_layer_are_refused(network):
    with pytest.raises(InvalidValueError, match=r"no convolution of this network can be .*: 0 .*; 1 \(1x1\); name it"):
        decompose_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)))
    with pytest.raises(InvalidValueError, match="decompose_model"):
        set_configuration(network, (1,))
    with pytest.raises(InvalidValueError, match="no dense convolution|not a dense convolution"):
        build_supernet(network, {"head": []})


class Listed(nn.Module):
    """Calls its layers from containers that are not modules."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.listed = [self.stem, ("a", self.a), {"b": self.b}]
        self.a.next_ones = self.listed

    def forward(self, images):
        return self.listed[2]["b"](torch.relu(self.listed[1][1](self.listed[0](images))))


def test_layers_in_plain_containers_are_replaced_there_too():
    torch.manual_seed(0)
    network, images = Listed(), torch.randn(2, 3, 9, 9)
    before = list(network.listed)
    supernet = decompose_model(network, group_sizes=(1, 4), input_shape=(3, 9, 9))
    torch.testing.assert_close(supernet(images), network(images), rtol=1e-4, atol=1e-5)  # 4 of 4 channels: exact
    set_configuration(supernet, (1, 4))
    plain = extract(supernet, (1, 4))
    torch.testing.assert_close(plain(images), supernet(images), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain(images), network(images), atol=1e-3)
    assert network.listed == before and supernet.listed[1][1] is supernet.a
    assert supernet.listed is not network.listed and plain.listed is not supernet.listed
    assert plain.listed[2]["b"] is plain.b and isinstance(plain.b, nn.Sequential)
