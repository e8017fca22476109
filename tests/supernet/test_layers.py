"""The choice of layers to decompose, and the reasons for the other convolutions."""

from __future__ import annotations

import re

import numpy as np
import pytest
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.supernet.layers import choice_of, choose_layers, decomposable_layers
from gross_ray.supernet.options import parse_layer_group_sizes


def network() -> nn.Module:
    shared = nn.Conv2d(12, 12, 3, padding=1)
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 12, 3),
            "body": nn.Sequential(nn.Conv2d(12, 12, 3), shared, nn.Conv2d(12, 9, 1), nn.Conv2d(9, 12, 5)),
            "again": shared,
            "grouped": nn.Conv2d(12, 12, 3, groups=3),
            "depthwise": nn.Conv2d(12, 12, 3, groups=12),
            "up": nn.ConvTranspose2d(12, 12, 2),
            "line": nn.Conv1d(12, 12, 3),
        }
    )


LEFT = {
    "stem": "the network's first convolution",
    "body.2": "1x1",
    "grouped": "already grouped (3 groups)",
    "depthwise": "depthwise",
    "up": "a transposed convolution",
    "line": "a Conv1d, not a Conv2d",
}


def test_every_convolution_is_decomposed_or_left_alone_for_a_reason() -> None:
    choice = choice_of(network())
    assert choice.group_sizes == {"body.0": (1, 2, 4), "body.1": (1, 2, 4), "body.3": (1,)}
    assert choice.left_alone == LEFT
    assert list(choice.convs) == list(decomposable_layers(network()))
    convs = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
    all_convs = {name for name, module in network().named_modules() if isinstance(module, convs)}
    assert {*choice.convs, *choice.left_alone} == all_convs  # a shared convolution once


def test_sizes_that_do_not_divide_leave_a_layer_alone() -> None:
    choice = choice_of(network(), sizes=(4, 2))
    assert choice.group_sizes == {"body.0": (2, 4), "body.1": (2, 4)}
    assert choice.left_alone["body.3"] == "none of the group-sizes 4, 2 divides its 9 input channels"
    assert list(choice.left_alone) == ["stem", "body.2", "body.3", "grouped", "depthwise", "up", "line"]
    with pytest.raises(InvalidValueError, match="layer 'body.3': none of the group-sizes 4, 2 divides .* leave it out"):
        choice_of(network(), ["body.3", "body.0"], (4, 2))
    with pytest.raises(InvalidValueError, match="no layer remains to decompose; 'body.0': none of the group-sizes 5 "):
        choice_of(network(), sizes=(5,))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["body.*"], ["body.0", "body.1", "body.3"]),
        (["body.[13]", "body.0"], ["body.0", "body.1", "body.3"]),
        (["*.?"], ["body.0", "body.1", "body.3"]),
        (["body.2"], ["body.2"]),  # a plain name may be a 1x1
        (["stem", "*.3"], ["stem", "body.3"]),
        ([], ["body.0", "body.1", "body.3"]),
    ],
)
def test_layers_are_chosen_by_name_or_glob(names: list[str], chosen: list[str]) -> None:
    assert list(choose_layers(network(), names)) == chosen
    left = choice_of(network(), names).left_alone
    assert {name for name, reason in left.items() if reason == "not named"} == {
        name for name in ("body.0", "body.1", "body.3") if name not in chosen
    }


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "head.*",
            r"layers 'head.\*': matches no convolution that can be decomposed; known names: body.0, body.1, body.3$",
        ),
        ("stem*", "matches no convolution that can be decomposed"),
        ("bodi.0", "'bodi.0' is not a dense convolution of this network; known names: stem, body.0, body.1"),
        ("up", "'up' is not a dense convolution"),
        ("again", "layer 'again' is the same module as 'body.1': write 'body.1'"),
        ("aga*", r"layers 'aga\*': .*; it matches second names of body.1: write those"),
        ("grouped", "layer 'grouped' has groups = 3 of 12 input channels: only"),
    ],
)
def test_an_unknown_name_is_refused(name: str, line: str) -> None:
    with pytest.raises(InvalidValueError, match=line):
        choose_layers(network(), ["body.0", name])


def test_a_network_without_dense_convolutions_has_no_known_names() -> None:
    with pytest.raises(InvalidValueError, match="^'2' is not a dense convolution of this network; it has none$"):
        choose_layers(nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU()), ["2"])


def test_a_layers_name_that_looks_like_a_glob_is_a_name_first() -> None:
    signs = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "b[0]": nn.Conv2d(4, 4, 3), "b0": nn.Conv2d(4, 4, 3)})
    assert list(choose_layers(signs, ["b[0]"])) == ["b[0]"]
    assert list(choose_layers(signs, ["b[01]"])) == ["b0"]


def test_of_many_names_the_closest_are_listed() -> None:
    many = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(40)))
    with pytest.raises(InvalidValueError, match="'101' is not a dense convolution .*; closest names: 1.*") as refused:
        choose_layers(many, ["101"])
    assert str(refused.value).count(",") == 7


def test_single_layers_have_group_sizes_of_their_own() -> None:
    by_layer = {"body.1": (12,), "body.[01]": (5, 3, 6), "*": (9, 1)}
    choice = choice_of(network(), sizes=(4, 2), by_layer=by_layer)
    assert choice.group_sizes == {"body.0": (3, 6), "body.1": (12,), "body.3": (1, 9)}
    globs_first = {"body.[01]": (6,), "body.1": (12,)}
    assert choice_of(network(), sizes=(4, 2), by_layer=globs_first).group_sizes == {"body.0": (6,), "body.1": (12,)}
    exact = choice_of(network(), by_layer={"body.[01]": (6, 2, 6, 5)})
    assert exact.group_sizes == {"body.0": (2, 6), "body.1": (2, 6), "body.3": (1,)}
    numbers = choice_of(network(), by_layer={"body.[01]": np.array([2, 4])}, sizes=np.array([1, 3]))
    assert numbers.group_sizes == {"body.0": (2, 4), "body.1": (2, 4), "body.3": (1, 3)}
    for wrong in ((1, 0), (-2,), (2.0,), (True,), 4):
        with pytest.raises(InvalidValueError, match=re.escape(f"group-sizes {wrong}: must be whole numbers above 0")):
            choice_of(network(), by_layer={"*": wrong})
        with pytest.raises(InvalidValueError, match="must be whole numbers above 0"):
            choice_of(network(), sizes=wrong)
    with pytest.raises(
        InvalidValueError, match="group-sizes for 'boddy', which is not decomposed; known names: body.0"
    ):
        choice_of(network(), by_layer={"boddy": (1,)})
    with pytest.raises(
        InvalidValueError, match="layer 'body.3': none of the group-sizes 4 divides its 9 input channel"
    ):
        choice_of(network(), by_layer={"body.3": (4,)})


def test_group_sizes_of_layers_are_read_from_text() -> None:
    assert parse_layer_group_sizes(["conv2=1, 4", "layer4.* = 16"]) == {"conv2": (1, 4), "layer4.*": (16,)}
    for text in ("conv2", "=1", "conv2=", "conv2=1,x", "conv2=0", "conv2=1,1", "conv2=-1"):
        with pytest.raises(InvalidValueError, match="write GLOB=SIZES, like layer4") as caught:
            parse_layer_group_sizes([text])
        assert repr(text) in str(caught.value)
    with pytest.raises(InvalidValueError, match="each glob once"):
        parse_layer_group_sizes(["a=1", "a=2"])


class Doubling(nn.Conv2d):
    """Computes with twice its weight."""

    def _conv_forward(self, input, weight, bias):  # type: ignore[no-untyped-def, override]
        return super()._conv_forward(input, 2 * weight, bias)


class Named(nn.Conv2d):
    """A subclass that overrides nothing."""


def test_a_convolution_with_an_overridden_forward_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Doubling(4, 4, 3), Named(4, 4, 3))
    choice = choice_of(model)
    assert list(choice.convs) == ["2"]
    assert choice.left_alone["1"].startswith("a Doubling, which overrides the forward of nn.Conv2d: the weight that")
    with pytest.raises(
        InvalidValueError, match="layer '1' is a Doubling, .* only a plain nn.Conv2d can be decomposed; leave"
    ):
        choose_layers(model, ["1", "2"])


def test_a_convolution_with_hooks_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    choice = choice_of(model)
    assert (list(choice.convs), choice.left_alone["1"]) == (["2"], "a Conv2d with hooks")
    with pytest.raises(InvalidValueError, match="layer '1' is a Conv2d with hooks: .* leave it out"):
        choose_layers(model, ["1"])


def test_a_convolution_that_the_forward_pass_never_reaches_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].add_module("spare", nn.Conv2d(4, 4, 3))
    choice = choice_of(model, input_shape=(3, 9, 9))
    assert (list(choice.convs), choice.left_alone["1.spare"]) == (["1"], "the forward pass never reaches it")
    with pytest.raises(InvalidValueError, match="layer '1.spare': the forward pass never reaches it; leave it out"):
        choice_of(model, ["1", "1.spare"], input_shape=(3, 9, 9))
    assert list(choice_of(model).convs) == ["1", "1.spare"]  # without an image's shape, all registered modules count


def test_sizes_that_form_no_series_are_refused_with_the_layers_name() -> None:
    with pytest.raises(InvalidValueError, match="layer 'body.0': group-sizes 4, 6: 4 does not divide 6, .*; omit one"):
        choice_of(network(), sizes=(4, 6))
    assert choice_of(network(), sizes=(4, 6), by_layer={"body.[01]": (6, 3)}).group_sizes["body.0"] == (3, 6)
