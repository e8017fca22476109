"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RESULTS = EXAMPLES.parent / "results" / "fashion-short"


def run(folder: Path, name: str, *words: str) -> str:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # other tests run beside it
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    assert len((EXAMPLES / "own_model.py").read_text().splitlines()) < 60
    told = run(tmp_path, "own_model.py")
    rows = [line.split() for line in told.splitlines()]
    assert rows[0] == ["network", "val_accuracy", "test_accuracy", "macs", "parameters", "latency_ms"]
    full, compressed = rows[1][2:], rows[2]  # "full network" are two words
    assert len(compressed[0].split("-")) == 4
    assert float(full[1]) > 0.5 and float(compressed[2]) > 0.5  # an eighth by chance
    assert float(compressed[-1]) <= 0.9 * float(full[-1]) * 1.001  # the table is rounded
    session = onnxruntime.InferenceSession(tmp_path / "own_model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": np.zeros((5, 3, 32, 32), np.float32)})
    assert logits.shape == (5, 8)


def test_the_analysis(tmp_path: Path) -> None:
    told = run(tmp_path, "analysis.py", str(RESULTS), "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="plotly-graph-div"') == 3
    assert "http" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    front = [line.split()[0] for line in told.splitlines()[1:]]
    rows = pd.read_parquet(RESULTS / "tables" / "configurations").query("alpha == 0")
    space = rows.groupby(["configuration", "macs"], as_index=False)["val_accuracy"].mean()
    for one in space.itertuples():
        better = space[(space["macs"] <= one.macs) & (space["val_accuracy"] >= one.val_accuracy)]
        dominated = any(
            (other.macs, other.val_accuracy) != (one.macs, one.val_accuracy) for other in better.itertuples()
        )
        assert not (dominated and one.configuration in front)
        assert dominated or one.configuration in front


def test_the_analysis_calls_a_layer_that_stays_dense_d(tmp_path: Path) -> None:
    names = ["2-2", "2-16", "2-d", "16-16", "16-d", "d-d"]
    sizes = [[0 if size == "d" else int(size) for size in name.split("-")] for name in names]
    rows = pd.DataFrame(sizes, columns=["layer a", "layer b"]).assign(
        configuration=names, alpha=0.0, macs=range(6), val_accuracy=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    )
    own = pd.DataFrame(
        {"configuration": names, "kind": "fixed", "val_accuracy": 0.1 * rows.index, "test_accuracy": 0.5}
    )
    for table, frame in (("configurations", rows), ("validations", own)):
        (tmp_path / "tables" / table).mkdir(parents=True)
        frame.to_parquet(tmp_path / "tables" / table / "unit.parquet")
    run(tmp_path, "analysis.py", str(tmp_path), "page.html")
    legend = re.findall(r'"legendgroup":"(\w+)"', (tmp_path / "page.html").read_text())
    assert [name for name in legend if name not in ("True", "False", "fixed")] == ["2", "16", "d"]
