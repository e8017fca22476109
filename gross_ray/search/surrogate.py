"""A Gaussian process over configurations: what is known of some accuracies says which others may be best.

Group-sizes of a layer are alike when their places are near. Two kernels are weighed against each other: a sum over the
layers (each layer's choice adds its part) and a product (layers act together), with a noise of its own. Weights and
noise are those of the highest evidence on a small grid; constant mean, accuracies standardised (Rasmussen and Williams
2006, chapters 2 and 5).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cholesky, solve_triangular

NOISES = (0.05, 0.15, 0.4)
"""Variances of the noise that are tried, where what is explained has 1."""
SUMS = (0.25, 0.5, 0.85)
"""Shares of the sum over the layers that are tried; the rest is the product's."""
_LENGTH = 1.0  # of a layer's likeness, in places
_PRODUCT_LENGTH = 1.5  # the same in the product, where three layers differ

# Shapes: N configurations known, M asked for, L layers.


@dataclass(frozen=True)
class Surrogate:
    """A Gaussian process given some accuracies."""

    places: np.ndarray
    """Those known, (N, L), by the places of their group-sizes."""
    noise: float
    """Variance of the noise, in those of the accuracies."""
    sum_share: float
    """Share of the sum over the layers in the kernel."""
    _factor: np.ndarray
    _weights: np.ndarray
    _mean: float
    _scale: float

    @classmethod
    def of(cls, places: np.ndarray, accuracies: np.ndarray) -> Surrogate:
        """Fit to N (2 or more) configurations: `places` (N, L), `accuracies` (N,)."""
        mean, scale = float(accuracies.mean()), float(accuracies.std()) or 1.0
        values = (accuracies - mean) / scale
        sums, products = _kernels(places, places)
        found: tuple[float, Surrogate] | None = None
        for noise, share in itertools.product(NOISES, SUMS):
            factor = cholesky(share * sums + (1 - share) * products + noise * np.eye(len(values)), lower=True)
            white = solve_triangular(factor, values, lower=True)
            evidence = -0.5 * float(white @ white) - float(np.log(np.diag(factor)).sum())
            if found is None or evidence > found[0]:
                weights = solve_triangular(factor, white, lower=True, trans="T")
                found = evidence, cls(places, noise, share, factor, weights, mean, scale)
        assert found is not None
        return found[1]

    def predict(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of M accuracies, (M,) each, as an evaluation would find them."""
        known = self._kernel(places, self.places)
        spread = 1 + self.noise - (solve_triangular(self._factor, known.T, lower=True) ** 2).sum(axis=0)
        return self._mean + self._scale * (known @ self._weights), self._scale * np.sqrt(np.maximum(spread, 0))

    def _kernel(self, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        sums, products = _kernels(ones, others)
        return self.sum_share * sums + (1 - self.sum_share) * products


def _kernels(ones: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both kernels of all pairs, (N, M) each; 1 between a configuration and itself."""
    layers = ones.shape[1]
    sums, squares = np.zeros((len(ones), len(others))), np.zeros((len(ones), len(others)))
    for layer in range(layers):
        square = np.square(ones[:, None, layer] - others[None, :, layer], dtype=np.float64)
        sums += np.exp(square / (-2 * _LENGTH**2))
        squares += square
    return sums / layers, np.exp(squares / (-2 * _PRODUCT_LENGTH**2 * layers / 3))
