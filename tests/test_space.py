import itertools
import pickle
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.models import four_conv
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet

sizes_of_layers = st.lists(st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True), min_size=1, max_size=4)
group_sizes = st.lists(st.integers(1, 10**6), min_size=1, max_size=8)


def space_of(sizes: list[list[int]]) -> SearchSpace:
    return SearchSpace({f"conv{number}": of_layer for number, of_layer in enumerate(sizes)})


@given(sizes_of_layers)
def test_members_are_the_product_in_lexicographic_order(sizes: list[list[int]]) -> None:
    space = space_of(sizes)
    oracle = list(itertools.product(*map(sorted, sizes)))
    assert len(space) == len(oracle)
    assert list(space) == oracle
    assert [space[index] for index in range(len(space))] == oracle
    assert [space.index(member) for member in oracle] == list(range(len(oracle)))
    assert all(type(member) is Configuration for member in space)
    assert list(reversed(space)) == oracle[::-1]


@given(sizes_of_layers, st.data())
def test_negative_indices_and_slices_are_those_of_a_list(sizes: list[list[int]], data: st.DataObject) -> None:
    space, oracle = space_of(sizes), list(itertools.product(*map(sorted, sizes)))
    index = data.draw(st.integers(-len(oracle), len(oracle) - 1))
    assert space[index] == oracle[index]
    chosen = data.draw(st.slices(len(oracle)))
    assert space[chosen] == oracle[chosen]
    for outside in (len(oracle), -len(oracle) - 1):
        with pytest.raises(IndexError, match=f"{outside} of a space of {len(oracle)}"):
            space[outside]


@given(sizes_of_layers, st.lists(st.integers(1, 64), min_size=1, max_size=4))
def test_contains_exactly_the_members_of_the_product(sizes: list[list[int]], candidate: list[int]) -> None:
    space, oracle = space_of(sizes), set(itertools.product(*sizes))
    assert (tuple(candidate) in space) == (tuple(candidate) in oracle)
    assert space[-1] in space
    assert "2-4" not in space
    if tuple(candidate) not in oracle:
        with pytest.raises(InvalidValueError):
            space.index(candidate)


@pytest.mark.parametrize("num_layers", [12, 16])
def test_spaces_of_vgg16_and_resnet18_are_never_listed(num_layers: int) -> None:
    # 4^12 and 4^16 members: listing them would take minutes and gigabytes, which nobody could overlook.
    sizes = [[1, 4, 16, 32]] * num_layers
    space = space_of(sizes)
    assert len(space) == 4**num_layers
    last = Configuration([32] * num_layers)
    assert space.index(last) == 4**num_layers - 1
    assert space[-1] == last
    assert last in space
    assert next(iter(space)) == (1,) * num_layers
    assert space[4**num_layers // 2 :: 4**num_layers // 4] == [
        (16, *[1] * (num_layers - 1)),
        (32, *[1] * (num_layers - 1)),
    ]


@given(
    st.lists(st.lists(st.integers(1, 10**4), min_size=1, max_size=9, unique=True), min_size=1, max_size=12), st.data()
)
def test_index_and_member_are_inverse_in_spaces_of_any_size(sizes: list[list[int]], data: st.DataObject) -> None:
    space = space_of(sizes)
    assert len(space) == prod(map(len, sizes))
    first, second = (data.draw(st.integers(0, len(space) - 1)) for _ in range(2))
    assert space.index(space[first]) == first
    assert (space[first] < space[second]) == (first < second)


def test_sizes_are_sorted_and_repeats_dropped() -> None:
    space = SearchSpace({"b": [4, 1, 4, np.int64(2)], "a": (8,)})
    assert space.group_sizes == {"b": (1, 2, 4), "a": (8,)}
    assert space.layers == ("b", "a")


def test_space_of_a_supernet_has_its_layers_in_order() -> None:
    sizes = {"conv2": (1, 32), "conv3": (2, 4, 8), "conv4": (64,)}
    space = SearchSpace.of(empty_supernet(four_conv(), sizes))
    assert space.group_sizes == sizes
    assert list(space.group_sizes) == list(sizes)
    with pytest.raises(InvalidValueError, match="decompose_model"):
        SearchSpace.of(nn.Sequential(nn.Conv2d(3, 4, 3)))


@given(group_sizes)
def test_text_and_pickle_give_the_configuration_back(sizes: list[int]) -> None:
    configuration = Configuration(sizes)
    assert Configuration.parse(str(configuration)) == configuration
    assert str(configuration).split("-") == [str(size) for size in sizes]
    assert eval(repr(configuration)) == configuration  # noqa: S307
    space = SearchSpace({"a": sizes, "b": [1]})
    assert eval(repr(space)).group_sizes == space.group_sizes
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(configuration, protocol))
        assert type(loaded) is Configuration
        assert (loaded, hash(loaded)) == (configuration, hash(tuple(sizes)))


@given(sizes_of_layers)
def test_pickle_gives_the_space_back(sizes: list[list[int]]) -> None:
    space = space_of(sizes)
    loaded = pickle.loads(pickle.dumps(space))
    assert loaded.group_sizes == space.group_sizes
    assert list(loaded) == list(space)


def test_configuration_takes_the_integers_of_other_libraries() -> None:
    configuration = Configuration(np.array([2, 32, 64]))
    assert configuration == (2, 32, 64)
    assert [type(size) for size in configuration] == [int] * 3


@pytest.mark.parametrize(
    "text", ["", "2--4", "-2-4", "2-", "2-4.0", "0-2", "2 4", "a", "2,4", "1_0-2", "+2-4", "٣-2", "02-4", "2 - 4"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        Configuration.parse(text)
    assert repr(text) in str(caught.value)
    assert "like 2-32-64" in str(caught.value)


@pytest.mark.parametrize("sizes", [[], [-2, 2], [4, -1], [2.5, 4], [2.0], "23", ["2", "4"], [None]])
def test_other_sizes_than_positive_whole_numbers_are_refused(sizes: list[int]) -> None:
    with pytest.raises(InvalidValueError, match="needs one positive whole group-size for each decomposed layer"):
        Configuration(sizes)


@pytest.mark.parametrize(
    "sizes", [{}, {"conv2": []}, {"conv2": [1], "conv3": ()}, {"conv2": [-1, 1]}, {"conv2": [-2]}, {"conv2": [1.5]}]
)
def test_an_invalid_space_is_refused(sizes: dict[str, list[int]]) -> None:
    with pytest.raises(InvalidValueError, match="needs a layer, and positive whole group-sizes") as caught:
        SearchSpace(sizes)
    assert str(sizes) in str(caught.value)


def test_refusals_name_the_layer_and_its_choices() -> None:
    space = SearchSpace({"conv2": [1, 2], "conv3": [4, 8, 16]})
    with pytest.raises(InvalidValueError, match="configuration 2-5: group-size 5 .* conv3: 4, 8, 16"):
        space.check((2, 5))
    with pytest.raises(InvalidValueError, match="2-4-8 has 3 group-sizes; this space has 2 layers: conv2, conv3"):
        space.check((2, 4, 8))
    assert type(space.check([2, 4])) is Configuration


def test_a_space_too_large_for_len_has_its_size_and_members() -> None:
    space = SearchSpace({f"layer{number}": (1, 4, 16, 32) for number in range(33)})
    assert space.size == 4**33
    with pytest.raises(OverflowError):
        len(space)
    assert space[0] == Configuration([1] * 33) == next(iter(space))
    assert space[-1] == Configuration([32] * 33)
    assert space.index(space[4**32 + 7]) == 4**32 + 7
    assert space[:2] == [space[0], space[1]]
