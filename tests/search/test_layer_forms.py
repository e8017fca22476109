import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.search import layer_forms
from gross_ray.search.layer_forms import LayerForm, Siblings, fastest_form
from gross_ray.supernet.configure import series_layers

SIZES = (1, 2, 4, 8)
PLACES = {
    "plain": {"padding": 1},
    "strided": {"stride": (2, 1), "padding": (0, 1), "bias": False},
    "dilated": {"padding": 2, "dilation": 2},
    "same": {"padding": "same"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
}


@pytest.fixture(params=PLACES)
def layer(request, random_supernet):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, **PLACES[request.param]).double()
    return series_layers(random_supernet(nn.Sequential(nn.Conv2d(3, 8, 1), conv).double(), {"1": SIZES}))["1"]


def forms():
    for choice in itertools.product(("dense", "bottleneck"), repeat=len(SIZES)):
        for stacked in (True, False):
            yield LayerForm(dict(zip(SIZES, choice, strict=True)), stacked)


def test_every_form_gives_what_the_layer_gives(layer):
    images = torch.randn(3, 8, 7, 9, dtype=torch.float64)
    expected = {}
    with torch.no_grad():
        for size in SIZES:
            layer.group_size = size
            expected[size] = layer(images)
        for form in forms():
            siblings = Siblings(layer, form)
            for sizes in [SIZES, (1, 4, 8), (2,), (8, 2), (2, 4)]:
                found = siblings.run(images, sizes)
                torch.testing.assert_close(found, torch.cat([expected[size] for size in sizes]))


def test_dense_siblings_run_as_one_convolution(random_supernet, monkeypatch):
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3))
    layer = series_layers(random_supernet(network, {"1": SIZES}))["1"]
    images = torch.randn(2, 8, 5, 5)
    channels = []
    convolve = F.conv2d
    monkeypatch.setattr(
        layer_forms.F,
        "conv2d",
        lambda images, weight, *rest: channels.append(len(weight)) or convolve(images, weight, *rest),
    )

    def convolutions(form, sizes):
        siblings = Siblings(layer, form)
        channels.clear()
        siblings.run(images, sizes)
        return list(channels)

    dense = LayerForm.uniform(layer, "dense")
    assert convolutions(dense, SIZES) == [4 * 6]
    assert convolutions(dense, (1, 2, 8)) == [2 * 6, 6]
    assert convolutions(LayerForm(dense.by_size, stacked=False), SIZES) == [6, 6, 6, 6]
    assert convolutions(LayerForm({1: "bottleneck", 2: "dense", 4: "dense", 8: "bottleneck"}), SIZES) == [
        *(8, 8, 6),
        2 * 6,
        *(8, 8, 6),
    ]


def test_the_faster_form_is_chosen(random_supernet, monkeypatch):
    """With a clock that each convolution advances by what we say, the choice is known."""
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3))
    layer = series_layers(random_supernet(network, {"1": SIZES}))["1"]
    now = [0.0]
    convolve = F.conv2d

    def chosen(dense, bottleneck):
        """`dense(siblings)` and `bottleneck(group_size)` are the seconds of one convolution."""

        def timed(images, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
            if groups > 1 or weight.shape[-1] == 3 and len(weight) == 8:
                now[0] += bottleneck(8 // groups)
            elif weight.shape[-1] == 3:
                now[0] += dense(len(weight) // 6)
            return convolve(images, weight, bias, stride, padding, dilation, groups)

        monkeypatch.setattr(layer_forms.F, "conv2d", timed)
        monkeypatch.setattr(layer_forms.time, "perf_counter", lambda: now[0])
        return fastest_form(layer, torch.randn(2, 8, 5, 5))

    even = chosen(dense=lambda num: 1.0 * num, bottleneck=lambda size: 1.0)
    assert even == LayerForm(dict.fromkeys(SIZES, "dense"), stacked=True)
    growing = chosen(dense=lambda num: 1.0 * num, bottleneck=lambda size: size / 4)
    assert growing.by_size == {1: "bottleneck", 2: "bottleneck", 4: "dense", 8: "dense"}
    large_kernels = chosen(dense=lambda num: 1.0 * num**2, bottleneck=lambda size: 0.9)
    assert large_kernels == LayerForm(dict.fromkeys(SIZES, "dense"), stacked=False)


def test_an_unknown_form_is_refused():
    with pytest.raises(InvalidValueError, match="'sparse'.*one of dense, bottleneck"):
        LayerForm({1: "sparse"})
