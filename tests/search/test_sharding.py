import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.models import four_conv
from gross_ray.search.sharding import PrefixCosts, segment_macs
from gross_ray.space import SearchSpace
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.layers import decomposable_layers


@st.composite
def spaces(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    macs = draw(st.lists(st.integers(0, 50), min_size=len(sizes) + 1, max_size=len(sizes) + 1))
    return SearchSpace({f"layer{n}": [2**k for k in range(count)] for n, count in enumerate(sizes)}), macs


def counted(space, macs, start, stop):
    """The oracle: every prefix of the listed configurations, written down once."""
    return sum(macs[depth] * len({one[:depth] for one in space[start:stop]}) for depth in range(len(macs)))


@given(spaces(), st.data())
def test_a_run_of_neighbours_costs_each_prefix_once(case, data):
    space, macs = case
    start = data.draw(st.integers(0, len(space)))
    stop = data.draw(st.integers(start, len(space)))
    assert PrefixCosts(space, macs).of(start, stop) == counted(space, macs, start, stop)


@given(spaces(), st.integers(1, 7))
def test_the_most_costly_shard_costs_as_little_as_possible(case, num):
    space, macs = case
    shards = PrefixCosts(space, macs).cut(num)
    assert [place for shard in shards for place in shard] == list(range(len(space)))
    assert len(shards) <= num
    assert all(shards)
    most = max(counted(space, macs, shard.start, shard.stop) for shard in shards)
    # The oracle: the best of all ways to cut, by the least cost of the first `stop` configurations in n shards.
    least = {(0, 0): 0}
    for n, stop in itertools.product(range(1, num + 1), range(len(space) + 1)):
        ways = [
            max(least[n - 1, start], counted(space, macs, start, stop))
            for start in range(stop + 1)
            if (n - 1, start) in least
        ]
        if ways:
            least[n, stop] = min(ways)
    assert most == min(least[n, len(space)] for n in range(1, num + 1) if (n, len(space)) in least)


def test_a_large_space_is_cut_evenly():
    space = SearchSpace({f"layer{n}": [1, 4, 16, 32] for n in range(12)})
    costs = PrefixCosts(space, [7] * 13)
    shards = costs.cut(64)
    each = [costs.of(shard.start, shard.stop) for shard in shards]
    assert len(shards) == 64
    assert sum(map(len, shards)) == len(space) == 4**12
    assert max(each) - min(each) < 0.01 * max(each)


def test_the_macs_of_the_four_conv_network_by_hand():
    network = four_conv(10, image_size=32)
    supernet = empty_supernet(
        network, {name: (1, conv.in_channels) for name, conv in decomposable_layers(network).items()}
    )
    assert segment_macs(supernet, (3, 32, 32)) == [
        32 * 32 * 32 * 27,
        16 * 16 * 32 * 32 * 9,
        8 * 8 * 64 * 32 * 9,
        4 * 4 * 64 * 64 * 9 + 256 * 256 + 2560,
    ]


def test_a_shared_layer_counts_at_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.first = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, images):
            return self.first(self.second(self.first(self.stem(images)))).mean(dim=(2, 3))

    supernet = empty_supernet(Twice(), {"first": (1, 4), "second": (2, 4)})
    dense = 25 * 4 * 4 * 9
    assert segment_macs(supernet, (3, 5, 5)) == [25 * 12, dense, 2 * dense]


def test_no_shards_are_refused():
    with pytest.raises(InvalidValueError, match="num_shards = 0"):
        PrefixCosts(SearchSpace({"layer": [1, 2]}), [1, 1]).cut(0)
