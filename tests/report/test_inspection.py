"""What `gross inspect` tells of a network, against extracted configurations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.report.inspection import inspection
from gross_ray.search.cost import count_macs, count_parameters, peak_activations
from gross_ray.supernet.build import decompose_model, empty_supernet
from gross_ray.supernet.configure import extract, series_layers
from gross_ray.supernet.layers import choice_of


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 3, stride=(2, 1), dilation=2, padding=2, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.down(self.shared(self.shared(self.stem(images))))


def test_the_costs_are_those_of_the_extracted_networks() -> None:
    network, shape = Twice(), (3, 16, 16)
    choice = choice_of(network)
    layers, space, left = inspection(network, choice, shape)
    assert layers.title == "Decomposed: 2 layers, for images of 3x16x16"
    assert [list(row[:4]) for row in layers.rows] == [
        ["shared", "4 to 4, 3x3", "4x16x16", "1 2 4"],
        ["down", "4 to 8, 3x3, stride (2, 1), dilation 2", "8x8x16", "1 2 4"],
    ]
    # The shared layer runs twice: 2 x 16 x 16 x 4 x 4 x 9 MACs as it is.
    assert layers.rows[0][4] == f"{2 * 256 * 144 / 1e6:.2f}"
    supernet = empty_supernet(network, choice.group_sizes)
    expected = [
        ("the network itself", network),
        *((name, extract(supernet, sizes)) for name, sizes in (("1-1", (1, 1)), ("4-4", (4, 4)))),
    ]
    assert [list(row) for row in space.rows] == [
        [name, f"{count_macs(one, shape) / 1e6:.2f}", f"{count_parameters(one):,}", f"{peak_activations(one, shape):,}"]
        for name, one in expected
    ]
    assert space.title == "The space: 9 configurations"
    assert [list(row) for row in left.rows] == [["stem", "the network's first convolution"]]
    assert left.title == "Left alone: 1 convolution"


def test_group_sizes_that_fit_no_layer_are_told() -> None:
    layers, _, _ = inspection(Twice(), choice_of(Twice(), sizes=(1, 4, 3), by_layer={"down": (2, 5)}), (3, 16, 16))
    assert [row[3] for row in layers.rows] == ["1 4", "2"]
    assert list(layers.notes) == [
        "not tried: shared (group-sizes 3: no divisor of 4 input channels); down (group-sizes 5: no divisor of 4 input "
        "channels)"
    ]


def test_the_first_convolution_is_the_first_that_an_image_meets() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.stem = nn.Conv2d(4, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last(self.stem(images))

    choice = choice_of(Backwards(), input_shape=(3, 9, 9))
    assert (list(choice.convs), choice.left_alone) == (["last"], {"stem": "the network's first convolution"})
    assert list(choice_of(Backwards(), ["*"], input_shape=(3, 9, 9)).convs) == ["last"]
    assert list(series_layers(decompose_model(Backwards(), group_sizes=(4,), input_shape=(3, 9, 9)))) == ["last"]
    assert list(choice_of(Backwards()).convs) == ["stem"]  # as it is registered: no shape, no forward pass
    with pytest.raises(InvalidValueError, match="cannot run an image of 3x2x2"):
        choice_of(Backwards(), input_shape=(3, 2, 2))


def test_a_shape_that_does_not_fit_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(InvalidValueError, match="cannot run an image of 3x9x9: .*mat1 and mat2 .*; choose images"):
        inspection(network, choice_of(network), (3, 9, 9))
    inspection(network, choice_of(network), (3, 8, 8))


def test_whatever_a_network_raises_is_told_in_a_line() -> None:
    class Fussy(Twice):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise TypeError("images of even sides\nonly")

    with pytest.raises(
        InvalidValueError, match="cannot run an image of 3x9x9: TypeError: images of even sides; choose"
    ):
        inspection(Fussy(), choice_of(Fussy()), (3, 9, 9))


class Bound(nn.Module):
    """Calls its layers by functions that keep hold of them, copied or not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.ways = [lambda images: self.a(images), lambda images: self.b(images)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(images)
        for way in self.ways:
            hidden = way(hidden)
        return self.b(hidden)


def test_a_layer_that_is_called_by_another_way_than_its_place_is_named() -> None:
    told = "layers a, b: with these decomposed, the network bypasses them, because it does not use them by calling"
    with pytest.raises(InvalidValueError, match=told):
        inspection(Bound(), choice_of(Bound()), (3, 9, 9))
    with pytest.raises(InvalidValueError, match=told):
        decompose_model(Bound(), group_sizes=(1, 4), input_shape=(3, 9, 9))


def test_a_network_without_weights_has_nothing_to_decompose() -> None:
    for shape in (None, (3, 9, 9)):
        with pytest.raises(InvalidValueError, match="this network has no convolution"):
            choice_of(nn.Sequential(nn.Flatten()), input_shape=shape)
    assert count_macs(nn.Sequential(nn.Flatten()), (3, 9, 9)) == 0
    with pytest.raises(InvalidValueError, match="input_shape = 9: must be"):
        choice_of(Twice(), input_shape=9)  # type: ignore[arg-type]


def test_a_layer_that_is_not_called_is_named() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.conv2d(self.a(self.stem(images)), self.b.weight).mean((2, 3))

    with pytest.raises(
        InvalidValueError, match="layers b: with these decomposed, .*has no attribute 'weight'.*; leave them out"
    ):
        inspection(Peeks(), choice_of(Peeks()), (3, 9, 9))
    inspection(Peeks(), choice_of(Peeks(), ["a"]), (3, 9, 9))
