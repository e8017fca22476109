"""Convolutions as products of matrices equal torch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from gross_ray.nn.products import conv2d_by_products

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, tuple]:
    """Images, weight, bias, and the other arguments of F.conv2d."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    groups, inputs, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    if draw(st.booleans()):
        padding: str | tuple[int, int] = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    else:
        padding, stride = draw(st.sampled_from(["same", "valid"])), (1, 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    size = [draw(st.integers(7, 10)) for _ in range(2)]
    bias = normal(groups * outputs) if draw(st.booleans()) else None
    weight = normal(groups * outputs, inputs, *kernel)
    return normal(2, groups * inputs, *size), weight, bias, (stride, padding, dilation, groups)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolutions())
def test_result_is_that_of_torch(convolution: tuple[Tensor, Tensor, Tensor | None, tuple]) -> None:
    images, weight, bias, rest = convolution
    torch.testing.assert_close(
        conv2d_by_products(images, weight, bias, *rest), F.conv2d(images, weight, bias, *rest), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_each_member_of_a_stack_has_its_own_result_and_gradients(groups: int, generator: torch.Generator) -> None:
    images = torch.randn(3, 2, 4, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 8, 4 // groups, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rest = (None, (2, 1), (1, 1), (1, 1), groups)
    ours = vmap(lambda x, w: conv2d_by_products(x, w, *rest))(images, weight)
    theirs = torch.stack([F.conv2d(x, w, *rest) for x, w in zip(images, weight, strict=True)])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(y.sin().sum(), (images, weight)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
