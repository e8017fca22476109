"""How long the query commands take to read a run of 100,000 configurations, and to import.

    python benchmarks/commands.py [--repeats 5] [--keep FOLDER]

The run is synthetic and written by the real RunStore: five layers with five group-sizes and five with two, in two
supernets, ten shards each. Each command runs in this process, where everything is already imported. "Reading" is the
time that the command spends inside RunStore's methods, "whole" its total time. The baseline, measured in the same run
and alternating with the command, is one `pandas.read_parquet` of each table that the command reads, with the same
columns. Times are CPU seconds of all threads of this process (the files are in the page cache). The script prints the
minimum of the repeats, which other work on the machine disturbs least, and fails if the reading of a command takes more
than 1.5 times the baseline plus 0.1 s.

At the end the script prints the wall-clock seconds of `gross --help`, `gross presets` and `gross status RUN` as
processes, minus those of `python -c pass`, and the large packages that each imports.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from cli import main as gross  # noqa: E402
from gross_ray import preset  # noqa: E402
from gross_ray.run.progress import STORED, store_plans  # noqa: E402
from gross_ray.run.store import RunStore  # noqa: E402

SIZES = {str(2 * place): (1, 2, 4, 8, 16) if place % 2 else (1, 16) for place in range(1, 11)}
"""Group-sizes of each layer: 5^5 x 2^5 = 100,000 configurations."""
SUPERNETS, SHARDS = 2, 10
FACTOR, SECONDS = 1.5, 0.1
PACKAGES = ("torch", "pandas", "ray", "pyarrow", "numpy", "rich")


def network(num_classes: int = 10) -> nn.Module:
    """Return a network with ten convolutions of 16 channels after the first one."""
    strides = [2 if place % 4 == 3 else 1 for place in range(11)]
    convs = [nn.Conv2d(16 if place else 3, 16, 3, padding=1, stride=stride) for place, stride in enumerate(strides)]
    layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder of the run: created and kept, or measured if it exists")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.keep or Path(folder) / "run"
        if not run.exists():
            _write_run(run)
        questions = {
            "search --budget": ["search", str(run), "--budget", "macs=2M", "--top", "5"],
            "search --pareto": ["search", str(run), "--pareto"],
            "report": ["report", str(run), "--to", str(Path(folder) / "page.html")],
            "status": ["status", str(run)],
            "show": ["show", str(run), "configurations"],
        }
        slow = [name for name, arguments in questions.items() if not _compare(name, arguments, run, options.repeats)]
        _import_times(run, options.repeats)
    if slow:
        sys.exit(f"more than {FACTOR} times pandas plus {SECONDS} s: {', '.join(slow)}")


def _compare(name: str, arguments: Sequence[str], run: Path, repeats: int) -> bool:
    """Print a command's times against pandas'; return whether it is fast enough."""
    with _recorded() as recorded:
        _call(arguments)  # imports everything, and loads the files into the page cache
    columns = recorded.columns
    whole, reading, baseline = [], [], []
    for _ in range(repeats):
        with _recorded() as recorded:
            whole.append(_timed(lambda: _call(arguments), time.process_time))
        reading.append(recorded.seconds)
        baseline.append(_timed(lambda: _read_by_pandas(run, columns), time.process_time))
    ours, theirs = min(reading), min(baseline)
    read = ", ".join(f"{table} ({'all' if some is None else len(some)})" for table, some in columns.items())
    print(
        f"{name:<16} reading {ours:.3f} s, pandas {theirs:.3f} s, ratio {ours / max(theirs, 1e-4):.2f}; "
        f"whole {min(whole):.3f} s; tables (columns): {read or 'none'}"
    )
    return ours <= FACTOR * theirs + SECONDS


def _call(arguments: Sequence[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = gross(list(arguments), standalone_mode=False)
    if status:
        raise SystemExit(f"gross {' '.join(arguments)} failed with status {status}")


def _timed(action: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    action()
    return clock() - start


def _read_by_pandas(run: Path, columns: dict[str, list[str] | None]) -> None:
    for table, some in columns.items():
        if any((run / "tables" / table).glob("*.parquet")):
            pd.read_parquet(run / "tables" / table, columns=some)


class _Recorded:
    """The columns read through RunStore, and the seconds spent in its methods."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0
        self.columns: dict[str, list[str] | None] = {}

    def read(self, table: str, columns: Sequence[str] | None) -> None:
        before = self.columns.get(table, [])
        self.columns[table] = None if columns is None or before is None else list(dict.fromkeys([*before, *columns]))


@contextlib.contextmanager
def _recorded() -> Iterator[_Recorded]:
    """Measure the time inside RunStore's public methods while the block runs; nested calls count once."""
    recorded = _Recorded()
    original = {name: each for name, each in vars(RunStore).items() if callable(each) and not name.startswith("_")}

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(store: RunStore, *arguments: Any, **named: Any) -> Any:
            if name in ("read_table", "read_units", "read_sound") and not recorded.depth:
                place = 2 if name == "read_units" else 1
                columns = arguments[place] if len(arguments) > place else named.get("columns")
                recorded.read(arguments[0], columns)
            recorded.depth += 1
            start = time.process_time()
            try:
                return method(store, *arguments, **named)
            finally:
                recorded.depth -= 1
                if not recorded.depth:
                    recorded.seconds += time.process_time() - start

        return call

    for name, method in original.items():
        setattr(RunStore, name, watched(name, method))
    try:
        yield recorded
    finally:
        for name, method in original.items():
            setattr(RunStore, name, method)


def _import_times(run: Path, repeats: int) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2])}

    def seconds(arguments: Sequence[str]) -> float:
        command = [sys.executable, *arguments]
        call = functools.partial(subprocess.run, command, env=environment, check=True, capture_output=True)
        return min(_timed(call, time.perf_counter) for _ in range(repeats))

    nothing = seconds(["-c", "pass"])
    for arguments in (["--help"], ["presets"], ["status", str(run)]):
        code = f"import sys; from cli import main; main({arguments!r}, standalone_mode=False)"
        listed = f"{code}; print(*[name for name in {PACKAGES!r} if name in sys.modules])"
        shown = subprocess.run(
            [sys.executable, "-c", listed.replace("main([", "sys.exit = lambda *_: None; main([")],
            env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        spent = seconds(["-c", code]) - nothing
        print(f"gross {arguments[0]:<10} {spent:.2f} s; imports {shown.stdout.splitlines()[-1] or 'none of them'}")


def _write_run(run: Path) -> None:
    """Write the files of a run whose search is finished."""
    by_layer = [f"{layer}={','.join(map(str, sizes))}" for layer, sizes in SIZES.items()]
    settings = ['model="commands:network"', f"decomposition.layer_group_sizes={json.dumps(by_layer)}"]
    settings += ["search.budgets=[16]", "validation.fixed=[1]", "sweep.alphas=[]", "training.seeds=1"]
    settings += [f"supernet.seeds={SUPERNETS}", "supernet.alpha=0"]
    store = RunStore.create(run, preset("quickstart").override(settings))
    about = {"num_classes": 10, "image_size": 32, "input_shape": [3, 32, 32], "classes": list("abcdefghij")}
    store.save_checkpoint("train", "seed=0", network().state_dict(), about)
    row = {"seed": 0, "val_correct": 9, "val_total": 10, "val_accuracy": 0.9, "test_accuracy": 0.9, "macs": 1}
    store.write_table("networks", "seed=0", [row | {"parameters": 1}])
    store.write_table("history", "train,seed=0", [])
    space = list(itertools.product(*SIZES.values()))
    bounds = np.linspace(0, len(space), SHARDS + 1).astype(int).tolist()
    shards = [list(pair) for pair in itertools.pairwise(bounds)]
    store.save_checkpoint("search-plan", "plan", {}, {"shards": shards, "forms": {}, "memory_budget": 1})
    for seed in range(SUPERNETS):
        common = {"alpha": 0.0, "scaling": "index", "seed": seed}
        supernet = f"alpha=0,scaling=index,seed={seed}"
        for start, stop in shards:
            rows = [_row(sizes, common | {"supernet": supernet}) for sizes in space[start:stop]]
            store.write_table("configurations", f"{supernet},start={start},stop={stop}", rows, layers=list(SIZES))
    fixed = "-".join(["16"] * len(SIZES))
    chosen = {"budget": fixed, "budget_macs": 2_000_000, "rank": 1, "configuration": "-".join(["1"] * len(SIZES))}
    store.write_table("selections", f"budget={fixed}", [chosen | {"macs": 1_000_000, "supernet_accuracy": 0.9}])
    parts = [[unit] for unit in store.units("configurations")]
    store_plans(store, dict.fromkeys(STORED) | {"train": [["seed=0"]], "search": parts})  # as each driver does


def _row(sizes: Sequence[int], common: dict[str, Any]) -> dict[str, Any]:
    """Return a row of `configurations`; its accuracy grows with the group-sizes, plus noise."""
    macs = 1_000_000 + 17_000 * sum(sizes)
    noise = hash((*sizes, common["seed"])) % 200
    correct = 8_000 + 6 * sum(sizes) + noise
    return {
        **common,
        "configuration": "-".join(map(str, sizes)),
        **{f"layer {layer}": size for layer, size in zip(SIZES, sizes, strict=True)},
        "macs": macs,
        "macs_paper": macs + 1000,
        "parameters": macs // 50,
        "val_correct": correct,
        "val_total": 10_000,
        "val_accuracy": correct / 10_000,
        "val_loss": 0.5,
        "latency_ms": None,
    }


if __name__ == "__main__":
    main()
