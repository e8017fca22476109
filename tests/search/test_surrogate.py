"""The Gaussian process against the textbook's formulas with plain inverses, and SciPy's normal distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from gross_ray.search import surrogate
from gross_ray.search.surrogate import Surrogate

GENERATOR = np.random.default_rng(0)
PLACES = GENERATOR.integers(0, 5, (30, 4))
ACCURACIES = 0.8 + 0.02 * PLACES[:, 0] - 0.005 * PLACES[:, 2] + 0.003 * GENERATOR.standard_normal(30)


def kernel(one: np.ndarray, other: np.ndarray, share: float) -> float:
    squares = [float(a - b) ** 2 for a, b in zip(one, other, strict=True)]
    summed = sum(np.exp(-square / 2) for square in squares) / len(squares)
    product = np.exp(-sum(squares) / (2 * 1.5**2 * len(squares) / 3))
    return share * summed + (1 - share) * product


def gram(ones: np.ndarray, others: np.ndarray, share: float) -> np.ndarray:
    return np.array([[kernel(one, other, share) for other in others] for one in ones])


def test_mean_and_deviation_are_those_of_the_conditional_distribution() -> None:
    fitted = Surrogate.of(PLACES, ACCURACIES)
    asked = GENERATOR.integers(0, 5, (6, 4))
    share, noise = fitted.sum_share, fitted.noise
    mean, scale = ACCURACIES.mean(), ACCURACIES.std()
    inverse = np.linalg.inv(gram(PLACES, PLACES, share) + noise * np.eye(30))
    across = gram(asked, PLACES, share)
    found_mean, found_deviation = fitted.predict(asked)
    np.testing.assert_allclose(found_mean, mean + scale * across @ inverse @ ((ACCURACIES - mean) / scale), rtol=1e-9)
    variance = 1 + noise - np.einsum("mn,nk,mk->m", across, inverse, across)
    np.testing.assert_allclose(found_deviation, scale * np.sqrt(variance), rtol=1e-9)


def test_the_grid_is_searched_for_the_highest_evidence() -> None:
    fitted = Surrogate.of(PLACES, ACCURACIES)
    values = (ACCURACIES - ACCURACIES.mean()) / ACCURACIES.std()
    evidence = {
        (noise, share): multivariate_normal.logpdf(values, cov=gram(PLACES, PLACES, share) + noise * np.eye(30))
        for noise, share in itertools.product(surrogate.NOISES, surrogate.SUMS)
    }
    assert (fitted.noise, fitted.sum_share) == max(evidence, key=lambda key: evidence[key])
    assert fitted.sum_share == max(surrogate.SUMS)  # it is a sum over the layers


def test_products_of_layers_are_told_from_sums() -> None:
    places = GENERATOR.integers(0, 3, (60, 3))
    fitted = Surrogate.of(places, np.prod(places - 1.0, axis=1))
    assert fitted.sum_share == min(surrogate.SUMS)


@pytest.mark.parametrize("accuracies", [np.array([0.5, 0.5, 0.5]), np.array([0.1, 0.2, 0.9])])
def test_few_and_equal_accuracies(accuracies: np.ndarray) -> None:
    mean, deviation = Surrogate.of(PLACES[:3], accuracies).predict(PLACES[:5])
    assert np.isfinite(mean).all()
    assert (deviation > 0).all()
