import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gross_ray.errors import InvalidValueError
from gross_ray.search.correlation import rank_correlation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sign(number):
    return (number > 0) - (number < 0)


def tau_b(ours, theirs):
    """Kendall's tau-b by looking at every pair."""
    concordant = ties_ours = ties_theirs = pairs = 0
    for i in range(len(ours)):
        for j in range(i):
            first, second = sign(ours[i] - ours[j]), sign(theirs[i] - theirs[j])
            pairs += 1
            concordant += first * second
            ties_ours += first == 0
            ties_theirs += second == 0
    return concordant / math.sqrt((pairs - ties_ours) * (pairs - ties_theirs))


def rho(ours, theirs):
    """Spearman's rho as Pearson's correlation of the ranks, each one more than the mean number of those before it."""

    def ranks(values):
        return [sum(other < one for other in values) + sum(other == one for other in values) / 2 for one in values]

    x, y = ranks(ours), ranks(theirs)
    mean = sum(x) / len(x)
    products = [
        [(one - mean) * (other - mean) for one, other in zip(*pair, strict=True)] for pair in ((x, y), (x, x), (y, y))
    ]
    return sum(products[0]) / math.sqrt(sum(products[1]) * sum(products[2]))


def series(values, prefix=""):
    return pd.Series(values, index=[f"{prefix}{place + 1}-1" for place in range(len(values))], dtype=float)


PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=12).filter(
    lambda rows: len({row[0] for row in rows}) > 1 and len({row[1] for row in rows}) > 1
)


@given(PAIRS, st.integers(0, 5))
def test_the_correlations_are_those_of_every_pair_and_of_the_ranks(rows, seed):
    ours, theirs = zip(*rows, strict=True)
    found = rank_correlation(series(ours), series(theirs), generator=generator(seed), num_resamples=20)
    assert found.num_configurations == len(rows)
    assert found.spearman == pytest.approx(rho(ours, theirs), abs=1e-12)
    assert found.kendall == pytest.approx(tau_b(ours, theirs), abs=1e-12)
    assert -1 <= found.spearman_low <= found.spearman_high <= 1
    assert -1 <= found.kendall_low <= found.kendall_high <= 1


@given(PAIRS, st.integers(0, 5))
def test_the_interval_is_that_of_the_resamples_that_are_defined(rows, seed):
    drawn = torch.randint(len(rows), (40, len(rows)), generator=generator(seed)).tolist()
    samples = [list(zip(*(rows[place] for place in places), strict=True)) for places in drawn]
    defined = [sample for sample in samples if len(set(sample[0])) > 1 and len(set(sample[1])) > 1]
    # As text, "10-1" comes before "2-1": the resamples are of the configurations in the order of their names.
    names = [f"{place:02}-1" for place in range(1, len(rows) + 1)]
    ours, theirs = (pd.Series(values, index=names, dtype=float) for values in zip(*rows, strict=True))
    found = rank_correlation(ours, theirs, generator=generator(seed), num_resamples=40, confidence=0.8)
    assert found.num_resamples == len(defined)
    for name, oracle in (("spearman", rho), ("kendall", tau_b)):
        expected = np.percentile([oracle(*sample) for sample in defined], [10, 90])
        assert (getattr(found, f"{name}_low"), getattr(found, f"{name}_high")) == pytest.approx(
            tuple(expected), abs=1e-9
        )


def test_the_interval_covers_what_it_estimates():
    """Of normal pairs with correlation r, rho is 6 / pi asin(r / 2) and tau 2 / pi asin(r)."""
    random, r, covered = np.random.default_rng(0), 0.6, {"spearman": 0, "kendall": 0}
    truth = {"spearman": 6 / math.pi * math.asin(r / 2), "kendall": 2 / math.pi * math.asin(r)}
    for seed in range(30):
        ours = random.normal(size=40)
        theirs = r * ours + math.sqrt(1 - r * r) * random.normal(size=40)
        found = rank_correlation(
            series(ours), series(theirs), generator=generator(seed), num_resamples=80, confidence=0.9
        )
        for name in covered:
            covered[name] += getattr(found, f"{name}_low") <= truth[name] <= getattr(found, f"{name}_high")
    assert all(22 <= count <= 29 for count in covered.values()), covered  # 27 are expected


def test_one_seed_gives_one_interval_whatever_the_order_of_rows():
    random = np.random.default_rng(0)
    ours, theirs = series(random.normal(size=15)), series(random.normal(size=15))
    found = rank_correlation(ours, theirs, generator=generator(1), num_resamples=100)
    assert rank_correlation(ours, theirs, generator=generator(1), num_resamples=100) == found
    assert (
        rank_correlation(ours[::-1], theirs.sample(frac=1, random_state=0), generator=generator(1), num_resamples=100)
        == found
    )
    assert rank_correlation(ours, theirs, generator=generator(2), num_resamples=100) != found


def test_only_configurations_with_both_accuracies_count():
    ours = pd.Series({"1-1": 0.1, "2-1": 0.2, "4-1": 0.3, "8-1": 0.0, "1-2": None})
    theirs = pd.Series({"4-1": 0.9, "1-1": 0.7, "2-1": 0.8, "1-4": 0.1, "1-2": 0.99})
    found = rank_correlation(ours, theirs, generator=generator(), num_resamples=50)
    assert (found.num_configurations, found.spearman, found.kendall) == (3, 1.0, 1.0)
    # Three configurations: every defined resample is in order too.
    assert found.spearman_low == found.kendall_high == 1.0
    assert found.num_resamples < 50
    with pytest.raises(InvalidValueError, match="of 2 configurations: it needs 3 or more"):
        rank_correlation(ours.drop("4-1"), theirs, generator=generator())


def test_rounding_makes_no_difference_between_equal_accuracies():
    ours = series([0.1 + 0.2, 0.3, 0.5, 0.7])  # 0.30000000000000004 and 0.3
    found = rank_correlation(ours, series([1, 2, 3, 4]), generator=generator(), num_resamples=10)
    assert found.kendall == pytest.approx(tau_b([3, 3, 5, 7], [1, 2, 3, 4]))


def test_accuracies_that_are_all_equal_have_no_ranks():
    differing, equal = series([0.1, 0.2, 0.3]), series([0.5, 0.5, 0.5])
    with pytest.raises(InvalidValueError, match="of 3 configurations: all are equally accurate in the supernet"):
        rank_correlation(equal, differing, generator=generator())
    with pytest.raises(InvalidValueError, match="of 3 configurations: all are equally accurate on their own"):
        rank_correlation(differing, equal, generator=generator())


def test_resamples_without_ranks_are_told_where_there_are_no_others():
    pair = series([0.1, 0.2, 0.2]), series([0.1, 0.2, 0.3])
    seeds = {seed: torch.randint(3, (1, 3), generator=generator(seed)).tolist()[0] for seed in range(20)}
    constant = next(seed for seed, drawn in seeds.items() if 0 not in drawn)
    with pytest.raises(InvalidValueError, match="num_resamples=1: every resample is constant"):
        rank_correlation(*pair, generator=generator(constant), num_resamples=1)
