"""Training the base network: the resident loop against the usual PyTorch loop.

    python benchmarks/training.py [--images 3000] [--threads 2]
    python benchmarks/training.py --device cuda --dataset fashion-mnist --images 40000 --batch 256 --workers 8 --capture
    python benchmarks/training.py --accuracy [--seeds 5] [--epochs 3] [--dataset fashion-mnist]

Baseline, in the same run: a DataLoader (in the main process, or with `--workers` processes) with torchvision's
transforms (pad and crop, flip, normalise) on PIL images, the same network, optimiser and number of steps. Both loops
run three times, alternating; the script prints the median images per second and their ratio. `--capture`, `--precision`
and `--compile` apply to the resident loop. With `--accuracy`, both loops train a network for each seed, and their
validation accuracies are compared (Welch's t-test).
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from scipy import stats
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions, EngineOptions, Schedule
from gross_ray.models import build_model
from gross_ray.training.loop import accuracy
from gross_ray.training.stages import train_network


class Pictures(Dataset):
    """Images of a set as PIL images, transformed by torchvision one by one: what the usual loop reads."""

    def __init__(self, images: ImageSet) -> None:
        self.pictures = [transforms.functional.to_pil_image(image) for image in images.images]
        self.labels = images.labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=2),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.225] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.pictures[index]), self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accuracy", action="store_true", help="compare the accuracies of the loops, not their speed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dataset", default="sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0, help="processes of the usual loop's DataLoader")
    parser.add_argument(
        "--epochs-ours", type=int, default=1, help="epochs of the resident loop; with several, the first is not counted"
    )
    parser.add_argument("--capture", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limits = {"limit_train": options.images, "limit_validation": 0 if options.accuracy else 100}
    splits = load_dataset(DataOptions(name=options.dataset, **limits))
    if options.accuracy:
        _accuracies(splits, options)
        return
    pictures, splits = Pictures(splits.train), _on(splits, options.device)
    engine = EngineOptions(precision=options.precision, compile=options.compile, capture=options.capture)
    one = Schedule(epochs=1, lr=0.01, batch_size=options.batch)
    ours = replace(one, epochs=options.epochs_ours)
    rates: dict[str, list[float]] = {"usual": [], "resident": []}
    for _ in range(3):
        rates["usual"].append(usual_rate(pictures, _network().to(options.device), one, options))
        rates["resident"].append(_resident(splits, ours, engine))
    usual, resident = (statistics.median(rates[name]) for name in ("usual", "resident"))
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(
        f"four-conv, one epoch of {options.images} images, batches of {options.batch}, {where}, "
        f"torch {torch.__version__}, n=3, {engine}"
    )
    print(
        f"usual loop ({options.workers} workers): {usual:.0f} images/s    resident loop: {resident:.0f} images/s    "
        f"ratio: {resident / usual:.2f}"
    )


def _on(splits: Splits, device: str) -> Splits:
    parts = (splits.train, splits.validation, splits.test)
    return Splits(splits.name, *(part.to(device) for part in parts), splits.classes)


def _accuracies(splits: Splits, options: argparse.Namespace) -> None:
    pictures = Pictures(splits.train)
    found: dict[str, list[float]] = {"usual": [], "resident": []}
    schedule = Schedule(epochs=options.epochs, lr=0.02, batch_size=options.batch)
    for seed in range(options.seeds):
        network = _network(seed)
        torch.manual_seed(seed)
        usual_rate(pictures, network, schedule, options)
        found["usual"].append(100 * accuracy(network, splits.validation))
        network = _network(seed)
        train_network(network, splits, schedule, seed=seed)
        found["resident"].append(100 * accuracy(network, splits.validation))
    for name, percent in found.items():
        each = ", ".join(f"{one:.2f}" for one in percent)
        print(f"{name} loop: mean {statistics.mean(percent):.2f} (std {statistics.stdev(percent):.2f}) % of {each}")
    test = stats.ttest_ind(found["usual"], found["resident"], equal_var=False)
    run = f"{options.epochs} epochs of {len(splits.train)} images, {len(splits.validation)} of validation"
    print(f"{run}: if the means were equal, they would differ as much with p = {test.pvalue:.2f}")


def _network(seed: int = 0) -> torch.nn.Module:
    return build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(seed))


def usual_rate(pictures: Pictures, network: torch.nn.Module, schedule: Schedule, options: argparse.Namespace) -> float:
    """Train with the usual loop; return the images per second of an epoch, but of the first only if it is the only one.

    Of `options` it reads `device` and `workers`, the DataLoader's processes, which start in the first epoch.
    """
    network.train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay
    )
    loader = DataLoader(
        pictures,
        batch_size=schedule.batch_size,
        shuffle=True,
        num_workers=options.workers,
        pin_memory=options.device == "cuda",
        persistent_workers=options.workers > 0,
        timeout=60 if options.workers else 0,
    )
    rates = []
    for _ in range(schedule.epochs):
        started = time.perf_counter()
        for inputs, labels in loader:
            logits = network(inputs.to(options.device, non_blocking=True))
            loss = F.cross_entropy(logits, labels.to(options.device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if options.device == "cuda":
            torch.cuda.synchronize()
        rates.append(len(pictures) / (time.perf_counter() - started))
    return statistics.median(rates[1:] or rates)


def _resident(splits: Splits, schedule: Schedule, engine: EngineOptions) -> float:
    history = train_network(_network().to(splits.train.device), splits, schedule, seed=0, engine=engine)
    return statistics.median(epoch.images_per_second for epoch in history[1:] or history)


if __name__ == "__main__":
    main()
