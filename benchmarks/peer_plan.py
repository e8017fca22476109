"""The trainings of `benchmarks/peers.py` in one folder: which are missing, and each of them."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from peer_decisions import METHODS, NARROWER, UNIFORM, Bench, Decision
from peer_table import FULL, MORE, NETWORKS, OURS, ROWS, chosen_rate, read, write

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.defaults import augmentation_for
from gross_ray.errors import DivergedError
from gross_ray.experiment import Experiment
from gross_ray.export import export_weights
from gross_ray.models import build_model
from gross_ray.run.opened import Run
from gross_ray.run.pins import check_data
from gross_ray.run.store import RunStore
from gross_ray.seeds import derive_seed
from gross_ray.training.loop import accuracy
from gross_ray.training.options import Schedule
from gross_ray.training.stages import train_network
from gross_ray.weights import load_weights

SETTINGS = {
    "four-conv": (),
    "resnet20": (
        "data.validation_from=test",  # those who trained it have seen all training images
        "data.mean=[0.485,0.456,0.406]",
        "data.std=[0.229,0.224,0.225]",
    ),
}
"""The networks, and how their images are read."""
_PINNED = ("network", "weights", "data", "set", "budgets", "epochs", "images", "effort", "base_images")
"""The options in which two commands on one folder must not differ."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of one network."""

    decision: Decision
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.decision.method},{self.decision.budget},lr={self.lr:g},seed={self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The trainings of one folder."""

    out: Path
    asked: argparse.Namespace
    beyond: set[str] = field(default_factory=set)
    """Budgets and methods for which this process has found no network."""

    @cached_property
    def bench(self) -> Bench:
        """The trained network and its images; the weights are read from OUT once they are there."""
        asked = self.asked
        settings = [*SETTINGS[asked.network], *asked.set]
        of_data = [setting for setting in settings if setting.startswith("data.")]
        splits = load_dataset(Experiment(data=DataOptions(name=asked.data)).override(of_data).data)
        weights = self.out / "base.safetensors"
        network = build_model(
            asked.network,
            num_classes=len(splits.classes),
            image_size=splits.train.images.shape[-1],
            generator=torch.Generator().manual_seed(0),
        )
        if weights.exists():
            load_weights(network, weights)
        elif asked.miniature:
            train_network(network, splits, Schedule(epochs=1, lr=0.01, images=asked.base_images), seed=0)
        elif asked.weights.is_dir():
            store = RunStore.open(asked.weights)
            check_data(store, splits)
            network = Run(store).base.network
        else:
            load_weights(network, asked.weights)
        if not weights.exists():
            export_weights(network, weights)
        return Bench(
            name=asked.network,
            base=network.eval(),
            splits=splits,
            data=asked.data,
            weights=weights,
            budgets=asked.budgets,
            out=self.out / OURS,
            effort=asked.effort,
            settings=settings,
            repeats=asked.repeats,
            roundings=asked.roundings,
            steps=asked.steps,
        )

    @cached_property
    def methods(self) -> list[str]:
        """The methods, ours first: those with + need its decision."""
        if self.asked.methods:
            return sorted(self.asked.methods, key=lambda method: method != OURS)
        own = [method for method in METHODS if method != NARROWER or self.asked.network == "four-conv"]
        return [*own, *(method + MORE for method in own if method not in (OURS, UNIFORM))]

    def pin(self) -> None:
        """Store the options that define the trainings, or compare them with the stored ones."""
        self.out.mkdir(parents=True, exist_ok=True)
        if any(method.startswith(NARROWER) for method in self.methods):
            if self.asked.network != "four-conv":
                raise SystemExit(f"--methods {NARROWER}: only for four-conv, whose initial weights it can draw")
            if not self._base_images:
                raise SystemExit(f"{NARROWER}: say with --base-images on how many images the base network was trained")
        pinned = {name: getattr(self.asked, name) for name in _PINNED}
        pinned["weights"] = None if self.asked.weights is None else str(self.asked.weights.absolute())
        path = self.out / "peers.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            for name in (name for name in _PINNED if stored[name] != pinned[name]):
                raise SystemExit(
                    f"{self.out} was made with {name} = {stored[name]}, not {pinned[name]}: name another folder"
                )
            return
        with whole_or_not_at_all(path) as partial:
            partial.write_text(json.dumps(pinned, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def _base_images(self) -> int:
        """The images that the base network was trained on, from its run folder or as the user says."""
        asked = self.asked
        if asked.base_images or asked.weights is None or not asked.weights.is_dir():
            return int(asked.base_images)
        experiment = RunStore.open(asked.weights).experiment
        if not experiment.trains_base or experiment.weights:
            return 0
        return experiment.training.epochs * experiment.training.images_of(len(self.bench.splits.train))

    @property
    def _rows(self) -> pd.DataFrame:
        return read([self.out], ROWS)

    def decision(self, method: str, budget: str) -> Decision | None:
        """Return a stored decision, or decide and store it; None if no network is within the budget."""
        unit = _unit(method, budget)
        path = self.out / "tables" / NETWORKS / f"{unit}.parquet"
        if not path.exists():
            found = None if unit in self.beyond else self.bench.decide(method.removesuffix(MORE), budget)
            if found is None:
                if unit not in self.beyond:
                    print(f"{budget} {method}: no network is within the budget", flush=True)
                self.beyond.add(unit)
                return None
            if line := self.bench.off_budget(found):
                print(line, flush=True)
            write(self.out, NETWORKS, unit, asdict(found))
        (row,) = pd.read_parquet(path).to_dict("records")
        return replace(Decision(**row), method=method)

    def left(self) -> int:
        """Return the number of trainings that are not stored, without those whose budget no network keeps."""
        rates, seeds = len(self.asked.rates), self.asked.seeds
        each = rates * seeds if self.asked.all_seeds else rates + seeds - 1
        return sum(
            max(each - len([*self._folder.glob(f"{method},{budget},lr=*.parquet")]), 0)
            for method, budget in self._cells
            if _unit(method, budget) not in self.beyond
        )

    @property
    def _folder(self) -> Path:
        return self.out / "tables" / ROWS

    @property
    def _cells(self) -> list[tuple[str, str]]:
        return [(method, budget) for method in self.methods for budget in self.asked.budgets]

    def trainings(self, deadline: float = math.inf) -> Iterator[Training]:
        """Yield the trainings that are not stored: first every rate with seed 0, then the other seeds.

        Each is stored before the next is asked for, because the best rate follows from the stored rows. After
        `deadline`, a time of time.perf_counter, nothing more is decided or trained.
        """
        if not (self._folder / f"{FULL}.parquet").exists():
            self._store_full()
        for seeds in (range(1), range(1, self.asked.seeds)):
            for method, budget in self._cells:
                if time.perf_counter() > deadline:
                    return
                decision = self.decision(method, budget)
                if decision is None:
                    continue
                rates = self.asked.rates if self.asked.all_seeds or 0 in seeds else [self._best_rate(decision)]
                for one in (Training(decision=decision, lr=lr, seed=seed) for seed in seeds for lr in rates):
                    if (self._folder / f"{one.name}.parquet").exists():
                        continue
                    if time.perf_counter() > deadline:
                        return
                    yield one

    def _best_rate(self, decision: Decision) -> float:
        rows = self._rows
        same = (rows["method"] == decision.method) & (rows["budget"] == decision.budget)
        return chosen_rate(rows[same & rows["lr"].isin(self.asked.rates)])

    def schedule(self, decision: Decision, lr: float) -> Schedule:
        """Return the schedule of a training: the same for all, but longer for + and for new weights."""
        number = len(self.bench.splits.train)
        in_epoch = min(self.asked.images or number, number)
        epochs = self.asked.epochs
        if decision.method.endswith(MORE):
            ours = self.decision(OURS, decision.budget)
            assert ours is not None  # ours finds a network, or the command fails
            epochs += math.ceil(ours.decision_images / in_epoch)
        if decision.method.startswith(NARROWER):
            epochs += math.ceil(self._base_images / in_epoch)
        late = sorted({round(epochs * share) for share in (0.6, 0.85)} - {0, epochs})  # as gross compress has them
        return Schedule(
            epochs=epochs,
            lr=lr,
            milestones=tuple(late),
            batch_size=128,
            images=self.asked.images,
            augment=self._augment,
        )

    @cached_property
    def _augment(self) -> str:
        return augmentation_for(self.bench.base, self.bench.splits.validation)

    def train(self, one: Training) -> str:
        """Do and store one training, and return a line about it. A training that diverges has no accuracies."""
        started = time.perf_counter()
        splits, decision = self.bench.splits, one.decision
        network = self.bench.build(decision, one.seed)
        schedule = self.schedule(decision, one.lr)
        validation = test = math.nan
        try:
            train_network(network, splits, schedule, seed=derive_seed(one.seed, "peers"))
            validation, test = accuracy(network, splits.validation), accuracy(network, splits.test)
        except DivergedError as error:
            print(f"{one.name}: {error}", file=sys.stderr, flush=True)
        images = schedule.epochs * schedule.images_of(len(splits.train))
        minutes = (time.perf_counter() - started) / 60
        self._store(one, validation, test, images, minutes)
        where = f"{self.asked.network} {decision.budget} {decision.method} rate {one.lr:g} seed {one.seed}"
        return f"{where}: validation {validation:.4f}, test {test:.4f}, {minutes:.1f} min"

    def _store_full(self) -> None:
        full, splits = self.bench.full(), self.bench.splits
        one = Training(decision=full, lr=0.0, seed=0)
        found = accuracy(self.bench.base, splits.validation), accuracy(self.bench.base, splits.test)
        self._store(one, *found, self._base_images, 0.0, name=FULL)

    def _store(
        self, one: Training, validation: float, test: float, images: int, minutes: float, name: str = ""
    ) -> None:
        decision = one.decision
        costs = ("macs", "parameters", "ort_ms_1", "ort_ms_64", "full_ort_ms_1", "decision_images")
        row = {
            "network": decision.network,
            "method": decision.method,
            "budget": decision.budget,
            "seed": one.seed,
            "lr": one.lr,
            "val_accuracy": validation,
            "test_accuracy": test,
            "train_images": images,
            "minutes": minutes,
        }
        write(self.out, ROWS, name or one.name, row | {cost: getattr(decision, cost) for cost in costs})


def _unit(method: str, budget: str) -> str:
    """Return the name of a decision, which a method and its longer training share."""
    return f"{method.removesuffix(MORE)},{budget}"
