import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gross_ray.seeds import derive_seed, derived_generator

part = st.one_of(st.text(st.characters(exclude_characters="/", codec="utf-8")), st.integers())
named = st.tuples(st.integers(), st.lists(part, max_size=4))


# Stored numbers, because they are the promise: a run that continues on another machine, or with a later release, must
# draw the same numbers. They are half of the first 16 digits that `printf %s TEXT | sha256sum` prints.
@pytest.mark.parametrize(
    ("parts", "digits"),
    [
        ((0,), "5feceb66ffc86f38"),
        ((0, "train", "seed=0"), "11e57df8c461d322"),
        ((7, "decompose", "conv2,g=4,seed=1"), "ef88ff75d82db097"),
    ],
)
def test_seeds_never_change(parts: tuple[int, str], digits: str) -> None:
    assert derive_seed(*parts) == int(digits, 16) // 2


@given(named, named)
def test_seeds_are_equal_for_equal_names_only(one: tuple[int, list[object]], other: tuple[int, list[object]]) -> None:
    seeds = [derive_seed(seed, *parts) for seed, parts in (one, other)]
    texts = [(seed, [str(part) for part in parts]) for seed, parts in (one, other)]
    assert (seeds[0] == seeds[1]) == (texts[0] == texts[1])
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_of_a_whole_run_differ() -> None:
    units = itertools.product(range(10), ("train", "decompose", "reconstruct"), ("conv2", "conv3"), range(30))
    seeds = [derive_seed(*unit) for unit in units]
    assert len(set(seeds)) == 1800


def test_a_generator_draws_by_its_seed_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (torch.rand(100, generator=derived_generator(0, "train", unit)) for unit in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, torch.rand(100, generator=torch.Generator().manual_seed(derive_seed(0, "train", 1))))
    assert torch.equal(torch.get_rng_state(), state)
