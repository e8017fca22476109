"""Training the base network: the resident loop against the usual one.

    python benchmarks/training.py [--images 3000] [--threads 2]

Baseline, in the same run: a DataLoader in the main process with torchvision's transforms (pad and crop, flip,
normalise) on PIL images, the same network, optimiser and number of steps. Both are run three times in turn; the
medians of the images a second and their ratio are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from gross_ray.data.images import ImageSet, Splits, load_dataset
from gross_ray.experiment import DataOptions, Schedule
from gross_ray.models import build_model
from gross_ray.training.stages import train_network

BATCH = 128


class _Pictures(Dataset):
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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    splits = load_dataset(DataOptions(limit_train=options.images, limit_validation=100))
    pictures = _Pictures(splits.train)
    rates: dict[str, list[float]] = {"usual": [], "resident": []}
    for _ in range(3):
        rates["usual"].append(_usual(pictures))
        rates["resident"].append(_resident(splits))
    usual, resident = (statistics.median(rates[name]) for name in ("usual", "resident"))
    print(f"four-conv, one epoch of {options.images} images, {options.threads} threads, torch {torch.__version__}, n=3")
    print(
        f"usual loop: {usual:.0f} images/s    resident loop: {resident:.0f} images/s    ratio: {resident / usual:.2f}"
    )


def _network() -> torch.nn.Module:
    return build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))


def _usual(pictures: _Pictures) -> float:
    network = _network().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    started = time.perf_counter()
    for inputs, labels in DataLoader(pictures, batch_size=BATCH, shuffle=True):
        loss = F.cross_entropy(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(pictures) / (time.perf_counter() - started)


def _resident(splits: Splits) -> float:
    schedule = Schedule(epochs=1, lr=0.01, batch_size=BATCH)
    return train_network(_network(), splits, schedule, seed=0)[0].images_per_second


if __name__ == "__main__":
    main()
