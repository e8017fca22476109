"""`gross show` of a network of many layers: strips for people, the stored values for scripts."""

from __future__ import annotations

from pathlib import Path

from miniature import invoke

from gross_ray.presets import preset
from gross_ray.run.store import RunStore

UNIFORM, OTHER = "16-16-16-16-16-16-16", "1-d-4-4-1-1-64"


def test_strips_are_shown_beside_configurations_and_not_in_csv(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", preset("quickstart"))
    for name in (UNIFORM, OTHER):
        row = {"configuration": name, "kind": "fixed", "seed": 0, "val_accuracy": 0.5, "test_accuracy": 0.5}
        store.write_table("validations", name, [row | {"macs": 1, "macs_paper": 1, "parameters": 1}])
    shown = invoke("show", store.path, "validations").stdout
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert f"{UNIFORM} all 16 ▅▅▅▅▅▅▅" in " ".join(lines[UNIFORM].split())
    assert f"{OTHER} ▁█▃▃▁▁▇" in " ".join(lines[OTHER].split())
    csv = invoke("show", store.path, "validations", "--csv").stdout
    assert csv.isascii() and csv.splitlines()[0].startswith("configuration,kind,seed,")
