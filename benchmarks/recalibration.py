"""Measure what batch-norm statistics of its own are worth to a configuration in a supernet.

    python benchmarks/recalibration.py RUN [--configurations 30] [--images 5000]

RUN is a finished run of a network with batch-norm. Its validated configurations, and further ones drawn evenly over
the MACs, are evaluated on validation images in each of its supernets: with statistics of their own
(engine.recalibrate), and with the statistics of the supernet, the baseline. Printed are the mean accuracies, and for
both the rank correlation with the accuracy of the configurations trained on their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from gross_ray.data.images import load_dataset
from gross_ray.nn.batch_norm import calibration_images, has_statistics
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.evaluator import Evaluator
from gross_ray.space import Configuration
from pipelines.stages import supernets
from pipelines.stages.validate import drawn_configurations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--configurations", type=int, default=30)
    parser.add_argument("--images", type=int, default=0, help="validation images to evaluate on (0: all)")
    options = parser.parse_args()
    run = Run(RunStore.open(options.run))
    if not any(map(has_statistics, run.base.network.modules())):
        raise SystemExit(f"{options.run}: its network has no batch-norm statistics")
    own = run.store.read_table("validations").groupby("configuration")["val_accuracy"].mean()
    validated = [Configuration.parse(name) for name in own.index]
    wanted = max(options.configurations - len(validated), 0)
    configurations = [*validated, *drawn_configurations(run, wanted, validated)]
    splits = load_dataset(run.experiment.data)
    images = splits.validation.first(options.images or len(splits.validation))
    with_own, without = np.zeros((2, len(configurations)))
    units = supernets.searched(run)
    for unit in units:
        evaluator = Evaluator(run.supernet("finetune", unit.name).eval(), normalisation=images.normalisation)
        for found, calibration in ((with_own, calibration_images(splits.train)), (without, None)):
            correct, _ = evaluator.evaluate(images.images, images.labels, configurations, calibration)
            found += correct.numpy() / len(images) / len(units)
    table = pd.DataFrame({"with": with_own, "without": without}, index=[str(one) for one in configurations])
    print(f"{options.run.name}: {len(table)} configurations, {len(units)} supernets, {len(images):,} validation images")
    for name, accuracies in table.items():
        spearman = stats.spearmanr(accuracies[own.index], own).statistic
        print(
            f"  {name:8} statistics of their own: mean {100 * accuracies.mean():.2f} %, "
            f"{100 * accuracies.min():.2f} to {100 * accuracies.max():.2f} %; Spearman with the accuracy on its own of "
            f"{len(own)} configurations {spearman:.2f}"
        )
    gain = 100 * (table["with"] - table["without"])
    print(f"  gain: {gain.mean():.2f} points on average, {gain.min():.2f} to {gain.max():.2f}")


if __name__ == "__main__":
    main()
