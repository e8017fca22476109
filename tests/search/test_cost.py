import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from networks import Twice
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gross_ray.errors import InvalidValueError
from gross_ray.models import four_conv
from gross_ray.nn.calls import network_calls
from gross_ray.search.cost import configuration_macs, convolution_macs, count_macs, count_parameters, layer_costs
from gross_ray.space import DENSE, SearchSpace
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.configure import extract, set_configuration

PAPER_SIZES = {"conv2": (1, 2, 4, 8, 16, 32), "conv3": (1, 2, 4, 8, 16, 32), "conv4": (1, 2, 4, 8, 16, 32, 64)}
IMAGE = (3, 32, 32)


class Block(nn.Module):
    def __init__(self, channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, (3, 5), padding=(1, 2), bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.down = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, images):
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        return F.relu(hidden + self.down(images))


def residual():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        Block(8, 8, 1),
        Block(8, 12, 2),
        Block(12, 16, (2, 1)),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


RESIDUAL_SIZES = {"1.conv1": (1, 4), "2.conv1": (2, 8), "2.conv2": (3, 12), "3.conv1": (1, 2, 4), "3.conv2": (16,)}
RESIDUAL_IMAGE = (3, 13, 10)


def macs_by_torch(model, image):
    """Half of what torch's own counter counts for one image; it counts a multiply-accumulate as two."""
    parameter = next(model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *image, dtype=parameter.dtype))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.fixture(scope="module")
def paper_supernet(random_supernet):
    return random_supernet(four_conv(), PAPER_SIZES)


@pytest.fixture(
    scope="module",
    params=[
        (four_conv, PAPER_SIZES, IMAGE),
        (residual, RESIDUAL_SIZES, RESIDUAL_IMAGE),
        (Twice, {"shared": (1, 2, 4)}, (3, 9, 8)),
    ],
    ids=["four-conv", "residual", "shared"],
)
def case(request, random_supernet):
    make, sizes, image = request.param
    return random_supernet(make(), sizes), image


def some_configurations(supernet, count):
    space = SearchSpace.of(supernet)
    return random.Random(0).sample(list(space), min(count, len(space)))


@pytest.mark.parametrize(("make", "image"), [(four_conv, IMAGE), (residual, RESIDUAL_IMAGE), (Twice, (3, 9, 8))])
def test_macs_are_those_that_torch_counts(make, image):
    model = make()
    assert count_macs(model, image) == macs_by_torch(model, image)


def test_the_full_network_of_the_paper():
    assert count_macs(four_conv(), IMAGE) == 5_081_600


def test_a_configuration_costs_what_its_extracted_network_costs(case):
    supernet, image = case
    all_macs, parameters = (layer_costs(supernet, image, name) for name in ("macs", "parameters"))
    for configuration in some_configurations(supernet, 8):
        plain = extract(supernet, configuration)
        macs = configuration_macs(supernet, configuration, image)
        assert macs == macs_by_torch(plain, image) == count_macs(plain, image) == all_macs.of_one(configuration)
        set_configuration(supernet, configuration)
        assert count_macs(supernet, image) == macs
        assert parameters.of_one(configuration) == sum(p.numel() for p in plain.parameters()) == count_parameters(plain)


def test_the_count_of_the_paper_is_its_closed_form(paper_supernet):
    costs = layer_costs(paper_supernet, IMAGE, "macs_paper")
    every = list(product(*PAPER_SIZES.values()))
    expected = [1_040_384 + 73_728 * g2 + 18_432 * g3 + 9_216 * g4 for g2, g3, g4 in every]
    assert costs.of(every).tolist() == [costs.of_one(one) for one in every] == expected
    assert configuration_macs(paper_supernet, (2, 32, 64), IMAGE, convention="paper") == costs.of_one((2, 32, 64))


@pytest.mark.parametrize(
    ("configuration", "millions"),
    [
        ((32, 32, 32), 4.28),
        ((16, 16, 16), 2.66),
        ((4, 4, 4), 1.44),
        ((1, 1, 1), 1.14),
        ((2, 32, 64), 2.36),
        ((8, 16, 64), 2.51),
        ((2, 4, 8), 1.33),
        ((2, 8, 8), 1.41),
    ],
)
def test_the_rows_of_the_paper(paper_supernet, configuration, millions):
    macs = configuration_macs(paper_supernet, configuration, IMAGE, convention="paper")
    assert macs / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_two_conventions_differ_as_table_1_does(random_supernet):
    # One layer by hand: 4 -> 6 channels, 3x5, dilation (2, 1), stride 2, padding (1, 2), input 13x13, group-size 2.
    layer = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), dilation=(2, 1))
    supernet = random_supernet(nn.Sequential(nn.Conv2d(3, 4, 1), layer), {"1": (2,)})
    stem, pointwise_in, grouped, pointwise_out = 3 * 4, 4 * 4, 4 * 2 * 15, 4 * 6
    after = 6 * 7
    actual = 13 * 13 * (stem + pointwise_in) + after * (grouped + pointwise_out)
    assert configuration_macs(supernet, (2,), (3, 13, 13)) == actual
    # Stride and padding on the 1x1: every second of 15x17 pixels, then a kernel of 5x5 without padding.
    before_paper, after_paper = 8 * 9, 4 * 5
    paper = before_paper * pointwise_in + after_paper * (grouped + pointwise_out)
    assert configuration_macs(supernet, (2,), (3, 13, 13), convention="paper") == paper


def test_counting_leaves_the_network_as_it_was(case):
    supernet, image = case
    supernet.train()
    frozen = list(supernet.children())[0].eval()
    before = {name: (module.training, len(module._forward_hooks)) for name, module in supernet.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    random_state = torch.get_rng_state()
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    layer_costs(supernet, image, "macs")
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled() == fast_attention
    assert before == {name: (module.training, len(module._forward_hooks)) for name, module in supernet.named_modules()}
    assert not frozen.training
    for name, buffer in supernet.named_buffers():
        assert torch.equal(buffer, buffers[name])
    supernet.eval()


def test_bad_values_are_refused(paper_supernet, random_supernet):
    with pytest.raises(InvalidValueError, match="convention = 'papers': .*actual, paper"):
        configuration_macs(paper_supernet, (1, 1, 1), IMAGE, convention="papers")
    with pytest.raises(InvalidValueError, match="cost_name = 'latency_ms': .*macs, macs_paper, parameters"):
        layer_costs(paper_supernet, IMAGE, "latency_ms")
    with pytest.raises(InvalidValueError, match="group-size 3 .*conv3: 1, 2, 4, 8, 16, 32"):
        configuration_macs(paper_supernet, (1, 3, 1), IMAGE)
    with pytest.raises(InvalidValueError, match="group-size 3 of layer 'conv3': must be one of 1, 2, 4, 8, 16, 32"):
        layer_costs(paper_supernet, IMAGE, "macs").of([(1, 3, 1)])
    with pytest.raises(InvalidValueError, match="decompose_model"):
        configuration_macs(four_conv(), (1, 1, 1), IMAGE)
    strided = random_supernet(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, stride=3)), {"1": (1,)})
    with pytest.raises(InvalidValueError, match=r"\(3, 3\) .*\(4, 5\) pixels; .*actual"):
        configuration_macs(strided, (1,), (3, 4, 5), convention="paper")


@pytest.mark.parametrize(
    "convs",
    [
        [nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.Conv2d(6, 3, (3, 1), stride=2)],
        [nn.Flatten(2), nn.Conv1d(4, 6, 5, groups=2), nn.ConvTranspose1d(6, 2, 3)],
        [nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 4, (2, 3, 3)), nn.ConvTranspose3d(4, 2, 3)],
    ],
)
def test_convolutions_of_every_kind_are_counted(convs: list[nn.Module]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), *convs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 9, 10))
    assert count_macs(network, (3, 9, 10)) == counter.get_total_flops() / 2


def test_the_macs_of_a_convolution_are_those_of_its_layer_left_dense():
    network = residual()
    convs = {name: network.get_submodule(name) for name in RESIDUAL_SIZES}
    found = convolution_macs(network_calls(network, RESIDUAL_IMAGE), convs)
    supernet = empty_supernet(network, {name: (*sizes, DENSE) for name, sizes in RESIDUAL_SIZES.items()})
    by_layer = layer_costs(supernet, RESIDUAL_IMAGE, "macs").by_layer
    assert found == {name: costs[DENSE] for name, costs in by_layer.items()}
