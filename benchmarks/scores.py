"""Compare scores on the configurations of published results that were trained on their own.

    python benchmarks/scores.py [results/fashion-short ...]

For each score: Spearman's correlation with the mean accuracy of training on its own (validation split), and the mean
regret. The regret of one budget is how much less accurate on its own (test split) the validated configuration of the
highest score is than the best validated one; the budgets are the MACs of the validated configurations, except for the
cheapest two. The baseline is the paper's score, the median. "ridge" is a ridge regression on one-hot group-sizes and
their pairs, with the penalty of the least leave-one-out error, in place of the Gaussian process.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from gross_ray.run.searched import evaluated_parts, evaluated_units
from gross_ray.run.store import RunStore
from gross_ray.search.options import SCORES
from gross_ray.search.scores import LAYER_COLUMN, Score, Smoothing, by_supernet, group_sizes

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    validated = [path.parents[1] for path in (ROOT / "results").glob("*/tables/validations")]
    parser.add_argument("runs", nargs="*", type=Path, default=sorted(path.resolve() for path in validated))
    for run in parser.parse_args().runs:
        compare(RunStore.open(run), run.name)


def compare(store: RunStore, name: str) -> None:
    """Print a line for each score of one run."""
    chosen, values = evaluations(store)
    own = store.read_table("validations").groupby("configuration")[["val_accuracy", "test_accuracy", "macs"]].mean()
    own = own[own.index.isin(chosen.index)]
    if len(own) < 5:
        return
    print(
        f"{name}: {len(own)} of {len(chosen)} configurations trained on their own, {values['mean'].shape[1]} supernets"
    )
    for what in SCORES:
        score = Score(what)
        measured = values[score.statistic]
        if not score.smoothed:
            line(what, pd.Series(score.of_supernets(measured), chosen.index), own)
            continue
        smoothing = Smoothing.of(chosen.to_numpy(), measured, score)
        scores, errors = smoothing.predict(chosen.to_numpy())
        best = scores.argmax()
        within = int((scores >= scores[best] - errors[best]).sum())
        sure = f"best {chosen.index[best]}, {within} within its standard error of {score.text(errors[best])}"
        line(what, pd.Series(scores, chosen.index), own, sure)
        ridged = ridge(chosen.to_numpy(), score.of_supernets(measured))
        line(f"{score.statistic}, ridge", pd.Series(ridged, chosen.index), own)


def evaluations(store: RunStore) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Return the group-sizes of the searched configurations, (N, L), and accuracies and losses, (N, K) each."""
    units, alpha = evaluated_units(store), store.experiment.supernet.alpha
    units = units[(units["alpha"] == alpha) & (units["seed"] < store.experiment.supernet.seeds)]
    columns = [name for name in store.read_units("configurations", units["unit"].tolist()[:1]) if LAYER_COLUMN in name]
    wanted = ["configuration", "seed", "val_accuracy", "val_loss", *columns]
    rows = pd.concat(evaluated_parts(store, wanted, units))
    seeds = np.unique(rows["seed"])
    accuracies, losses = (by_supernet(rows, Score(name), seeds) for name in ("mean", "loss"))
    first = rows.drop_duplicates("configuration").set_index("configuration")
    chosen = pd.DataFrame(group_sizes(first), first.index)
    return chosen, {"mean": accuracies, "median": accuracies, "loss": losses}


def ridge(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the values smoothed by a ridge regression, in its dual form.

    Two configurations with M equal layers have M equal one-hot features and M (M - 1) / 2 equal pairs.
    """
    equal = (chosen[:, None] == chosen[None]).sum(axis=-1)
    roots, vectors = np.linalg.eigh(equal + equal * (equal - 1) / 2)
    centred, best = values - values.mean(), (np.inf, values)
    for penalty in 10.0 ** np.arange(-3, 4, 0.25):
        hat = (vectors * (roots / (roots + penalty))) @ vectors.T
        left_out = (centred - hat @ centred) / (1 - np.diag(hat))
        best = min(best, (float((left_out**2).mean()), values.mean() + hat @ centred), key=lambda found: found[0])
    return best[1]


def line(what: str, scores: pd.Series, own: pd.DataFrame, sure: str = "") -> None:
    """Print the correlation and the regret of one score."""
    ours = scores[own.index]
    spearman = stats.spearmanr(ours, own["val_accuracy"]).statistic
    regrets = []
    for limit in sorted(own["macs"])[2:]:
        fitting = own[own["macs"] <= limit]
        regrets.append(fitting["test_accuracy"].max() - fitting["test_accuracy"][ours[fitting.index].idxmax()])
    print(f"  {what:16} Spearman {spearman:.2f}   mean regret {100 * np.mean(regrets):.3f} points   {sure}")


if __name__ == "__main__":
    main()
