"""Run folders with tables as a finished search leaves them, of any size, made without training anything."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from gross_ray.presets import preset
from gross_ray.run.store import RunStore

FOUR_CONV = {"conv2": (1, 2, 4, 8, 16, 32), "conv3": (1, 2, 4, 8, 16, 32), "conv4": (1, 2, 4, 8, 16, 32, 64)}
"""252 configurations."""
DEEP = {f"features.{place}": (1, 4) for place in range(8)}
"""256 configurations."""
TEMPERATURES = ((0.0, "index"), *((alpha, scaling) for scaling in ("index", "normalised") for alpha in (2.0, 4.0, 8.0)))
FIXED = ("32-32-32", "16-16-16", "4-4-4", "1-1-1")
SELECTED = {"16-16-16": ("8-16-16", "2-16-16"), "4-4-4": ("8-1-4", "1-2-4")}
SEARCHED = ["supernet.alpha=4.0", "supernet.scaling=normalised", "search.score=median"]
SETTINGS = ["supernet.seeds=5", "search.top=2", "training.seeds=5"]
SETTINGS += ["sweep.alphas=[0,2,4,8]", 'sweep.scalings=["index","normalised"]', "sweep.seeds=5"]
SHARD = 20_000


def new_run(folder: Path, settings: Sequence[str] = SETTINGS) -> RunStore:
    return RunStore.create(folder, preset("quickstart").override([*SEARCHED, *settings]))


def macs_of(sizes: Sequence[int]) -> int:
    return 1_800_050 + sum((9_216, 18_432, 20_000)[place % 3] * size for place, size in enumerate(sizes))


def write_configurations(
    store: RunStore,
    layers: Mapping[str, Sequence[int]] = FOUR_CONV,
    temperatures: Sequence[tuple[float, str]] = ((4.0, "normalised"),),
    seeds: int = 5,
    *,
    latency: bool = False,
    limit: int | None = None,
) -> None:
    """Every configuration in supernets whose accuracy grows with the group-sizes, less so at a high alpha."""
    if latency:
        write_measurement(store)
    space = list(itertools.islice(itertools.product(*layers.values()), limit))
    most = sum(math.log2(max(sizes)) for sizes in layers.values())
    for (alpha, scaling), seed in itertools.product(temperatures, range(seeds)):
        noise = random.Random(f"{alpha} {scaling} {seed}")
        supernet = f"alpha={alpha:g},scaling={scaling},seed={seed}"
        for start in range(0, len(space), SHARD):
            rows = []
            for sizes in space[start : start + SHARD]:
                level = sum(map(math.log2, sizes)) / most
                correct = round(10_000 * (0.79 + 0.045 * level**0.7 - 0.004 * (alpha - 4) * (level - 0.5)))
                correct += noise.randint(-60, 60)
                macs = macs_of(sizes)
                rows.append(
                    {"supernet": supernet, "alpha": alpha, "scaling": scaling, "seed": seed}
                    | {"configuration": "-".join(map(str, sizes)), "macs": macs, "macs_paper": macs - 700_000}
                    | {f"layer {name}": size for name, size in zip(layers, sizes, strict=True)}
                    | {"parameters": macs // 40 + 10_000 - sizes[0] * 3, "val_correct": correct, "val_total": 10_000}
                    | {"val_accuracy": correct / 10_000, "val_loss": 0.6}
                    | {"latency_ms": macs / 2e6 + sizes[-1] / 100 if latency else None}
                )
            unit = f"{supernet},start={start},stop={start + len(rows)}"
            store.write_table("configurations", unit, rows, layers=list(layers))


def write_measurement(store: RunStore) -> None:
    conditions = {"runtime": "torch", "version": "2", "device": "a phone", "host": "there"}
    conditions |= {"batch_size": 1, "threads": 2}
    fit = {"full_ms": 9.5, "num_sampled": 20, "median_error": 0.012, "noise": 0.01}
    store.write_table("layer_latencies", "phone", [conditions | {"layer": "conv2", "group_size": 1, "added_ms": -1.0}])
    store.write_table("runtime_latencies", "phone", [conditions | fit])


def write_networks(store: RunStore) -> None:
    for seed, accuracy in enumerate((0.8388, 0.8441, 0.8352, 0.8399, 0.8417)):
        row = {"seed": seed, "val_correct": 8400, "val_total": 10_000, "val_accuracy": 0.84, "test_accuracy": accuracy}
        store.write_table("networks", f"seed={seed}", [row | {"macs": 4_420_000, "parameters": 133_930}])
        write_curve(store, "train", f"seed={seed}", seed, 100, accuracy)


def write_curve(store: RunStore, stage: str, unit: str, seed: int, epochs: int, last: float | None) -> None:
    noise = random.Random(f"{stage} {unit}")
    rows = [
        {
            "stage": stage,
            "unit": unit,
            "seed": seed,
            "epoch": epoch,
            "lr": 0.1,
            "gradient_norm": 1.0,
            "images_per_second": 9_000.0,
        }
        | {"train_loss": 2.3 * math.exp(-4 * epoch / epochs) + 0.3 + noise.random() / 20, "seconds": 4.25}
        | {"val_accuracy": None if last is None else last - 0.4 * math.exp(-5 * epoch / epochs) + noise.random() / 100}
        for epoch in range(1, epochs + 1)
    ]
    store.write_table("history", f"{stage},{unit}", rows)


def write_decompositions(store: RunStore, layers: Mapping[str, Sequence[int]] = FOUR_CONV) -> None:
    for place, (layer, sizes) in enumerate(layers.items()):
        for size in sizes:
            row = {"layer": layer, "group_size": size, "groups": max(sizes) // size, "seed": 0, "nested": False}
            row |= {"relative_error": 0.7 * (1 - size / max(sizes)), "cancellation": 1.1, "steps": 1200, "seconds": 7.5}
            unit = f"{layer},g={size},seed=0" if layer.isalnum() else f"layer={place},g={size},seed=0"
            store.write_table("decompositions", unit, [row | {"status": "converged"}])
    rows = [{"layer": layer, "dense_macs": 500_000 * 2**place % 7_000_001} for place, layer in enumerate(layers)]
    store.write_table("layers", "all", rows)


def write_selections(store: RunStore) -> None:
    for budget, chosen in SELECTED.items():
        limit = macs_of([int(size) for size in budget.split("-")])
        rows = [
            {"budget": budget, "budget_macs": limit, "rank": rank, "configuration": configuration}
            | {"macs": macs_of([int(size) for size in configuration.split("-")]), "supernet_accuracy": 0.82}
            for rank, configuration in enumerate(chosen, 1)
        ]
        store.write_table("selections", f"budget={budget}", rows)


def write_validations(store: RunStore) -> None:
    noise = random.Random(0)
    kinds = dict.fromkeys(FIXED, "fixed") | {one: "selected" for chosen in SELECTED.values() for one in chosen}
    for configuration, kind in kinds.items():
        macs = macs_of([int(size) for size in configuration.split("-")])
        base = 0.8 + 0.02 * (macs - 1_800_000) / 1e6 + (0.012 if kind == "selected" else 0)
        for seed in range(5):
            val, test = base + noise.uniform(-0.002, 0.002), base + noise.uniform(-0.002, 0.002) - 0.001
            row = {"configuration": configuration, "kind": kind, "seed": seed, "val_accuracy": val}
            row |= {"test_accuracy": test, "macs": macs, "macs_paper": macs - 700_000, "parameters": macs // 40}
            store.write_table("validations", f"{configuration},seed={seed}", [row])
            write_curve(store, "validate-finetune", f"{configuration},seed={seed}", seed, 100, val)


def write_sweep(store: RunStore) -> None:
    noise = random.Random(1)
    for (alpha, scaling), seed in itertools.product(TEMPERATURES, range(5)):
        rows = []
        for place, configuration in enumerate(FIXED):
            difference = (
                -0.01 - 0.003 * abs(alpha - 4) * (place if alpha < 4 else 3 - place) + noise.uniform(-0.002, 0.002)
            )
            row = {"alpha": alpha, "scaling": scaling, "seed": seed, "configuration": configuration}
            row |= {"supernet_accuracy": 0.82 + difference, "fixed_accuracy": 0.82, "difference": difference}
            rows.append(row)
        store.write_table("alpha_sweep", f"alpha={alpha:g},scaling={scaling},seed={seed}", rows)


def write_start(store: RunStore, second: int = 0) -> None:
    row = {"started": f"2026-11-23T22:47:{second:02}.513+00:00", "gross_ray": "0.1.0", "python": "3.11.7"}
    row |= {"torch": "2.15.0", "torchvision": "0.29.2", "ray": "2.60.0", "host": "vm", "device": "cpu", "num_cpus": 2}
    experiment = store.experiment
    row |= {"preset": experiment.name, "experiment": experiment.to_json(), "fingerprint": experiment.fingerprint()}
    store.write_table("runs", f"20261123T2247{second:02}", [row])


def write_supernet_curves(store: RunStore) -> None:
    for seed in range(5):
        unit = f"alpha=4,scaling=normalised,seed={seed}"
        write_curve(store, "reconstruct", unit, seed, 30, None)
        write_curve(store, "finetune", unit, seed, 150, 0.82)


STAGES = {
    "start": write_start,
    "train": write_networks,
    "decompose": write_decompositions,
    "finetune": write_supernet_curves,
    "search": lambda store: (write_configurations(store), write_selections(store)),
    "validate": write_validations,
    "sweep-alpha": lambda store: (write_configurations(store, temperatures=TEMPERATURES), write_sweep(store)),
}
"""What writes the tables of each stage, in the order of a run."""


def finished_run(folder: Path) -> RunStore:
    store = new_run(folder)
    for write in STAGES.values():
        write(store)
    return store


def deep_run(folder: Path) -> RunStore:
    """A searched run of many layers, with the best within a limit, but without the MACs of its layers."""
    settings = ["search.budgets=[]", "validation.fixed=[]", "sweep.alphas=[]", 'search.limits=["macs=2.2M"]']
    store = new_run(folder, ["supernet.seeds=1", "search.top=2", *settings])
    write_configurations(store, DEEP, seeds=1)
    write_networks(store)
    for name in ("4-4-4-4-4-4-4-4", "d-4-4-4-4-4-4-4"):
        row = {"configuration": name, "kind": "fixed", "seed": 0, "val_accuracy": 0.5, "test_accuracy": 0.5}
        store.write_table("validations", name, [row | {"macs": 1, "macs_paper": 1, "parameters": 1}])
    return store
