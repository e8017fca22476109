import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.errors import InvalidValueError


@st.composite
def bottlenecks(draw):
    group_size, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    channels, out_channels = group_size * groups, draw(st.integers(1, 9))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shapes = ((channels, channels, 1, 1), (channels, group_size, *kernel), (out_channels, channels, 1, 1))
    return Bottleneck(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)), generator


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(bottlenecks(), pairs, st.tuples(st.integers(0, 2), st.integers(0, 2)), pairs)
def test_three_convolutions_equal_the_dense_one(case, stride, padding, dilation):
    bottleneck, generator = case
    channels, group_size, height, width = bottleneck.grouped.shape
    images = torch.randn(2, channels, 9, 8, generator=generator, dtype=torch.float64)
    hidden = F.conv2d(images, bottleneck.pointwise_in)
    hidden = F.conv2d(hidden, bottleneck.grouped, None, stride, padding, dilation, channels // group_size)
    expected = F.conv2d(hidden, bottleneck.pointwise_out)
    dense = bottleneck.dense_kernel()
    assert dense.shape == (bottleneck.pointwise_out.shape[0], channels, height, width)
    torch.testing.assert_close(F.conv2d(images, dense, None, stride, padding, dilation), expected, rtol=0, atol=1e-10)


@given(bottlenecks())
def test_expanding_keeps_the_dense_kernel(case):
    bottleneck, _ = case
    channels, group_size = bottleneck.grouped.shape[:2]
    for target in range(group_size, channels + 1, group_size):
        if channels % target == 0:
            expanded = bottleneck.expand(target)
            assert expanded.group_size == target
            torch.testing.assert_close(expanded.dense_kernel(), bottleneck.dense_kernel(), rtol=0, atol=1e-11)


def test_the_dense_kernel_is_differentiable(generator):
    shapes = ((4, 4, 1, 1), (4, 2, 2, 1), (3, 4, 1, 1))
    weights = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *w: Bottleneck(*w).dense_kernel(), weights)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (((4, 5, 1, 1), (4, 2, 3, 3), (6, 4, 1, 1)), ("(4, 5, 1, 1)", "(4, 4, 1, 1)")),
        (((4, 4, 1, 1), (4, 2, 3, 3), (6, 5, 1, 1)), ("(6, 5, 1, 1)", "(C_out, 4, 1, 1)")),
        (((4, 4, 1, 1), (4, 3, 3, 3), (6, 4, 1, 1)), ("(=3)", "(=4)")),
    ],
)
def test_weights_that_do_not_fit_are_refused(shapes, named):
    with pytest.raises(InvalidValueError) as caught:
        Bottleneck(*(torch.zeros(shape) for shape in shapes))
    for text in named:
        assert text in str(caught.value)
