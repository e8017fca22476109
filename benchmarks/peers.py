"""What else one would pick: ours beside pruning, Tucker-2 and a narrower network, from one trained network each.

    python benchmarks/peers.py run OUT --network resnet20 --weights FILE --data parquet:FOLDER [--minutes 120]
    python benchmarks/peers.py table OUT [OUT ...]           the table, from the stored rows alone
    python benchmarks/peers.py picture OUT --to FILE.html    accuracy over milliseconds
    python benchmarks/peers.py --miniature                   all of it in small, in a minute

The baselines are the peers. For each budget, each method decides what to cut. Then the whole network is trained with
each learning rate, on the same number of images in the same batches for all methods. The rate of the highest accuracy
on the validation split is repeated with the other seeds (--all-seeds repeats every rate). Methods:

    ours               the configuration that `gross compress` selects, decomposed anew, each layer in the form that the
                       command writes; the command runs in OUT/ours, with one supernet for all budgets
    ours-uniform       the largest group-size within the budget, the same in all layers
    pruning-magnitude  Torch-Pruning, global, by group magnitude
    pruning-taylor     the same by the group Taylor importance, from gradients on 1,024 training images
    tucker             Tucker-2 by TensorLy; each layer keeps the same share of its energy
    narrower           four-conv with fewer channels and new weights, trained on as many images as the base network
                       (--base-images; known if --weights is a run folder that trained it) and then as the others

Under a budget of time, pruning, tucker and narrower try channels or ranks in multiples of 1, 4 and 8, and the network
with the most MACs counts. A method with + trains on as many more images as ours needed for its decision, rounded up to
whole epochs: the images of its supernet and of the candidates (column decision_images).

A budget like macs=60% or ort_ms=60% is a share of the full network's MACs, or of its time in ONNX Runtime (one image,
one thread). Each training is a file in OUT/tables/peers, each decision one in OUT/tables/peer_networks, and a repeated
command does only what is missing. --weights takes a file, or a run folder whose base network is compared, for example
one that `gross train` adapted to the images.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peer_decisions import MACS, METHODS, ROUNDINGS, STEPS, TAYLOR, TIME, cost_of
from peer_plan import SETTINGS, Plan
from peer_table import MORE, ROWS, picture, read, table_text

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.errors import GrossRayError

BUDGETS = ("macs=60%", "macs=40%", "ort_ms=60%", "ort_ms=50%")
RATES = (0.05, 0.02, 0.01, 0.005)
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
    if len(folders) > 1:
        raise SystemExit(f"{' '.join(map(str, folders))}: a picture shows one network; name its folder alone")
    with whole_or_not_at_all(to) as partial:
        picture(_stored(folders)).write_html(partial)


def _stored(folders: Sequence[Path]) -> pd.DataFrame:
    rows = read(folders, ROWS)
    if rows.empty:
        raise SystemExit(f"{' '.join(map(str, folders))}: no training is stored there; run `peers.py run` first")
    if rows.duplicated(["network", "budget", "method", "lr", "seed"]).any():
        raise SystemExit(f"{' '.join(map(str, folders))}: a training is stored twice; name one folder of each network")
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
    for one in plan.trainings(deadline):
        line = plan.train(one)
        print(f"[{plan.left()} left] {line}", flush=True)
    if left := plan.left():
        print(f"the time is over: {left} trainings left; the same command again continues", flush=True)
    else:
        print(f"all trainings are stored in {out}", flush=True)


if __name__ == "__main__":
    main()
