import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.supernet.series import SeriesConv2d

CHAINS = [(1, 2, 4, 8), (1, 8), (2, 4), (4,), (8,), (1, 3, 12), (2, 6)]


def build(random_bottleneck, sizes, seed=0, **options):
    """A convolution, independent bottlenecks for it, and their series."""
    channels = 12 if any(size % 3 == 0 for size in sizes) else 8
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(channels, options.pop("out_channels", 6), options.pop("kernel_size", 3), **options).double()
    bottlenecks = {size: random_bottleneck(conv, size, generator) for size in sizes}
    images = torch.randn(2, channels, 9, 8, generator=generator, dtype=torch.float64)
    return conv, bottlenecks, SeriesConv2d.from_bottlenecks(conv, reversed(bottlenecks.values())), images


@given(st.sampled_from(CHAINS), st.integers(0, 99))
@settings(max_examples=20)
def test_the_series_equals_each_bottleneck_at_its_group_size(random_bottleneck, sizes, seed):
    _, bottlenecks, series, _ = build(random_bottleneck, sizes, seed)
    assert series.group_sizes == sizes
    for size, made_from in bottlenecks.items():
        summed = series.bottleneck(size)
        assert summed.group_size == size
        for name in ("pointwise_in", "grouped", "pointwise_out"):
            torch.testing.assert_close(getattr(summed, name), getattr(made_from, name), rtol=0, atol=1e-12)


@given(
    st.sampled_from(CHAINS),
    st.integers(1, 9),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
    st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
)
@settings(max_examples=60)
def test_forward_is_the_dense_convolution(
    random_bottleneck, sizes, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode
):
    if padding == "same":
        # An even kernel makes torch pad a copy of the input, and warn of it.
        stride, kernel_size = (1, 1), tuple(size | 1 for size in kernel_size)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "bias": bias, "padding_mode": padding_mode}
    conv, bottlenecks, series, images = build(
        random_bottleneck, sizes, out_channels=out_channels, kernel_size=kernel_size, **options
    )
    for size, bottleneck in bottlenecks.items():
        series.group_size = size
        with torch.no_grad():
            conv.weight.copy_(bottleneck.dense_kernel())  # an ordinary convolution as the oracle
            output = series(images)
            torch.testing.assert_close(output, conv(images), rtol=0, atol=1e-10)
            plain = series.to_modules(size)
            torch.testing.assert_close(plain(images), output, rtol=0, atol=1e-12)
        assert all(type(module).__module__.startswith("torch.nn.") for module in plain.modules())
        assert plain.grouped.groups == series.in_channels // size


def test_forward_agrees_with_a_functional_convolution(random_bottleneck):
    _, bottlenecks, series, images = build(random_bottleneck, (1, 2, 4, 8), stride=(2, 1), padding=(1, 0), dilation=2)
    for size, bottleneck in bottlenecks.items():
        series.group_size = size
        expected = F.conv2d(images, bottleneck.dense_kernel(), series.bias, (2, 1), (1, 0), 2)
        torch.testing.assert_close(series(images), expected, rtol=0, atol=1e-11)


def test_the_largest_group_size_is_active_at_first(random_bottleneck):
    _, _, series, _ = build(random_bottleneck, (1, 2, 4))
    assert series.group_size == 4


@pytest.mark.parametrize("active", range(4))
def test_a_step_trains_the_active_terms_and_the_smaller_ones_only(random_bottleneck, active):
    _, _, series, images = build(random_bottleneck, (1, 2, 4, 8))
    series.group_size = series.group_sizes[active]
    series(images).square().sum().backward()
    for terms in (series.pointwise_in, series.grouped, series.pointwise_out):
        for number, parameter in enumerate(terms):
            assert (parameter.grad is None) == (number > active)
    # All terms of a sum have the same gradient.
    for term in series.pointwise_in[: active + 1]:
        assert torch.equal(term.grad, series.pointwise_in[0].grad)
        assert term.grad.abs().sum() > 0
    assert series.bias.grad.abs().sum() > 0


def test_training_a_smaller_size_moves_the_larger_ones(random_bottleneck):
    _, _, series, _ = build(random_bottleneck, (1, 2, 4, 8))
    before = {size: series.bottleneck(size).dense_kernel() for size in series.group_sizes}
    with torch.no_grad():
        series.grouped[1].add_(1.0)
    for size, kernel in before.items():
        moved = not torch.equal(series.bottleneck(size).dense_kernel(), kernel)
        assert moved == (size >= 2)


def test_the_state_survives_a_round_trip(random_bottleneck):
    conv, _, series, images = build(random_bottleneck, (1, 2, 8))
    other = SeriesConv2d(conv, [8, 1, 2])
    assert not torch.equal(other(images), series(images))
    other.load_state_dict(series.state_dict())
    for size in series.group_sizes:
        series.group_size = other.group_size = size
        assert torch.equal(other(images), series(images))


def test_it_keeps_the_dtype_and_the_bias_of_the_convolution(random_bottleneck):
    conv = nn.Conv2d(4, 3, 3)
    bottleneck = random_bottleneck(conv, 2, torch.Generator().manual_seed(0))
    series = SeriesConv2d.from_bottlenecks(conv, [bottleneck])
    assert {parameter.dtype for parameter in series.parameters()} == {torch.float32}
    assert torch.equal(series.bias, conv.bias) and series.bias is not conv.bias
    assert len(series.series_parameters()) == 3
    assert all(parameter is not series.bias for parameter in series.series_parameters())
    assert "group_sizes=(2)" in repr(series)


def test_a_grouped_convolution_is_refused():
    with pytest.raises(InvalidValueError, match="groups = 2 of 4 .*groups=1"):
        SeriesConv2d(nn.Conv2d(4, 4, 3, groups=2), [1])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([2, 3], "group-size 2 must divide 3"),
        ([5], "group-size 5 must divide 12"),
        ([-1, 2], "group-size -1"),
        ([], "one"),
    ],
)
def test_group_sizes_that_form_no_series_are_refused(sizes, message):
    with pytest.raises(InvalidValueError, match=message):
        SeriesConv2d(nn.Conv2d(12, 4, 3), sizes)


def test_an_unknown_group_size_is_refused_and_the_active_one_stays(random_bottleneck):
    _, _, series, _ = build(random_bottleneck, (1, 2, 4))
    series.group_size = 2
    with pytest.raises(InvalidValueError, match="group-size 8 .*: 1, 2, 4"):
        series.group_size = 8
    assert series.group_size == 2
    with pytest.raises(InvalidValueError, match="group-size 3 .*: 1, 2, 4"):
        series.bottleneck(3)


@pytest.mark.parametrize("other", [nn.Conv2d(8, 6, 1), nn.Conv2d(8, 1, 3), nn.Conv2d(4, 6, 3)])
def test_bottlenecks_of_another_shape_are_refused(random_bottleneck, other):
    bottleneck = random_bottleneck(other, 2, torch.Generator().manual_seed(0))
    with pytest.raises(InvalidValueError, match=r"\(6, 8, 3, 3\)"):
        SeriesConv2d.from_bottlenecks(nn.Conv2d(8, 6, 3), [bottleneck])


def test_two_bottlenecks_of_one_group_size_are_refused(random_bottleneck):
    conv = nn.Conv2d(8, 6, 3)
    bottleneck = random_bottleneck(conv, 2, torch.Generator().manual_seed(0))
    with pytest.raises(InvalidValueError, match="2, 2"):
        SeriesConv2d.from_bottlenecks(conv, [bottleneck, bottleneck])
