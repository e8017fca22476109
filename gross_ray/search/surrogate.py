"""A Gaussian process over configurations, which predicts accuracies from those already evaluated.

Group-sizes of a layer are similar if their indices are close. The kernel is a weighted mean of a sum over the layers
(each layer adds its part) and a product (layers interact), plus noise. Weight and noise maximise the evidence on a
small grid; the mean is constant, the accuracies are standardised (Rasmussen and Williams 2006, chapters 2 and 5).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

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

    @property
    def noise_variance(self) -> float:
        """Variance of the noise, in the square of the accuracies' unit."""
        return self.noise * self._scale**2

    @classmethod
    def of(cls, indices: np.ndarray, accuracies: np.ndarray, *, noises: Sequence[float] = NOISES) -> Surrogate:
        """Fit to N (2 or more) configurations: `indices` (N, L), `accuracies` (N,); `noises` is the grid to try."""
        mean, scale = float(accuracies.mean()), float(accuracies.std()) or 1.0
        values = (accuracies - mean) / scale
        sums, products = _kernels(indices, indices)
        best: tuple[float, Surrogate] | None = None
        for noise, share in itertools.product(noises, SUMS):
            factor = cholesky(share * sums + (1 - share) * products + noise * np.eye(len(values)), lower=True)
            white = solve_triangular(factor, values, lower=True)
            evidence = -0.5 * float(white @ white) - float(np.log(np.diag(factor)).sum())
            if best is None or evidence > best[0]:
                weights = solve_triangular(factor, white, lower=True, trans="T")
                best = evidence, cls(indices, noise, share, factor, weights, mean, scale)
        assert best is not None
        return best[1]

    def predict(self, indices: np.ndarray, *, noise: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation, (M,) each, of the accuracies that evaluations would measure.

        Without `noise`, the standard deviation is that of the accuracies without the evaluations' noise.
        """
        sums, products = _kernels(indices, self.indices)
        kernel = self.sum_share * sums + (1 - self.sum_share) * products
        variance = 1 + self.noise * noise - (solve_triangular(self._factor, kernel.T, lower=True) ** 2).sum(axis=0)
        return self._mean + self._scale * (kernel @ self._weights), self._scale * np.sqrt(np.maximum(variance, 0))

    def smooth(self, values: np.ndarray) -> np.ndarray:
        """Return other values of the fitted configurations, (N, K), smoothed by the same process; 0 is their mean."""
        sums, products = _kernels(self.indices, self.indices)
        kernel = self.sum_share * sums + (1 - self.sum_share) * products
        return kernel @ cho_solve((self._factor, True), values)


def _kernels(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the product kernel of all pairs, (N, M) each; 1 between equal configurations."""
    layers = left.shape[1]
    # As matrix products: each index of `left` selects a row of the similarities to all configurations of `right`.
    choices = np.arange(max(left.max(initial=0), right.max(initial=0)) + 1)
    similar = np.exp(np.square(choices[:, None, None] - right.T, dtype=np.float64) / (-2 * _LENGTH**2))  # (S, L, M)
    chosen = (choices[:, None] == left[:, None, :]).astype(np.float64)  # (N, S, L)
    sums = chosen.reshape(len(left), -1) @ similar.reshape(-1, len(right))
    ours, theirs = left.astype(np.float64), right.astype(np.float64)
    squares = (ours**2).sum(axis=1)[:, None] + (theirs**2).sum(axis=1) - 2 * ours @ theirs.T  # exact: whole numbers
    return sums / layers, np.exp(squares / (-2 * _PRODUCT_LENGTH**2 * layers / 3))
