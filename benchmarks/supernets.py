"""Effect of the ridge, the balance and nested starts: supernets fine-tuned alike from different decompositions.

    python benchmarks/supernets.py [--variants independent nested] [--seeds 3] [--epochs 1] [--lr 1e-3]

For each seed a four-conv network is trained (on full Fashion-MNIST, five epochs, stored under --cache), decomposed by
each variant, and fine-tuned with uniform sampling; then all 252 configurations are evaluated on the validation split.
The script prints a row for each finished supernet, and the mean and standard deviation over seeds for each variant.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from gross_ray import BlockTerms, Bottleneck, BTDOptions, SearchSpace, block_term_decomposition
from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import DivergedError
from gross_ray.experiment import DataOptions, Schedule
from gross_ray.models import build_model
from gross_ray.search.evaluator import evaluate_configurations
from gross_ray.supernet.build import build_supernet
from gross_ray.supernet.layers import decomposable_layers, default_group_sizes
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import finetune, train_network


@dataclass(frozen=True)
class Variant:
    """A way to compute the supernet's initial weights."""

    ridge: float = BTDOptions().ridge
    nested: bool = False
    balance: bool = True


VARIANTS = {
    "independent": Variant(),
    "nested": Variant(nested=True),
    "unbalanced": Variant(balance=False),
    "ridge=0": Variant(ridge=0.0),
    "ridge=0,nested": Variant(ridge=0.0, nested=True),
    "ridge=0,unbalanced": Variant(ridge=0.0, balance=False),
    "ridge=0.003": Variant(ridge=0.003),
    "ridge=0.05": Variant(ridge=0.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3], help="the paper's is 1e-4")
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--validation", type=int, default=0, help="images to evaluate on (0: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="folder for the trained base networks")
    parser.add_argument("--out", type=Path, help="CSV file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    splits = load_dataset(DataOptions(name=options.dataset, limit_validation=options.validation))
    rows = []
    for seed in range(options.seeds):
        network = _base(splits, seed, options.cache)
        for name in options.variants:
            bottlenecks, figures = _decompose(network, VARIANTS[name], seed)
            for lr in options.lr:
                supernet = build_supernet(network, bottlenecks)
                schedule = Schedule(epochs=options.epochs, lr=lr, augment="none")
                tuned = _tune(supernet, splits, schedule, seed)
                rows.append({"variant": name, "lr": lr, "seed": seed} | figures | tuned)
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
                if options.out:
                    pd.DataFrame(rows).to_csv(options.out, index=False)
    table = pd.DataFrame(rows).drop(columns="seed").groupby(["variant", "lr"], sort=False)
    print(table.agg(["mean", "std"]).round(4).to_string())


def _base(splits: Splits, seed: int, cache: Path | None) -> nn.Module:
    network = build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(seed))
    path = cache / f"base{seed}.pt" if cache else None
    if path is not None and path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    schedule = Schedule(epochs=5, lr=0.05, milestones=(3,), augment="none")
    train_network(network, splits, schedule, seed=seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    return network


def _decompose(network: nn.Module, variant: Variant, seed: int) -> tuple[dict[str, list[Bottleneck]], dict[str, float]]:
    bottlenecks: dict[str, list[Bottleneck]] = {}
    errors, cancellations = [], []
    for name, conv in decomposable_layers(network).items():
        start = None
        bottlenecks[name] = []
        for size in default_group_sizes(conv.in_channels):
            terms = block_term_decomposition(
                conv.weight, size, options=BTDOptions(ridge=variant.ridge), start=start, seed=seed
            )
            start = terms if variant.nested else None
            errors.append(terms.relative_error)
            cancellations.append(terms.cancellation)
            bottlenecks[name].append(terms.to_bottleneck() if variant.balance else _unbalanced(terms))
    figures = {"mean_error": sum(errors) / len(errors), "worst_cancellation": max(cancellations)}
    return bottlenecks, figures


def _unbalanced(terms: BlockTerms) -> Bottleneck:
    """Return the terms with all their scale in the grouped convolution."""
    groups, size, _, *kernel = terms.core.shape
    channels = groups * size
    return Bottleneck(
        pointwise_in=terms.factor_in.transpose(1, 2).reshape(channels, channels, 1, 1),
        grouped=terms.core.transpose(1, 2).reshape(channels, size, *kernel),
        pointwise_out=terms.factor_out.transpose(0, 1).reshape(-1, channels, 1, 1),
    )


def _tune(supernet: nn.Module, splits: Splits, schedule: Schedule, seed: int) -> dict[str, float]:
    sampler = ConfigurationSampler(SearchSpace.of(supernet), alpha=0.0)
    try:
        history = finetune(supernet, splits, schedule, seed=seed, sampler=sampler)
    except DivergedError:
        return dict.fromkeys(("first_loss", "mean_accuracy", "worst_accuracy"), float("nan")) | {"diverged": 1}
    found = evaluate_configurations(supernet, splits.validation.images, splits.validation.labels)["accuracy"]
    return {
        "first_loss": history[0].train_loss,
        "mean_accuracy": found.mean(),
        "worst_accuracy": found.min(),
        "diverged": 0,
    }


if __name__ == "__main__":
    main()
