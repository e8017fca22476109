"""What runs at the same time is counted node by node."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.capacity import Capacity
from pipelines.nodes import NodeKind


def _capacity(*nodes: NodeKind, gpus_per_unit: float = 0.25) -> Capacity:
    gpus = any(node.num_gpus for node in nodes)
    return Capacity(nodes=nodes, device="cuda" if gpus else "cpu", gpus_per_unit=gpus_per_unit if gpus else 0.0)


@pytest.mark.parametrize(
    ("nodes", "gpus_per_unit", "slots"),
    [
        ([NodeKind(1, 0)], 0.25, 1),
        ([NodeKind(8, 0)], 0.25, 8),
        ([NodeKind(8, 1)], 0.25, 4),
        ([NodeKind(2, 1)], 0.25, 2),  # the cores run out first
        ([NodeKind(8, 2)], 1.0, 2),
        ([NodeKind(8, 2)], 0.3, 6),
        ([NodeKind(8, 1)], 0.1, 8),
        ([NodeKind(8, 2)], 0.6, 2),  # what is left of two GPUs is no third share
        ([NodeKind(8, 5)], 2, 2),
        ([NodeKind(8, 1, 2)], 2, 1),  # two GPUs, on no node; but a stage goes on with one slot
        ([NodeKind(4, 1, 2)], 0.5, 4),
        ([NodeKind(1, 1), NodeKind(8, 1)], 0.25, 5),
    ],
)
def test_slots_of_one_thread(nodes: list[NodeKind], gpus_per_unit: float, slots: int) -> None:
    assert _capacity(*nodes, gpus_per_unit=gpus_per_unit).slots() == slots


@pytest.mark.parametrize(
    ("nodes", "threads", "slots"),
    [
        ([NodeKind(3, 0)], 2, 1),
        ([NodeKind(3, 0, 2)], 2, 2),  # not three: a unit is on one node
        ([NodeKind(4, 0), NodeKind(3, 0)], 2, 3),
        ([NodeKind(8, 1)], 4, 2),
        ([NodeKind(8, 4)], 4, 2),
        ([NodeKind(2, 0, 4)], 3, 1),
    ],
)
def test_slots_of_several_threads(nodes: list[NodeKind], threads: int, slots: int) -> None:
    assert _capacity(*nodes).slots(threads) == slots


@given(
    nodes=st.lists(
        st.builds(NodeKind, st.integers(1, 9), st.integers(0, 3).map(float), st.integers(1, 3)),
        min_size=1,
        max_size=3,
    ),
    threads=st.integers(1, 5),
    share=st.sampled_from([Fraction(1, 10), Fraction(1, 4), Fraction(3, 10), Fraction(3, 5), Fraction(1), Fraction(2)]),
    cuda=st.booleans(),
)
def test_slots_are_the_units_that_can_be_placed(
    nodes: list[NodeKind], threads: int, share: Fraction, cuda: bool
) -> None:
    capacity = Capacity(
        nodes=tuple(nodes), device="cuda" if cuda else "cpu", gpus_per_unit=float(share) if cuda else 0.0
    )
    assert capacity.slots(threads) == max(1, _placed(nodes, threads, share if cuda else Fraction(0)))


def _placed(nodes: list[NodeKind], threads: int, share: Fraction) -> int:
    """Place unit after unit as Ray does: on one node, a share below 1 on one GPU, a whole number on as many."""
    placed = 0
    for kind in nodes:
        for _ in range(kind.count):
            cores, gpus = kind.num_cpus, [Fraction(1)] * int(kind.num_gpus)
            while cores >= threads:
                if share >= 1:
                    if len(gpus) < share:
                        break
                    del gpus[: int(share)]
                elif share:
                    fitting = [place for place, left in enumerate(gpus) if left >= share]
                    if not fitting:
                        break
                    gpus[fitting[0]] -= share
                cores -= threads
                placed += 1
    return placed


def test_in_a_process_of_its_own_one_unit_is_done_after_another() -> None:
    alone = Capacity(nodes=(NodeKind(8, 1),), device="cuda", gpus_per_unit=1.0, one_at_a_time=True)
    assert (alone.slots(), alone.slots(4), alone.units_on_a_device(1)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("nodes", "threads"),
    [
        ([NodeKind(8, 0)], {1: 8, 2: 4, 8: 1, 100: 1}),
        ([NodeKind(2, 0, 4)], {1: 2, 4: 2, 8: 1}),  # a unit is on one node
        ([NodeKind(8, 1)], {1: 8, 2: 4, 4: 2}),
        ([NodeKind(1, 0)], {1: 1, 5: 1}),
        ([NodeKind(2, 0)], {1: 2, 3: 2, 5: 1, 20: 1}),  # two threads do less than twice the work of one
        ([NodeKind(2, 0), NodeKind(64, 0, 2)], {1: 64, 2: 64, 4: 32}),  # the small node is left out
        ([NodeKind(2, 1), NodeKind(4, 1)], {1: 4, 6: 1}),
    ],
)
def test_threads_share_the_cores_among_the_units(nodes: list[NodeKind], threads: dict[int, int]) -> None:
    there = _capacity(*nodes)
    assert {num_units: there.threads(num_units) for num_units in threads} == threads


@pytest.mark.parametrize("num_cpus", [1, 2, 6, 16])
@pytest.mark.parametrize("num_units", [1, 2, 3, 5, 7, 40])
@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("smaller", [False, True])
def test_units_never_need_more_cores_than_a_node_has(
    num_cpus: int, num_units: int, gpus: int, count: int, smaller: bool
) -> None:
    nodes = [NodeKind(num_cpus, gpus, count), *([NodeKind(1, gpus)] if smaller else [])]
    there = _capacity(*nodes)
    threads = there.threads(num_units)
    assert 1 <= threads <= num_cpus
    assert there.slots(threads) * threads <= there.num_cpus
