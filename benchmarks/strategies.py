"""How many evaluations each strategy needs to find the best within a budget, and its results in a VGG-sized space.

    python benchmarks/strategies.py [--run results/fashion-short] [--seeds 20] [--evaluations 1000]

First, the four-conv space. The accuracies of all 252 configurations come from a finished run (the median over its
supernets), so that a search costs nothing and the best configuration is known. The script prints the number of
evaluations, in batches of 8, until the best within the budget is evaluated (median over the seeds). The baseline is the
strategy `random`. The budgets are the MACs of fixed configurations.

Second, the space of VGG-16: 12 layers at 1, 4, 16 and 32 (4^12 configurations), with the MACs of VGG-16. No supernet is
trained: an accuracy is 0.94 minus a random loss for each layer, larger for smaller group-sizes, minus a loss for pairs
of neighbouring layers with small group-sizes, plus noise. The script prints the hypervolume of MACs and accuracy
without noise after every quarter of the evaluations, and its ratio to that of `random`. The hypervolume is the
dominated share of the rectangle from the cheapest configuration at the lowest accuracy to the most expensive at the
highest.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gross_ray.models import build_model
from gross_ray.run.store import read_table
from gross_ray.search.budgeted import BudgetedSpace
from gross_ray.search.budgets import Budget
from gross_ray.search.cost import LayerCosts, layer_costs
from gross_ray.search.scores import Score, scored
from gross_ray.search.strategies import STRATEGIES, strategy
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.layers import choice_of

ROOT = Path(__file__).resolve().parents[1]
NOISE = 0.001
"""Standard deviation. 10,000 images at 0.9 give 0.003, most of which is common to the configurations of a supernet."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "results" / "fashion-short")
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 16, 4], help="uniform group-sizes as budgets")
    parser.add_argument("--strategies", nargs="+", default=[one for one in STRATEGIES if one != "exhaustive"])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--large-seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--large-batch", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    four_conv(options)
    large(options)


def space_and_cost(model: str, group_sizes: tuple[int, ...]) -> tuple[SearchSpace, LayerCosts]:
    """Return the space of a network, and its MACs."""
    network = build_model(model, num_classes=10, generator=torch.Generator().manual_seed(0))
    supernet = empty_supernet(network, choice_of(network, sizes=group_sizes).group_sizes)
    return SearchSpace.of(supernet), layer_costs(supernet, (3, 32, 32), "macs")


def four_conv(options: argparse.Namespace) -> None:
    """Print how many evaluations each strategy needs to find the best of the four-conv space within each budget."""
    space, macs = space_and_cost("four-conv", ())
    chosen = read_table(options.run, "configurations").query("alpha == 0")
    rows = scored(chosen, Score("median"))
    accuracies = dict(zip(map(Configuration.parse, rows["configuration"]), rows["supernet_accuracy"], strict=True))
    assert set(accuracies) == set(space)
    fifth = len(space) / 5
    print(
        f"four-conv, {options.run.name}: median (worst) evaluations of {len(space)} to the best, {options.seeds} seeds"
    )
    for size in options.budgets:
        limit = macs.of_one([size] * len(space.layers))
        within = BudgetedSpace(space, [macs], [Budget("macs", limit)])
        best = max(accuracies[one] for one in within)
        found = {}
        for name in options.strategies:
            found[name] = [
                evaluations_to(best, name, within, seed, accuracies.__getitem__, options.batch)
                for seed in range(options.seeds)
            ]
        by_chance = statistics.median(found["random"]) if "random" in found else float("nan")
        print(f"  budget {size}, {len(list(within))} fit, best {best:.4f}; a fifth of the space is {fifth:.0f}")
        for name, needed in found.items():
            median = statistics.median(needed)
            print(f"    {name:14} {median:6.1f} ({max(needed)})   {by_chance / median:5.2f} times as soon as random")


def evaluations_to(
    best: float, name: str, within: BudgetedSpace, seed: int, accuracy: Callable[[Configuration], float], batch: int
) -> int:
    """Return how many evaluations a strategy needs until one reaches the accuracy `best`."""
    search, evaluated = strategy(name, within, seed), 0
    while proposed := search.propose(batch):
        found = {one: accuracy(one) for one in proposed}
        evaluated += len(found)
        if max(found.values()) >= best:
            return evaluated
        search.learn(found)
    raise AssertionError(f"{name} finished before it found the best")


def large(options: argparse.Namespace) -> None:
    """Print the hypervolumes that the strategies reach in a VGG-sized space, relative to `random`."""
    space, macs = space_and_cost("vgg16", (1, 4, 16, 32))
    print(
        f"VGG-16's space, {len(space):,} configurations, accuracies made up: hypervolume after evaluations, "
        f"mean of {options.large_seeds} seeds (to random's)"
    )
    quarters = [options.evaluations * part // 4 for part in range(1, 5)]
    found: dict[str, list[float]] = {}
    for name in options.strategies:
        by_seed = [
            hypervolumes(name, space, macs, seed, quarters, options.large_batch) for seed in range(options.large_seeds)
        ]
        found[name] = [statistics.mean(column) for column in zip(*by_seed, strict=True)]
        relative = found.get("random", found[name])
        cells = [
            f"{num}: {one:.4f} ({one / other:.3f})"
            for num, one, other in zip(quarters, found[name], relative, strict=True)
        ]
        print(f"  {name:14} " + "  ".join(cells), flush=True)


def hypervolumes(
    name: str, space: SearchSpace, macs: LayerCosts, seed: int, numbers: list[int], batch: int
) -> list[float]:
    """Return the hypervolume after each of these numbers of evaluations; budgets from tight to loose take turns."""
    generator = np.random.default_rng(seed)
    parts = [np.sort(generator.gamma(1.0, 0.01, len(sizes)))[::-1] for sizes in space.group_sizes.values()]
    pairs = generator.gamma(1.0, 0.004, len(parts))
    whole = BudgetedSpace(space, [macs])
    low, high = macs.minimum, macs.maximum
    budgets = [low + share * (high - low) for share in (0.2, 0.4, 0.6, 0.8)]
    searches = [strategy(name, BudgetedSpace(space, [macs], [Budget("macs", one)]), seed) for one in budgets]

    def accuracy(places: np.ndarray) -> np.ndarray:
        lost = sum(part[places[:, layer]] for layer, part in enumerate(parts))
        both = (places[:, :-1] < 2) & (places[:, 1:] < 2)
        return 0.94 - lost - both @ pairs[1:]

    worst = float(accuracy(np.zeros((1, len(parts)), dtype=int))[0])
    top = float(accuracy(np.array([[len(part) - 1 for part in parts]]))[0])
    known: dict[Configuration, tuple[float, float]] = {}
    volumes = []
    turn = 0
    while len(volumes) < len(numbers):
        proposed = searches[turn % len(searches)].propose(min(batch, numbers[len(volumes)] - len(known)))
        turn += 1
        indices = whole.indices(proposed)
        true = accuracy(indices)
        seen = true + NOISE * generator.standard_normal(len(true))
        known |= dict(zip(proposed, zip(macs.of_indices(indices), true, strict=True), strict=True))
        for search in searches:  # all searches learn every evaluation
            search.learn(dict(zip(proposed, seen.tolist(), strict=True)))
        if len(known) == numbers[len(volumes)]:
            volumes.append(volume(sorted(known.values()), low, high, worst, top))
    return volumes


def volume(points: list[tuple[float, float]], low: float, high: float, worst: float, top: float) -> float:
    """Return the share of the rectangle that points of (MACs, accuracy) in ascending order dominate."""
    area, best = 0.0, worst
    for cost, accuracy in points:
        if accuracy > best:
            area += (high - cost) * (accuracy - best)
            best = accuracy
    return area / ((high - low) * (top - worst))


if __name__ == "__main__":
    main()
