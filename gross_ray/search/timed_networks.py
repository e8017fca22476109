"""Time whole networks beside the full one, and fit their times as a sum over the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gross_ray.search.runtimes import Run, Runtime
from gross_ray.search.timing import undisturbed_logs
from gross_ray.search.variants import Forms
from gross_ray.space import DENSE

BESIDE = 5
"""Networks that are timed beside the full one: each holds its weights in memory."""
DISTURBED, AGAIN = 1.1, 2
"""A group is timed again, at most AGAIN times, if its full network took more than DISTURBED times the tenth percentile
of all groups' full networks."""
RIDGES = (1e-4, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Penalties on squared effects, in units of squared relative error; the one that predicts best is taken."""
WEIGHT_OF_FULL = 1000.0
"""Weight of the full network in the fit, as a number of observations: it makes the fit reproduce its measured time."""


@dataclass(frozen=True)
class Group:
    """Networks that were timed together, beside the full one."""

    networks: Sequence[Forms]
    full_ms: float
    relative: np.ndarray
    """Time of each network, divided by the full one's: (N,)."""
    noises: np.ndarray
    """Relative error of each of these times: (N,)."""


class Times:
    """The times of networks, in groups.

    Each network, the full one too, is loaded anew for its group: where a runtime places the weights in memory changes
    its speed by some percent (in torch's eager mode the networks share their weights). What else runs on a machine
    changes the networks' speed for seconds, and unequally: a group in which the full network was clearly slower than in
    the fastest groups is timed again.
    """

    def __init__(
        self,
        full: Forms,
        load: Callable[[Forms], Run],
        runtime: Runtime,
        repeats: int,
        total: int = 0,
        on_part: Callable[[int, int], object] | None = None,
    ) -> None:
        """Time nothing yet; `total` is passed to `on_part` as its second argument."""
        self.full = full
        self._load, self._clock = load, runtime.clock()
        self._repeats, self._total, self._on_part = repeats, total, on_part
        self._groups: list[Group] = []

    @property
    def networks(self) -> list[Forms]:
        """The networks that were timed."""
        return [one for group in self._groups for one in group.networks]

    @property
    def relative(self) -> list[float]:
        """Time of each network, divided by the full one's."""
        return [ms for group in self._groups for ms in group.relative.tolist()]

    @property
    def full_ms(self) -> float:
        """Time of the full network."""
        return float(np.median([group.full_ms for group in self._groups]))

    @property
    def noise(self) -> float:
        """Median relative error of a time."""
        return float(np.median(np.concatenate([group.noises for group in self._groups])))

    def add(self, networks: Sequence[Forms]) -> None:
        """Time more networks."""
        begin = len(self._groups)
        for first in range(0, len(networks), BESIDE):
            self._groups.append(self._timed(networks[first : first + BESIDE]))
            if self._on_part is not None:
                self._on_part(len(self.networks), self._total)
        for _ in range(AGAIN):
            slowest = DISTURBED * float(np.quantile([group.full_ms for group in self._groups], 0.1))
            for index, group in enumerate(self._groups[begin:], begin):
                if group.full_ms > slowest:
                    self._groups[index] = min(group, self._timed(group.networks), key=lambda one: one.full_ms)

    def _timed(self, networks: Sequence[Forms]) -> Group:
        works = [self._load(one) for one in (self.full, *networks)]  # by index: equal networks are each timed
        logs = undisturbed_logs(dict(enumerate(works)), self._repeats, self._clock)
        medians = np.median(logs, axis=0)
        # The median of all rounds has half the spread of the difference of its halves.
        halves = np.median(logs[::2], axis=0) - np.median(logs[1::2], axis=0)
        relative = np.exp(medians[1:] - medians[0])
        return Group(networks, math.exp(medians[0]), relative, np.abs(halves[1:] / 2))


def fit(
    forms: Mapping[str, Forms], networks: Sequence[Forms], times: np.ndarray
) -> tuple[dict[str, dict[int, float]], np.ndarray]:
    """Fit times (N,), relative to the full network's, as a sum over the layers; the last network is the full one.

    Return what each form adds to the full network's time, and the relative error of each other network (N - 1,) when it
    is predicted from a fit to the others (in closed form, from the hat matrix). Errors are relative, so that fast
    networks count as much as slow ones.
    """
    columns = [(layer, size) for layer, sizes in enumerate(forms.values()) for size in sizes]
    chosen = np.array([[one[layer] == size for layer, size in columns] for one in networks], dtype=np.float64)
    weights = np.append(np.ones(len(times) - 1), math.sqrt(WEIGHT_OF_FULL)) / times
    rows = np.column_stack([np.ones(len(times)), chosen]) * weights[:, None]
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for ridge in RIDGES:
        penalty = np.diag([0.0, *np.full(len(columns), ridge * float(np.mean(1 / times**2)))])
        solved = np.linalg.lstsq(rows.T @ rows + penalty, rows.T, rcond=None)[0]
        coefficients = solved @ (weights * times)
        left_out = 1 - np.minimum(np.einsum("ij,ji->i", rows, solved), 1 - 1e-9)
        errors = (np.abs(rows @ coefficients / (weights * times) - 1) / left_out)[:-1]
        if best is None or np.median(errors) < best[0]:
            best = float(np.median(errors)), coefficients, errors
    assert best is not None
    _, coefficients, errors = best
    effects = dict(zip(columns, coefficients[1:].tolist(), strict=True))
    added = {
        name: {size: effects[layer, size] - effects[layer, DENSE] for size in sizes}
        for layer, (name, sizes) in enumerate(forms.items())
    }
    return added, errors
