"""What else one would pick: ours beside pruning, Tucker-2 and a narrower network, from one trained network each.

    python benchmarks/peers.py run OUT --network resnet20 --weights FILE --data parquet:FOLDER [--minutes 120]
    python benchmarks/peers.py table OUT [OUT ...]           the table, from the stored rows alone
    python benchmarks/peers.py picture OUT --to FILE.html    accuracy over milliseconds
    python benchmarks/peers.py --miniature                   all of it in small, in a minute

The baseline is every peer. For each budget, each method decides what to cut; then its whole network is trained, for
the same number of images in the same batches, with each learning rate of one grid. The rate of the highest accuracy on
the validation split is repeated with the other seeds (--all-seeds: every rate is). Methods:

    ours               the configuration that `gross compress` selects, with one supernet for all budgets in OUT/ours,
                       decomposed anew, with the dense layers that the command writes
    ours-uniform       the largest group-size of all layers that fits; of a budget of time too, where a smaller
                       group-size may be slower
    pruning-magnitude  Torch-Pruning, global, group magnitude; channels in multiples of 1, 4 and 8 under a budget of
    pruning-taylor     time, of which the network with the most MACs counts; the same with the group Taylor importance
    tucker             Tucker-2 by TensorLy: each layer keeps the same share of the energy; ranks rounded as above
    narrower           four-conv with fewer channels, from new weights, for as many images as the base network had
                       (--base-images; known if --weights is a run folder) and those of the others

A method with + trains on as many more images as ours took to decide: its supernet's and the candidates' (column
decision_images), in whole epochs. Each training is one file in OUT/tables/peers, each decision one in
OUT/tables/peer_networks, and a repeated command does only what is missing. A budget like macs=60% or ort_ms=60% is a
share of the full network's MACs, or of its time in ONNX Runtime (one image, one thread).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peer_decisions import (
    MACS,
    METHODS,
    MORE,
    NARROWER,
    OURS,
    ROUNDINGS,
    STEPS,
    TAYLOR,
    TIME,
    UNIFORM,
    Bench,
    Decision,
    cost_of,
)
from peer_table import FULL, NETWORKS, ROWS, chosen_rate, picture, read, table_text, write

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.defaults import augmentation_for
from gross_ray.errors import DivergedError, GrossRayError
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
BUDGETS = ("macs=60%", "macs=40%", "ort_ms=60%", "ort_ms=50%")
RATES = (0.05, 0.02, 0.01, 0.005)
_PINNED = ("network", "data", "set", "epochs", "images", "effort", "base_images")
"""The options in which two commands on one folder must not differ."""
MINIATURE: dict[str, Any] = {
    "network": "four-conv",
    "data": "sample",
    "effort": "quick",
    "methods": [*METHODS, TAYLOR + MORE],
    "budgets": ["macs=60%", "ort_ms=150%"],
    "rates": [0.02, 0.01],
    "seeds": 2,
    "epochs": 1,
    "images": 64,
    "base_images": 64,
    "threads": 1,
    "repeats": 2,
    "roundings": {MACS: (1,), TIME: (8,)},
    "steps": {MACS: 8, TIME: 1},
    "set": [
        *("data.limit_train=128", "data.limit_validation=50", "data.limit_test=50"),
        *("decomposition.max_steps=3", "search.top=1", "search.form=dense"),
        *("reconstruction.lr=1e-3", "finetuning.lr=1e-3", "finetuning.epochs=1", "finetuning.milestones=[]"),
        *("validation.reconstruction.lr=1e-3", "validation.finetuning.lr=1e-3"),
    ],
}
"""The options of --miniature: no learning rate is left to a range test, and any time is within the budget."""


def main(words: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(words)
    try:
        if asked.miniature:
            with tempfile.TemporaryDirectory() as folder:
                out = asked.out[0] if asked.out else Path(folder)
                vars(asked).update(MINIATURE)
                run(asked, out)
                show([out])
            return
        if not asked.out:
            raise SystemExit(f"{asked.command}: name the folder of the results")
        if asked.command == "table":
            show(asked.out)
        elif asked.command == "picture":
            draw(asked.out, asked.to)
        else:
            run(asked, asked.out[0])
    except GrossRayError as error:
        raise SystemExit(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["run", "table", "picture"], default="run")
    parser.add_argument("out", nargs="*", type=Path, help="folder of the results")
    parser.add_argument("--network", choices=list(SETTINGS))
    parser.add_argument("--weights", type=Path, help="trained weights, or a run folder with a trained base network")
    parser.add_argument("--data", help="images, as for gross")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting of gross compress")
    parser.add_argument("--effort", default="normal", help="effort of gross compress")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *(each + MORE for each in METHODS[2:])])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--all-seeds", action="store_true", help="every rate with every seed, not the best one alone")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=0, help="training images in an epoch [all]")
    parser.add_argument("--base-images", type=int, default=0, help="images that the base network was trained on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no training after so many minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15, help="rounds of each timing")
    parser.add_argument("--to", type=Path, help="file of the picture, .html")
    parser.add_argument("--miniature", action="store_true")
    parser.set_defaults(roundings=ROUNDINGS, steps=STEPS)
    return parser


def show(folders: Sequence[Path]) -> None:
    """Print the table of stored rows."""
    print(table_text(_stored(folders)))


def draw(folders: Sequence[Path], to: Path | None) -> None:
    """Write the picture of stored rows."""
    if to is None or to.suffix != ".html":
        raise SystemExit(f"--to {to}: name a file that ends in .html")
    with whole_or_not_at_all(to) as partial:
        picture(_stored(folders)).write_html(partial)


def _stored(folders: Sequence[Path]) -> pd.DataFrame:
    rows = read(folders, ROWS)
    if rows.empty:
        raise SystemExit(f"{' '.join(map(str, folders))}: no training is stored there; run `peers.py run` first")
    return rows


def run(asked: argparse.Namespace, out: Path) -> None:
    """Do the missing decisions and trainings, until the time is over, and print what is left."""
    for option in ("network", "data", "weights"):
        if getattr(asked, option) is None and not (asked.miniature and option == "weights"):
            raise SystemExit(f"run: --{option} is missing")
    for budget in asked.budgets:
        cost_of(budget)
    torch.set_num_threads(asked.threads)
    deadline = time.perf_counter() + 60 * asked.minutes
    plan = Plan(out=out, asked=asked)
    plan.pin()
    left = plan.left()
    for one in plan.trainings():
        if time.perf_counter() > deadline:
            print(f"the time is over: {left} trainings left; the same command again continues", flush=True)
            return
        left -= 1
        print(f"[{left} left] {plan.train(one)}", flush=True)
    print(f"all trainings are stored in {out}", flush=True)


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
        data = Experiment(model=asked.network, data=DataOptions(name=asked.data)).override(of_data)
        splits = load_dataset(data.data)
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
            data=data,
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
        if any(method.startswith(NARROWER) for method in self.methods):
            if self.asked.network != "four-conv":
                raise SystemExit(f"--methods {NARROWER}: only for four-conv, whose initial weights it can draw")
            if not self._base_images:
                raise SystemExit(f"{NARROWER}: say with --base-images on how many images the base network was trained")
        pinned = {name: getattr(self.asked, name) for name in _PINNED}
        self.out.mkdir(parents=True, exist_ok=True)
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
        unit = f"{method.removesuffix(MORE)},{budget}"
        path = self.out / "tables" / NETWORKS / f"{unit}.parquet"
        if not path.exists():
            found = None if unit in self.beyond else self.bench.decide(method.removesuffix(MORE), budget)
            if found is None:
                self.beyond.add(unit)
                return None
            if line := self.bench.off_budget(found):
                print(line, flush=True)
            write(self.out, NETWORKS, unit, asdict(found))
        (row,) = pd.read_parquet(path).to_dict("records")
        return replace(Decision(**row), method=method)

    def left(self) -> int:
        """Return the number of trainings that are not stored, if each budget can be kept."""
        each = len(self.asked.rates) * self.asked.seeds
        each = each if self.asked.all_seeds else len(self.asked.rates) + self.asked.seeds - 1
        wanted = each * len(self.methods) * len(self.asked.budgets)
        rows = self._rows
        if rows.empty:
            return wanted
        here = rows["method"].isin(self.methods) & rows["budget"].isin(self.asked.budgets)
        return max(wanted - int(here.sum()), 0)

    def trainings(self) -> Iterator[Training]:
        """Yield the trainings that are not stored: first every rate with seed 0, then the other seeds.

        Each is stored before the next is asked for, because the best rate follows from the stored rows.
        """
        if not (self.out / "tables" / ROWS / f"{FULL}.parquet").exists():
            self._store_full()
        cells = [(method, budget) for method in self.methods for budget in self.asked.budgets]
        for seeds in (range(1), range(1, self.asked.seeds)):
            for method, budget in cells:
                decision = self.decision(method, budget)
                if decision is None:
                    print(f"{budget} {method}: no network is within the budget", flush=True)
                    continue
                rates = self.asked.rates if self.asked.all_seeds or 0 in seeds else [self._best_rate(decision)]
                for seed in seeds:
                    for lr in rates:
                        one = Training(decision=decision, lr=lr, seed=seed)
                        if not (self.out / "tables" / ROWS / f"{one.name}.parquet").exists():
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


if __name__ == "__main__":
    main()
