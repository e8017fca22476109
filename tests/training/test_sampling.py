import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gross_ray.errors import InvalidValueError
from gross_ray.experiment import SupernetOptions
from gross_ray.space import Configuration, SearchSpace
from gross_ray.training.sampling import ConfigurationSampler, sampling_probabilities

NUM_DRAWS = 4000


def equation_8(num_group_sizes: int, alpha: float, scaling: str) -> list[float]:
    """Eq. 8 term by term; every exponent is shifted by the largest, which the quotient does not see."""
    step = alpha if scaling == "index" else alpha / num_group_sizes
    terms = [math.exp(-step * i + step) for i in range(1, num_group_sizes + 1)]
    return [term / math.fsum(terms) for term in terms]


def draws(space: SearchSpace, alpha: float, scaling: str, seed: int = 0) -> list[Configuration]:
    sampler = ConfigurationSampler(space, alpha, scaling=scaling)
    generator = torch.Generator().manual_seed(seed)
    return [sampler.draw(generator) for _ in range(NUM_DRAWS)]


@given(st.integers(1, 12), st.floats(0, 50), st.sampled_from(["index", "normalised"]))
def test_probabilities_are_equation_8(num_group_sizes: int, alpha: float, scaling: str) -> None:
    probabilities = sampling_probabilities(num_group_sizes, alpha, scaling=scaling)
    assert probabilities.dtype == torch.float64
    assert probabilities.tolist() == pytest.approx(equation_8(num_group_sizes, alpha, scaling), rel=1e-9, abs=1e-300)
    assert float(probabilities.sum()) == pytest.approx(1)
    assert (probabilities.diff() <= 0).all()


def test_the_default_scaling_is_that_of_the_options() -> None:
    """Of the function, of the sampler and of the experiment's options: "normalised"."""
    space = SearchSpace({"conv2": [1, 2, 4, 8]})
    expected = equation_8(4, 3.0, "normalised")
    assert SupernetOptions().scaling == "normalised"
    assert sampling_probabilities(4, 3.0).tolist() == pytest.approx(expected)
    named, default = (ConfigurationSampler(space, 3.0, **named) for named in ({"scaling": "normalised"}, {}))
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    assert [named.draw(one) for _ in range(500)] == [default.draw(other) for _ in range(500)]


@pytest.mark.parametrize("scaling", ["index", "normalised"])
def test_alpha_0_is_uniform_and_one_size_is_certain(scaling: str) -> None:
    assert sampling_probabilities(7, 0, scaling=scaling).tolist() == pytest.approx([1 / 7] * 7)
    assert sampling_probabilities(1, 4, scaling=scaling).tolist() == [1]


def test_scalings_are_those_that_the_figures_were_worked_out_for() -> None:
    # "98 % of the steps for the smallest of six sizes at alpha = 4" as printed; .50 .25 .13 .07 .03 .02 normalised.
    assert float(sampling_probabilities(6, 4, scaling="index")[0]) == pytest.approx(0.98, abs=0.005)
    normalised = sampling_probabilities(6, 4, scaling="normalised").tolist()
    assert [round(one, 2) for one in normalised] == [0.5, 0.25, 0.13, 0.07, 0.03, 0.02]


@pytest.mark.parametrize(
    ("alpha", "scaling"),
    [(0.0, "index"), (0.0, "normalised"), (0.7, "index"), (2.0, "normalised"), (4.0, "normalised")],
)
def test_draws_follow_equation_8_and_layers_are_independent(alpha: float, scaling: str) -> None:
    space = SearchSpace({"conv2": [1, 2, 8], "conv3": [4, 16]})
    counts = Counter(draws(space, alpha, scaling))
    by_layer = [equation_8(len(sizes), alpha, scaling) for sizes in space.group_sizes.values()]
    expected = [NUM_DRAWS * one * other for one, other in product(*by_layer)]  # the joint law is the product
    observed = [counts[member] for member in space]
    assert sum(observed) == NUM_DRAWS
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    assert stats.chi2_contingency(np.reshape(observed, (3, 2))).pvalue > 1e-4


def test_the_test_above_tells_the_scalings_apart() -> None:
    space = SearchSpace({"conv2": [1, 2, 8]})
    counts = Counter(draws(space, 1.0, "index"))
    other = [NUM_DRAWS * one for one in equation_8(3, 1.0, "normalised")]
    assert stats.chisquare([counts[member] for member in space], other).pvalue < 1e-4


def test_consecutive_draws_are_independent() -> None:
    chosen = [configuration[0] for configuration in draws(SearchSpace({"conv2": [1, 2, 4]}), 0.0, "index")]
    pairs = Counter(zip(chosen[::2], chosen[1::2], strict=True))
    assert stats.chisquare([pairs[pair] for pair in product([1, 2, 4], repeat=2)]).pvalue > 1e-4


def test_generator_alone_decides() -> None:
    space = SearchSpace({"conv2": [1, 2, 4, 8], "conv3": [1, 2]})
    state = torch.get_rng_state()
    assert draws(space, 1.0, "index", seed=5) == draws(space, 1.0, "index", seed=5)
    assert draws(space, 1.0, "index", seed=5) != draws(space, 1.0, "index", seed=6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("num_group_sizes", "alpha", "scaling", "message"),
    [
        (0, 1.0, "index", "num_group_sizes = 0: must be 1 or more"),
        (3, -0.5, "index", "alpha = -0.5: must be 0"),
        (3, math.nan, "index", "alpha = nan: must be 0"),
        (3, math.inf, "normalised", "alpha = inf: must be 0"),
        (3, 1.0, "linear", "scaling = 'linear': must be one of index, normalised"),
    ],
)
def test_bad_values_are_refused(num_group_sizes: int, alpha: float, scaling: str, message: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        sampling_probabilities(num_group_sizes, alpha, scaling=scaling)
    assert message in str(caught.value)
    if num_group_sizes:
        with pytest.raises(InvalidValueError):
            ConfigurationSampler(SearchSpace({"conv2": [1, 2, 4]}), alpha, scaling=scaling)
