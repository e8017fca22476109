import re
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gross_ray.btd.expansion import expand_grouped_weight, sum_of_expansions
from gross_ray.errors import GrossRayError, InvalidValueError


@st.composite
def grouped_weights(draw):
    """A weight (C, g, kH, kW), a valid target group-size, and a generator."""
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
def test_expansion_is_linear(case, a, b):
    weight, target, generator = case
    other = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        expand_grouped_weight(a * weight + b * other, target),
        a * expand_grouped_weight(weight, target) + b * expand_grouped_weight(other, target),
        rtol=0,
        atol=0,
    )


@given(grouped_weights())
def test_the_expansion_contains_every_weight_once_and_otherwise_zeros(case):
    weight, target, _ = case
    expanded = expand_grouped_weight(weight.abs() + 1, target)
    assert torch.equal(expanded[expanded != 0].sort().values, (weight.abs() + 1).flatten().sort().values)


def test_two_expansions_equal_one(generator):
    weight = torch.randn(24, 2, 3, 3, generator=generator)
    assert torch.equal(expand_grouped_weight(expand_grouped_weight(weight, 4), 12), expand_grouped_weight(weight, 12))


def test_expansion_is_differentiable(generator):
    weight = torch.randn(6, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: expand_grouped_weight(w, 3), weight)
    scale = torch.randn(6, 3, 2, 2, generator=generator, dtype=torch.float64)
    (expand_grouped_weight(weight, 3) * scale).sum().backward()
    expected = torch.stack([scale[channel, channel % 3] for channel in range(6)])[:, None]
    assert torch.equal(weight.grad, expected)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 999))
def test_a_sum_of_expansions_is_their_sum(factors, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = sorted({prod(factors[:count]) for count in range(1, len(factors) + 1)})
    channels = sizes[-1] * groups
    weights = [
        torch.randn(channels, size, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in sizes
    ]
    scale = torch.randn(channels, sizes[-1], 3, 2, generator=generator, dtype=torch.float64)
    expected = torch.stack([expand_grouped_weight(weight, sizes[-1]) for weight in weights]).sum(0)
    total = sum_of_expansions(weights)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad((each * scale).sum(), weights) for each in (total, expected))
    assert all(torch.equal(ours_k, theirs_k) for ours_k, theirs_k in zip(ours, theirs, strict=True))


def test_a_sum_first_computed_without_gradients_has_them_later():
    with torch.inference_mode():
        sum_of_expansions([torch.ones(10, 1, 1, 1), torch.ones(10, 5, 1, 1)])
    weights = [torch.ones(10, 1, 1, 1, requires_grad=True), torch.ones(10, 5, 1, 1)]
    sum_of_expansions(weights).sum().backward()
    assert torch.equal(weights[0].grad, torch.ones(10, 1, 1, 1))


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kernels += not func.is_view  # views run nothing on the device
        return func(*args, **kwargs or {})


def test_more_weights_take_no_more_kernels():
    counts = []
    for sizes in ((1, 16), (1, 2, 4, 8, 16)):
        weights = [torch.ones(16, size, 3, 3, requires_grad=True) for size in sizes]
        sum_of_expansions(weights)
        with Counted() as counted:
            sum_of_expansions(weights)
        counts.append(counted.kernels)
    assert counts[0] == counts[1] <= 5


@pytest.mark.parametrize(
    ("group_size", "target", "channels"), [(4, 6, 12), (4, 2, 12), (3, 9, 12), (2, 0, 12), (2, -2, 12)]
)
def test_refusals_name_both_values(group_size, target, channels):
    with pytest.raises(InvalidValueError) as caught:
        expand_grouped_weight(torch.zeros(channels, group_size, 3, 3), target)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, GrossRayError)
    assert [int(number) for number in re.findall(r"=(-?\d+)", str(caught.value))] == [target, group_size, channels]
