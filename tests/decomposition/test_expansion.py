import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gross_ray.decomposition.expansion import expand_grouped_weight
from gross_ray.errors import GrossRayError, InvalidValueError


@st.composite
def grouped_weights(draw):
    """A weight (C, g, kH, kW), a lawful target group-size, and a generator."""
    group_size, merged, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    channels = group_size * merged * groups
    weight = torch.randn(channels, group_size, *kernel, generator=generator, dtype=torch.float64)
    return weight, group_size * merged, generator


@given(grouped_weights())
def test_the_expanded_convolution_is_the_same_function(case):
    weight, target, generator = case
    channels, group_size, height, width = weight.shape
    images = torch.randn(2, channels, height + 2, width + 1, generator=generator, dtype=torch.float64)
    expanded = expand_grouped_weight(weight, target)
    assert expanded.shape == (channels, target, height, width)
    torch.testing.assert_close(
        F.conv2d(images, expanded, groups=channels // target),
        F.conv2d(images, weight, groups=channels // group_size),
        rtol=0,
        atol=1e-12,
    )


@given(grouped_weights(), st.floats(-3, 3), st.floats(-3, 3))
def test_it_is_linear(case, a, b):
    weight, target, generator = case
    other = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        expand_grouped_weight(a * weight + b * other, target),
        a * expand_grouped_weight(weight, target) + b * expand_grouped_weight(other, target),
        rtol=0,
        atol=0,
    )


@given(grouped_weights())
def test_it_places_every_weight_once_and_adds_zeros(case):
    weight, target, _ = case
    expanded = expand_grouped_weight(weight.abs() + 1, target)
    assert torch.equal(expanded[expanded != 0].sort().values, (weight.abs() + 1).flatten().sort().values)


def test_two_steps_are_one(generator):
    weight = torch.randn(24, 2, 3, 3, generator=generator)
    assert torch.equal(expand_grouped_weight(expand_grouped_weight(weight, 4), 12), expand_grouped_weight(weight, 12))


def test_the_gradient_passes(generator):
    weight = torch.randn(6, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: expand_grouped_weight(w, 3), weight)
    scale = torch.randn(6, 3, 2, 2, generator=generator, dtype=torch.float64)
    (expand_grouped_weight(weight, 3) * scale).sum().backward()
    expected = torch.stack([scale[channel, channel % 3] for channel in range(6)])[:, None]
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize(
    ("group_size", "target", "channels"), [(4, 6, 12), (4, 2, 12), (3, 9, 12), (2, 0, 12), (2, -2, 12)]
)
def test_refusals_name_both_values(group_size, target, channels):
    with pytest.raises(InvalidValueError) as caught:
        expand_grouped_weight(torch.zeros(channels, group_size, 3, 3), target)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, GrossRayError)
    assert [int(number) for number in re.findall(r"=(-?\d+)", str(caught.value))] == [target, group_size, channels]
