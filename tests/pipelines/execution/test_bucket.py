"""A run whose tables, checkpoints and Tune's files are all in a bucket; its driver is killed once."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pandas as pd
from miniature import assert_equal_tables, gross, run_command
from pyarrow.fs import FileSelector, FileType
from s3_server import SECRET, uri

from gross_ray import read_table
from gross_ray.run.store import RunStore
from pipelines.stages.reuse import take_over


def test_a_run_in_a_bucket_killed_in_the_search_ends_with_the_tables_of_a_local_one(
    whole_run: tuple[Path, str], s3_port: int, tmp_path: Path
) -> None:
    address, log = uri(s3_port, "killed"), tmp_path / "log"
    undisturbed = RunStore.open(whole_run[0])
    begun = RunStore.create(address, undisturbed.experiment)
    take_over(begun, undisturbed)  # all before the search, and
    validations = read_table(whole_run[0], "validations")
    selected = validations[validations["kind"] == "selected"]
    for configuration, seed in zip(selected["configuration"], selected["seed"], strict=True):
        begun.delete_unit("validations", f"{configuration},seed={seed}")  # nothing of what comes after it
    with log.open("wb") as output:
        process = subprocess.Popen(run_command(address), stdout=output, stderr=output)
        deadline = time.monotonic() + 300
        while process.poll() is None and "search: 1/" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        process.kill()
        assert process.wait() != 0, "it ended before it was killed"
        ended = subprocess.run(run_command(address), stdout=subprocess.PIPE, stderr=output, text=True, timeout=400)
    assert ended.returncode == 0, log.read_text()
    assert ended.stdout == whole_run[1]
    assert_equal_tables(whole_run[0], address)
    store = RunStore.open(address)
    assert any(name.startswith("validate-") for name in store.storage.folders("tune"))
    assert ".lock" not in store.storage.entries()
    storage = store.storage
    plain = pd.read_parquet(storage.path("tables/selections"), filesystem=storage.filesystem)
    assert set(plain["budget"]) == {"16-16-16", "4-4-4"}
    status = gross("status", address)
    assert status.returncode == 0, status.stderr
    for text in (log.read_text(), ended.stdout, status.stdout, status.stderr):
        assert SECRET not in text
    infos = storage.filesystem.get_file_info(FileSelector(storage.root, recursive=True))
    files = [info.path for info in infos if info.type == FileType.File]
    assert any(path.endswith("tuner.pkl") for path in files)
    for path in files:
        with storage.filesystem.open_input_file(path) as file:
            assert SECRET.encode() not in file.read(), path
