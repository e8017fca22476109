"""Parquet files in a store: copied once to this machine, and read there."""

from __future__ import annotations

from pathlib import Path

import pytest
from dataset_errors import dataset_error
from made_datasets import pictures, write_parquet
from s3_server import SECRET, uri

from gross_ray.data.identity import identity_of
from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.storage import Storage


def load(address: str, root: Path, notes: list[str] | None = None, memory: int = 0) -> Splits:
    note = ([] if notes is None else notes).append
    return load_dataset(DataOptions(name=f"parquet:{address}", memory=memory), root=root, note=note)


@pytest.mark.parametrize("store", ["file", "s3"])
def test_files_in_a_store_are_copied_once(store: str, s3_port: int, tmp_path: Path) -> None:
    local, root, notes = tmp_path / "here", tmp_path / "root", list[str]()
    write_parquet(local, {"train": pictures(0, 30), "test": pictures(30, 9)})
    address = f"file://{local}" if store == "file" else uri(s3_port, "images/insects")
    upload = Storage(address)
    if store == "s3":
        for file in local.iterdir():
            upload.write(f"data/{file.name}", file.read_bytes())
        upload.write("README.md", b"no images")
    expected = identity_of(load_dataset(DataOptions(name=f"parquet:{local}")))
    assert identity_of(load(address, root, notes)) == expected
    assert [note.split(", ")[0] for note in notes] == [f"parquet:{address}: copying 2 files"]
    assert identity_of(load(address, root, notes)) == identity_of(load(address, root, notes, memory=1)) == expected
    assert len(notes) == 1
    copies = {path.name for path in (root / "parquet").rglob("*") if path.is_file()}
    assert copies == {"train.parquet", "test.parquet"}
    write_parquet(local, {"val": pictures(50, 9)})
    if store == "s3":
        upload.write("data/val.parquet", (local / "val.parquet").read_bytes())
        upload.delete("data/test.parquet")
    else:
        (local / "test.parquet").unlink()
    assert len(load(address, root, notes).train) == 30
    assert [note.split(", ")[0] for note in notes[1:]] == [f"parquet:{address}: copying 1 files"]
    assert not [*(root / "parquet").rglob("test.parquet")]


def test_one_file_of_a_store(s3_port: int, tmp_path: Path) -> None:
    write_parquet(tmp_path / "here", {"train": pictures(0, 30), "other": pictures(30, 9)})
    store = Storage(uri(s3_port, "one"))
    for file in (tmp_path / "here").iterdir():
        store.write(file.name, file.read_bytes())
    splits = load(uri(s3_port, "one/train.parquet"), tmp_path / "root")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 6, 6)


def test_what_cannot_be_copied_is_one_line(s3_port: int, tmp_path: Path) -> None:
    dataset_error(lambda: load(uri(s3_port, "none"), tmp_path), "there is no .parquet file at s3://runs/none; name a")
    dataset_error(lambda: load(uri(s3_port, "a", bucket="elsewhere"), tmp_path), "file at s3://elsewhere/a; name a")
    dataset_error(lambda: load("nowhere://a/b", tmp_path), "parquet: cannot use nowhere://a/b")
    with pytest.raises(Exception, match="holds credentials") as caught:
        load(f"s3://key:{SECRET}@runs/a", tmp_path)
    assert SECRET not in str(caught.value)
    Storage(uri(s3_port, "some")).write("train.parquet", b"x")
    (tmp_path / "parquet").write_text("a file where a folder has to be")
    dataset_error(lambda: load(uri(s3_port, "some"), tmp_path), "cannot be copied to", "with --data-root")
