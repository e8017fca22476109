"""A Gaussian process over configurations, which predicts accuracies from those already evaluated.

Group-sizes of a layer are similar if their indices are close. The kernel is a weighted mean of a sum over the layers
(each layer adds its part) and a product (layers interact), plus noise. Weight and noise maximise the evidence on a
small grid; the mean is constant, the accuracies are standardised (Rasmussen and Williams 2006, chapters 2 and 5).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cholesky, solve_triangular

NOISES = (0.05, 0.15, 0.4)
"""The grid of noise variances, relative to the kernel's variance."""
SUMS = (0.25, 0.5, 0.85)
"""The grid of the sum kernel's weights; the product kernel has the rest."""
_LENGTH = 1.0  # length scale of a layer in the sum, in indices
_PRODUCT_LENGTH = 1.5  # the same in the product, if three layers differ

# Shapes: N evaluated configurations, M predicted ones, L layers.


@dataclass(frozen=True)
class Surrogate:
    """A Gaussian process conditioned on evaluated configurations."""

    indices: np.ndarray
    """The evaluated configurations, (N, L): the index of each group-size among those of its layer."""
    noise: float
    """Variance of the noise, relative to the kernel's variance."""
    sum_share: float
    """Weight of the sum kernel."""
    _factor: np.ndarray
    _weights: np.ndarray
    _mean: float
    _scale: float

    @classmethod
    def of(cls, indices: np.ndarray, accuracies: np.ndarray) -> Surrogate:
        """Fit to N (2 or more) configurations: `indices` (N, L), `accuracies` (N,)."""
        mean, scale = float(accuracies.mean()), float(accuracies.std()) or 1.0
        values = (accuracies - mean) / scale
        sums, products = _kernels(indices, indices)
        best: tuple[float, Surrogate] | None = None
        for noise, share in itertools.product(NOISES, SUMS):
            factor = cholesky(share * sums + (1 - share) * products + noise * np.eye(len(values)), lower=True)
            white = solve_triangular(factor, values, lower=True)
            evidence = -0.5 * float(white @ white) - float(np.log(np.diag(factor)).sum())
            if best is None or evidence > best[0]:
                weights = solve_triangular(factor, white, lower=True, trans="T")
                best = evidence, cls(indices, noise, share, factor, weights, mean, scale)
        assert best is not None
        return best[1]

    def predict(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation, (M,) each, of the accuracies that evaluations would measure."""
        sums, products = _kernels(indices, self.indices)
        kernel = self.sum_share * sums + (1 - self.sum_share) * products
        variance = 1 + self.noise - (solve_triangular(self._factor, kernel.T, lower=True) ** 2).sum(axis=0)
        return self._mean + self._scale * (kernel @ self._weights), self._scale * np.sqrt(np.maximum(variance, 0))


def _kernels(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the product kernel of all pairs, (N, M) each; 1 between equal configurations."""
    layers = left.shape[1]
    sums, squares = np.zeros((len(left), len(right))), np.zeros((len(left), len(right)))
    for layer in range(layers):
        square = np.square(left[:, None, layer] - right[None, :, layer], dtype=np.float64)
        sums += np.exp(square / (-2 * _LENGTH**2))
        squares += square
    return sums / layers, np.exp(squares / (-2 * _PRODUCT_LENGTH**2 * layers / 3))
