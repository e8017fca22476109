"""How long `gross compress --dry-run` expects a compression to take, beside how long it takes.

    python benchmarks/dry_run.py [--repeats 3] [--models four-conv resnet20]

Each repeat is the dry run and then the whole run, each as a command of its own on the images of the sample. Nothing
else may run on the machine.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLI = Path(__file__).parents[1] / "cli.py"
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
SHORT = ("--effort", "quick", "--budget", "macs=60%", "--data", "sample")
SETTINGS = {
    "four-conv": (),
    "resnet20": ("search.evaluations=32", "training.epochs=1", "training.milestones=[]", "data.limit_validation=1000"),
}
"""What makes the whole run of a network take minutes."""


def main() -> None:
    """Print, for each network, the expected and the real time of each repeat, and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    asked = parser.parse_args()
    print("network      expected, s   real, s   dry run, s   expected / real", flush=True)
    for model in asked.models:
        ratios = []
        for _ in range(asked.repeats):
            with tempfile.TemporaryDirectory() as folder:
                settings = [word for setting in SETTINGS[model] for word in ("--set", setting)]
                words = ["compress", "--model", model, *SHORT, *settings, "--out", f"{folder}/run"]
                text, dry = command(*words, "--dry-run")
                found = re.search(r"Expected time: ([\d.]+) (s|min|h)", text)
                assert found is not None, text
                expected = float(found[1]) * UNITS[found[2]]
                _, real = command(*words)
            ratios.append(expected / real)
            print(f"{model:<12} {expected:11.0f} {real:9.0f} {dry:12.0f} {ratios[-1]:17.2f}", flush=True)
        print(f"{model:<12} median of {asked.repeats}: {statistics.median(ratios):.2f}", flush=True)


def command(*words: str) -> tuple[str, float]:
    """Run a command of gross; return what it printed on stdout, and its seconds."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(CLI), *words], check=True, capture_output=True, text=True)
    return done.stdout, time.perf_counter() - started


if __name__ == "__main__":
    main()
