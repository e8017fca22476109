"""Subclasses of nn.Conv2d: what one plain convolution equals is decomposed, the others are named with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import gross_ray
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import InvalidValueError
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.space import DENSE
from gross_ray.supernet.configure import series_layers
from pipelines.stages import train
from pipelines.units import Context

QUICK = gross_ray.BTDOptions(max_steps=3, tolerance=1e-2)
SHAPE = (3, 17, 16)


class Standardised(nn.Conv2d):
    """The convolution of ../shared/trials/fail_02.py."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Doubled(nn.Conv2d):
    """Passes arguments by name, and leaves the padding to nn.Conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input=input, weight=2 * self.weight, bias=self.bias)


class Padded(nn.Conv2d):
    """Pads one side more than the other, whatever the image's size."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 2, 1)), self.weight, bias=self.bias, stride=self.stride, padding="valid")


class Symmetric(nn.Conv2d):
    """Pads all sides alike, by itself and by F.conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 2, 2)), self.weight, self.bias, self.stride, 1)


class Counting(nn.Conv2d):
    """Replaces a buffer and changes another one in training mode, which its output does not depend on."""

    def __init__(self, *arguments: int, **options: int) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("changed", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.replaced = self.replaced + 1
            self.changed += 1
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Spectral(nn.Module):
    """A parametrization that changes a buffer in training mode, like spectral_norm, and so its weight."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return weight * (1 + self.calls)


def network(make: Callable[..., nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem, first, second = make(3, 8, 3), make(8, 8, 3, stride=2), make(8, 12, 3)
        return nn.Sequential(stem, nn.ReLU(), first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def parametrized(*arguments: int, **options: int) -> nn.Module:
    conv = nn.Conv2d(*arguments, **options)
    parametrize.register_parametrization(conv, "weight", Spectral())
    return conv


FIXED = "a {}, its weight fixed"
PLAIN = [
    (Standardised, ["2", "4"], FIXED),
    (Doubled, ["2", "4"], FIXED),
    (lambda *a, **b: Doubled(*a, padding=1, padding_mode="reflect", **b), ["2", "4"], FIXED),
    (Padded, ["2.conv", "4.conv"], FIXED),
    (Symmetric, ["2", "4"], FIXED),
    (Counting, ["2", "4"], FIXED),
    (parametrized, ["2", "4"], "a ParametrizedConv2d, its weight fixed"),
    (lambda *a, **b: parametrizations.weight_norm(nn.Conv2d(*a, **b)), ["2", "4"], "a ParametrizedConv2d, its weight"),
    (StdConv2d, ["2", "4"], FIXED),
    (ScaledStdConv2d, ["2", "4"], FIXED),
    (StdConv2dSame, ["2.conv", "4"], "a StdConv2dSame, its weight and its padding of 17x16 inputs fixed"),
    (ScaledStdConv2dSame, ["2.conv", "4"], "a ScaledStdConv2dSame, its weight and its padding of 17x16 inputs fixed"),
    (Conv2dSame, ["2.conv", "4"], "a Conv2dSame, its weight and its padding of 17x16 inputs fixed"),
]


@pytest.mark.parametrize(("make", "layers", "was"), PLAIN)
def test_a_convolution_that_a_plain_one_equals_is_decomposed(
    make: Callable[..., nn.Module], layers: list[str], was: str
) -> None:
    original = network(make)
    original[4].eval()  # modes stay as they are
    state, modes = copy.deepcopy(original.state_dict()), [module.training for module in original.modules()]
    drawn = torch.get_rng_state()
    choice = gross_ray.choice_of(original, sizes=(1, 8), input_shape=SHAPE)
    supernet = gross_ray.decompose_model(
        original, group_sizes=(1, 8), options=QUICK, keep_dense=True, input_shape=SHAPE
    )
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in original.modules()] == modes
    assert original.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())
    assert list(series_layers(supernet)) == list(choice.convs) == list(choice.made_plain) == layers
    assert choice.made_plain[layers[0]].startswith(was.format(type(original[0]).__name__))
    assert all(type(conv) is nn.Conv2d for conv in choice.convs.values())
    original.eval()
    images = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    gross_ray.set_configuration(supernet, [DENSE] * 2)
    with torch.no_grad():
        torch.testing.assert_close(supernet.eval()(images), original(images))
    plain = gross_ray.extract(supernet, [1, 8])
    assert {type(module) for module in plain[2].modules()} <= {nn.Sequential, nn.ZeroPad2d, nn.Conv2d}


class Gated(nn.Conv2d):
    """A weight that depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias, self.stride)


class Noisy(nn.Conv2d):
    """A weight that is drawn in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, F.dropout(self.weight, training=self.training), self.bias, self.stride)


class Activated(nn.Conv2d):
    """More than a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Scaled(nn.Conv2d):
    """A convolution of another input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Twice(nn.Conv2d):
    """Two convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.conv2d(x, self.weight, None, self.stride)


class Unfolded(nn.Conv2d):
    """A convolution by a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = ((size - 3) // self.stride[0] + 1 for size in x.shape[2:])
        columns = F.unfold(x, self.kernel_size, stride=self.stride)
        return (self.weight.flatten(1) @ columns).unflatten(2, (height, width))


class Fussy(nn.Conv2d):
    """Takes dark images only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 1:
            raise ValueError("too bright")
        return super().forward(x)


NOT_PLAIN = [
    (Gated, "its output is not that of one convolution with a fixed weight and zero padding"),
    (Noisy, "it computes something else in training mode"),
    (Activated, "its output is not that of one convolution"),
    (Scaled, "it changes its input other than by zero padding"),
    (Twice, "its forward calls F.conv2d 2 times, not once"),
    (Unfolded, "its forward calls F.conv2d 0 times, not once"),
    (Fussy, "its forward fails on random inputs: ValueError: too bright"),
]


@pytest.mark.parametrize(("kind", "why"), NOT_PLAIN)
def test_a_convolution_that_no_plain_one_equals_is_left_alone_for_the_reason(kind: type[nn.Conv2d], why: str) -> None:
    mixed = network(kind)
    mixed[4] = nn.Conv2d(8, 12, 3)
    choice = gross_ray.choice_of(mixed, input_shape=SHAPE)
    assert (list(choice.convs), choice.made_plain) == (["4"], {})
    assert choice.left_alone["2"].startswith(f"a {kind.__name__}, which overrides the forward of nn.Conv2d: {why}")
    with pytest.raises(InvalidValueError) as refused:
        gross_ray.decompose_model(network(kind), input_shape=SHAPE)
    assert str(refused.value).startswith(
        f"no convolution of this network can be decomposed: 2, 4 (a {kind.__name__}, which overrides the forward of "
        f"nn.Conv2d: {why}"
    )
    remedy = "use nn.Conv2d, or compute the weight by torch.nn.utils.parametrize"
    assert str(refused.value).endswith(f"; 0 (the network's first convolution); {remedy}")
    with pytest.raises(InvalidValueError, match=f"layer '2' is a {kind.__name__}, .*: {why}.*; leave it out"):
        gross_ray.choice_of(mixed, ["2", "4"], input_shape=SHAPE)


def test_without_an_images_shape_the_remedy_is_to_pass_it() -> None:
    with pytest.raises(InvalidValueError, match=r"2, 4 \(a Standardised, .*\); pass input_shape=\(C, H, W\), so that"):
        gross_ray.decompose_model(network(Standardised))
    weights = gross_ray.choice_of(network(parametrized)).convs  # known without an input
    assert list(weights) == ["2", "4"]


def test_a_parametrized_weight_is_that_of_evaluation_mode() -> None:
    original = network(parametrized)
    weight = original[2].parametrizations.weight
    calls = int(weight[0].calls)
    conv = gross_ray.choice_of(original, input_shape=SHAPE).convs["2"]
    assert original[2].training and weight[0].calls == calls
    assert torch.equal(conv.weight, weight.original * (1 + calls))


def test_layers_are_named_as_before_or_behind_their_padding() -> None:
    for name in ("2", "2.conv", "[2]"):
        choice = gross_ray.choice_of(network(Padded), [name], by_layer={name: (4,)}, input_shape=SHAPE)
        assert choice.group_sizes == {"2.conv": (4,)}
        assert isinstance(choice.network[4], Padded)  # what is not decomposed stays
    named = gross_ray.choice_of(network(Padded), ["0"], (3,), input_shape=SHAPE)  # the first one, too, by its name
    assert list(named.convs) == ["0.conv"]
    assert list(gross_ray.choice_of(network(Padded), ["4*"], input_shape=SHAPE).convs) == ["4.conv"]


def test_convolutions_that_share_a_weight_stay() -> None:
    shared = network(Standardised)
    shared[4] = Standardised(8, 8, 3)
    shared[4].weight = shared[2].weight
    line = "another module has the same weight.*; give each convolution a weight of its own"
    with pytest.raises(InvalidValueError, match=line):
        gross_ray.decompose_model(shared, input_shape=SHAPE)


def test_a_network_that_needs_its_own_class_keeps_it() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network(Standardised)

        def forward(self, images: Tensor) -> Tensor:
            if not isinstance(self.layers[2], Standardised):
                raise TypeError("needs a Standardised")
            return self.layers(images)

    with pytest.raises(InvalidValueError, match="the network fails: TypeError: needs a Standardised"):
        gross_ray.decompose_model(Asks(), input_shape=SHAPE)


def standardised(num_classes: int) -> nn.Module:
    return nn.Sequential(*network(Standardised), nn.Linear(12, num_classes))


def test_a_run_trains_the_class_and_decomposes_the_weight_that_it_uses(tmp_path: Path) -> None:
    settings = ["training.epochs=1", "training.milestones=[]", "training.seeds=1", "search.budgets=[4]"]
    store = RunStore.create(
        tmp_path / "run", preset("quickstart").override([f"model={__name__}:standardised", *settings])
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, *SHAPE), dtype=torch.uint8, generator=generator)
    images = ImageSet(pixels, torch.arange(8) % 2)
    run, splits = Run(store), Splits("noise", images, images, images, ("a", "b"))
    for unit in train.plan(run):
        train.work(Context(run, splits, "cpu", lambda *_, **__: None), unit)
    stored, _ = store.load_checkpoint("train", "seed=0")
    trained = standardised(2)
    trained.load_state_dict(stored)
    base = run.base
    assert list(base.choice.convs) == ["2", "4"] and type(base.network[2]) is nn.Conv2d
    expected = stored["2.weight"] - stored["2.weight"].mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(base.choice.convs["2"].weight, expected)
    with torch.no_grad():
        inputs = images.as_inputs(pixels)
        torch.testing.assert_close(base.network.eval()(inputs), trained.eval()(inputs))
