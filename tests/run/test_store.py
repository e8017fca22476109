import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from gross_ray.errors import DamagedFileError, InvalidValueError, MissingStageError, RunFolderError, StorageError
from gross_ray.experiment import Experiment, TrainingOptions
from gross_ray.run import store as store_module
from gross_ray.run import tables
from gross_ray.run.store import RunStore, read_table
from gross_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path):
    return RunStore.create(tmp_path / "run", Experiment(name="test"))


def rows_of(seed, count=3):
    return [
        {
            "stage": "train",
            "unit": f"seed={seed}",
            "seed": seed,
            "epoch": epoch,
            "lr": 0.1,
            "train_loss": 1 / epoch,
            "val_accuracy": None if epoch % 2 else 0.5,
            "seconds": 1.0,
            "gradient_norm": 1.0,
            "images_per_second": 10.0,
        }
        for epoch in range(1, count + 1)
    ]


def configuration_rows(seed):
    return [
        {
            "supernet": f"seed={seed}",
            "alpha": 4.0,
            "scaling": "normalised",
            "seed": seed,
            "configuration": f"{a}-{b}",
            "layer conv2": a,
            "layer features.3": b,
            "macs": a * b,
            "macs_paper": a * b,
            "parameters": a + b,
            "val_correct": a,
            "val_total": 10,
            "val_accuracy": a / 10,
            "val_loss": 1.0,
            "latency_ms": 0.5,
        }
        for a in (1, 2)
        for b in (4, 8)
    ]


def start(program, *arguments):
    """A process that works on a run folder: it must outlive or be killed apart from the test's own process."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


# The folder and its experiment


def test_create_then_open_gives_the_same_experiment(tmp_path):
    experiment = Experiment(name="a", training=TrainingOptions(epochs=3, milestones=(1, 2)))
    created = RunStore.create(tmp_path / "deep" / "run", experiment)
    opened = RunStore.open(str(tmp_path / "deep" / "run"))
    assert opened.experiment == created.experiment == experiment
    assert opened.path == created.path == tmp_path / "deep" / "run"


def test_create_again_opens_and_keeps_what_is_stored(store):
    store.write_table("history", "seed=0", rows_of(0))
    again = RunStore.create(store.path, Experiment(name="test"))
    assert again.finished_units("history") == {"seed=0"}


def test_the_path_is_absolute_so_that_workers_elsewhere_find_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunStore.create("run", Experiment()).path == tmp_path / "run"


def test_another_experiment_is_refused_by_the_first_field_that_differs(store):
    other = Experiment(name="test", training=TrainingOptions(epochs=7, lr=0.3))
    with pytest.raises(
        RunFolderError, match=r"training.epochs \(7, not 100\)\. Name another folder with --out"
    ) as caught:
        RunStore.create(store.path, other)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert RunStore.open(store.path).experiment == store.experiment


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="not a run folder and not empty .*'thesis.tex'.*--out"):
        RunStore.create(tmp_path, Experiment())
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_folder_s_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunFolderError, match="cannot make the run folder .*--out"):
        RunStore.create(tmp_path / "run", Experiment())
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunStore.open(tmp_path / "run")


def test_create_goes_on_where_an_earlier_create_was_killed(tmp_path):
    (tmp_path / ".experiment.json.0123.tmp").write_text("{")
    (tmp_path / ".lock").write_text("")
    RunStore.create(tmp_path, Experiment()).remove_leftovers()
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "experiment.json"}


def test_open_refuses_a_missing_folder_and_one_without_an_experiment(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunFolderError, match="is not a run folder .*name the --out of a run"):
            RunStore.open(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '["x"]', '{"unknown": 1}', '{"training": 3}', '{"seed": "a"}', b"\xff\xfe"]
)
def test_a_damaged_experiment_file_is_named(store, text):
    (store.path / "experiment.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunFolderError, match=r"experiment\.json is damaged or of another gross_ray"):
        RunStore.open(store.path)
    with pytest.raises(RunFolderError, match=r"experiment\.json is damaged or of another gross_ray"):
        RunStore.create(store.path, store.experiment)


def test_the_run_folder_names_the_gross_ray_that_wrote_it(store):
    values = json.loads((store.path / "experiment.json").read_text())
    assert values.pop("gross_ray") == {"version": version("gross-ray"), "schema": tables.SCHEMA_VERSION}
    assert values == store.experiment.to_dict()


@pytest.mark.parametrize(("earlier", "now"), [(True, "crop"), (False, "none")])
def test_a_run_folder_whose_augment_is_true_or_false_is_continued(tmp_path, earlier, now):
    settings = [f"{name}={now}" for name in Experiment().fields() if name.endswith(".augment")]
    experiment = Experiment().override(settings)
    store = RunStore.create(tmp_path / "run", experiment)
    file = store.path / "experiment.json"
    text = file.read_text()
    assert text.count(f'"augment": "{now}"') == 5
    file.write_text(text.replace(f'"augment": "{now}"', f'"augment": {json.dumps(earlier)}'))
    assert RunStore.open(store.path).experiment == experiment
    assert RunStore.create(store.path, experiment).experiment == experiment
    with pytest.raises(RunFolderError, match=f"training.augment .'resized-crop', not '{now}'"):
        RunStore.create(store.path, experiment.override(["training.augment=resized-crop"]))


def write_experiment(store, written_by=None, **more):
    values = ({"gross_ray": written_by} if written_by else {}) | store.experiment.to_dict() | more
    (store.path / "experiment.json").write_text(json.dumps(values))


OURS = {"version": version("gross-ray"), "schema": tables.SCHEMA_VERSION}


@pytest.mark.parametrize("written_by", [None, OURS, OURS | {"version": "0.0.9"}])
@pytest.mark.parametrize("without", [(), ("engine",)])
def test_a_folder_of_the_same_schema_continues(store, written_by, without):
    write_experiment(store, written_by)
    values = json.loads((store.path / "experiment.json").read_text())
    for name in without:
        del values[name]
    (store.path / "experiment.json").write_text(json.dumps(values))
    assert RunStore.open(store.path).experiment == store.experiment
    assert RunStore.create(store.path, store.experiment).experiment == store.experiment


@pytest.mark.parametrize(
    ("more", "written_by", "told"),
    [
        ({}, {"version": "7.7", "schema": 99}, r"gross_ray 7\.7 \(schema 99\)"),
        ({}, {"schema": 2}, r"gross_ray of before 0\.1\.0 \(schema 2\)"),
        ({"invented": 1}, {"version": "7.7", "schema": 99}, r"gross_ray 7\.7 \(schema 99\)"),
        ({"invented": 1}, OURS | {"version": "7.7"}, r"unknown field 'invented'.* by gross_ray 7\.7 "),
        ({"invented": 1}, None, r"unknown field 'invented'.* by gross_ray of before 0\.1\.0"),
        ({}, "7.7", r"damaged or of another gross_ray"),
    ],
)
def test_a_folder_of_another_gross_ray_is_refused_by_both_versions(store, more, written_by, told):
    write_experiment(store, written_by, **more)
    for attempt in (lambda: RunStore.open(store.path), lambda: RunStore.create(store.path, store.experiment)):
        with pytest.raises(RunFolderError, match=told) as caught:
            attempt()
        assert f"this is gross_ray {version('gross-ray')} (schema {tables.SCHEMA_VERSION})" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_store_pickles_to_its_path_and_experiment(store):
    store.damaged.append("x")
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.path, copy.experiment, copy.damaged) == (store.path, store.experiment, [])


# Tables


def test_rows_come_back_as_they_were_written(store):
    path = store.path / "tables/configurations/seed=0,shard=0.parquet"
    store.write_table("configurations", "seed=0,shard=0", configuration_rows(0), layers=("conv2", "features.3"))
    assert path == store.path / "tables" / "configurations" / "seed=0,shard=0.parquet"
    frame = store.read_table("configurations")
    assert frame.to_dict("records") == configuration_rows(0)
    assert pq.read_schema(path).metadata[b"gross_ray.schema_version"] == str(tables.SCHEMA_VERSION).encode()
    assert pq.read_schema(path).field("macs").metadata[b"unit"] == b"MACs an image"


LAYERS = ("conv2", "features.3")


def test_some_columns_of_some_units(store):
    assert list(store.read_table("configurations", ["macs", "configuration"]).columns) == ["macs", "configuration"]
    for seed in range(3):
        store.write_table("configurations", f"seed={seed}", configuration_rows(seed), layers=LAYERS)
    frame = store.read_units("configurations", ["seed=2", "seed=0"], ["layer conv2", "seed"])
    rows = [*configuration_rows(2), *configuration_rows(0)]
    assert frame.to_dict("records") == [{name: row[name] for name in ("layer conv2", "seed")} for row in rows]
    assert read_table(store.path, "configurations", ["seed"])["seed"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(InvalidValueError, match="'configurations' has no column 'layer conv9'; .*layer features.3"):
        store.read_table("configurations", ["macs", "layer conv9"])
    with pytest.raises(RunFolderError, match="damaged file .*seed=7"):
        store.read_units("configurations", ["seed=7"])


def test_a_column_is_replaced_and_nothing_else(store):
    path = store.path / "tables/configurations/seed=0.parquet"
    store.write_table("configurations", "seed=0", configuration_rows(0), layers=LAYERS)
    before = store.read_table("configurations")
    store.set_column("configurations", "seed=0", "latency_ms", [1.5, 2.5, 3.5, 4.5])
    after = store.read_table("configurations")
    assert after["latency_ms"].tolist() == [1.5, 2.5, 3.5, 4.5]
    pandas.testing.assert_frame_equal(after.drop(columns="latency_ms"), before.drop(columns="latency_ms"))
    assert pq.read_schema(path).equals(tables.table("configurations").schema(LAYERS), check_metadata=True)
    assert path.read_bytes().count(b"gross_ray crc32=") == 1
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="'latency_ms': -1"):
        store.set_column("configurations", "seed=0", "latency_ms", [1.5, -1.0, 3.5, 4.5])
    assert path.read_bytes() == whole
    assert list(path.parent.glob(".*")) == []


def test_writing_a_unit_again_replaces_it(store):
    store.write_table("history", "seed=0", rows_of(0, 3))
    store.write_table("history", "seed=0", rows_of(0, 2))
    assert len(store.read_table("history")) == 2


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_without_units_is_empty_with_its_columns(store, name):
    frame = store.read_table(name)
    assert frame.empty
    assert list(frame.columns) == tables.table(name).schema().names
    assert store.finished_units(name) == set()


def test_a_unit_without_rows_is_finished(store):
    store.write_table("selections", "all", [])
    assert store.finished_units("selections") == {"all"}
    assert store.read_table("selections").empty


def test_a_row_against_the_schema_leaves_nothing_behind(store):
    with pytest.raises(ValueError, match="column 'val_acc' is unknown"):
        store.write_table("history", "seed=0", [rows_of(0)[0] | {"val_acc": 1.0}])
    assert not (store.path / "tables").exists()


def test_units_are_read_in_natural_order(store):
    for seed in random.Random(0).sample(range(12), 12):
        store.write_table("history", f"seed={seed}", rows_of(seed))
    frame = store.read_table("history")
    assert list(frame.seed) == [seed for seed in range(12) for _ in range(3)]


@pytest.mark.parametrize(
    "ordered",
    [
        ["alpha=0,seed=0", "alpha=0.25,seed=0", "alpha=0.5,seed=0", "alpha=4,seed=2", "alpha=4,seed=10"],
        ["conv2,g=2,seed=0", "conv2,g=16,seed=0", "conv10,g=2,seed=0"],
        ["features.3,g=1", "features.10,g=1", "layer1.2.conv1", "layer1.10.conv1", "layer2.0.conv1"],
        ["2-32-64,seed=1", "4-2-1,seed=0", "16-16-16,seed=0", "a"],
    ],
)
def test_natural_order_of_numbers_fractions_and_layer_names(ordered):
    assert sorted(reversed(ordered), key=store_module._natural) == ordered


NAMES = st.text("ab019=,._+-", min_size=1, max_size=8)


@given(st.lists(NAMES))
def test_natural_order_is_an_order_of_any_names(names):
    once = sorted(names, key=store_module._natural)
    assert once == sorted(reversed(names), key=store_module._natural)


def test_pandas_alone_reads_the_folder_whatever_the_path_is_called(tmp_path):
    store = RunStore.create(tmp_path / "x=1" / "_hidden" / ".run", Experiment())
    for seed in (0, 2, 10):
        store.write_table("configurations", f"seed={seed}", configuration_rows(seed), layers=("conv2", "features.3"))
    folder = store.path / "tables" / "configurations"
    (folder / ".seed=3.parquet.0123.tmp").write_text("a killed writer's")
    ours = store.read_table("configurations")
    theirs = pandas.read_parquet(folder)
    order = ["seed", "configuration"]
    pandas.testing.assert_frame_equal(
        theirs.sort_values(order, ignore_index=True), ours.sort_values(order, ignore_index=True)
    )
    assert len(ours) == 12


def test_public_read_table(store):
    store.write_table("history", "seed=0", rows_of(0))
    pandas.testing.assert_frame_equal(read_table(str(store.path), "history"), store.read_table("history"))
    with pytest.raises(InvalidValueError, match="unknown table 'configs'; known tables: runs, "):
        read_table(store.path, "configs")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        read_table(store.path / "nowhere", "history")


def test_delete_unit(store):
    store.write_table("history", "seed=0", rows_of(0))
    for _ in range(2):
        store.delete_unit("history", "seed=0")
        assert store.finished_units("history") == set()


# Killed writers and damaged files


def test_a_write_that_fails_before_the_replace_keeps_the_old_unit_and_no_leftover(store, monkeypatch):
    store.write_table("history", "seed=0", rows_of(0))

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    for unit in ("seed=0", "seed=1"):
        with pytest.raises(StorageError, match="no space left"):
            store.write_table("history", unit, rows_of(1, 1))
    monkeypatch.undo()
    assert os.listdir(store.path / "tables" / "history") == ["seed=0.parquet"]
    assert len(store.read_table("history")) == 3


DIE_BEFORE_REPLACE = """
import os, signal, sys
import torch
from gross_ray.run.store import RunStore
store = RunStore.open(sys.argv[1])
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "table":
    store.write_table("selections", "all", [])
else:
    store.save_checkpoint("train", "seed=0", {"a": torch.ones(2)}, {})
"""


@pytest.mark.parametrize("kind", ["table", "checkpoint"])
def test_a_writer_killed_before_the_replace_leaves_no_unit(store, kind):
    with start(DIE_BEFORE_REPLACE, store.path, kind) as process:
        assert process.wait() == -signal.SIGKILL
    leftovers = list(store.path.glob("*/*/.*.tmp"))
    assert len(leftovers) == 1
    assert store.finished_units("selections") == set()
    assert not store.has_checkpoint("train", "seed=0")
    assert store.damaged == []
    store.remove_leftovers()
    assert not leftovers[0].exists()


def test_leftovers_are_removed_and_nothing_else(store):
    store.write_table("history", "seed=0", rows_of(0))
    store.save_checkpoint("train", "seed=0", {"a": torch.ones(2)}, {})
    kept = [store.path / "tables/history/seed=0.parquet", store.path / "checkpoints/train/seed=0.safetensors"]
    for file in kept:
        file.with_name(f".{file.name}.0123.tmp").write_text("half")
    store.remove_leftovers()
    assert [os.listdir(file.parent) for file in kept] == [
        ["seed=0.parquet"],
        os.listdir(kept[1].parent),
    ]
    assert set(os.listdir(kept[1].parent)) == {"seed=0.safetensors", "seed=0.json"}


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def in_the_rows(content):
    """Last byte of a column's stored values: the footer is untouched, only the page's checksum knows."""
    column = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(3)
    start = column.dictionary_page_offset or column.data_page_offset
    return start + column.total_compressed_size - 1


DAMAGES = {
    "empty": lambda content: b"",
    "garbage": lambda content: random.Random(0).randbytes(len(content)),
    "truncated": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "a flipped byte": lambda content: flip(content, in_the_rows(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_unit_is_named_removed_and_can_be_done_again(store, damage):
    store.write_table("history", "seed=0", rows_of(0))
    path = store.path / "tables/history/seed=1.parquet"
    store.write_table("history", "seed=1", rows_of(1))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    for _ in range(2):
        with pytest.raises(DamagedFileError, match=r"damaged file .*seed=1\.parquet: .*; `gross check RUN` deletes it"):
            store.read_table("history")
    assert path.exists() and store.damaged == [], "deleted by one that does not hold the lock"
    assert store.read_sound("history")["seed"].tolist() == [0] * 3
    with store.lock():
        assert store.finished_units("history") == {"seed=0", "seed=1"}
        with pytest.raises(DamagedFileError, match=r"damaged file .*seed=1\.parquet: .*; deleted: the same command"):
            store.read_table("history")
        assert store.finished_units("history") == {"seed=0"}
    assert store.damaged == ["tables/history/seed=1.parquet"]
    assert not path.exists()
    store.write_table("history", "seed=1", rows_of(1))
    assert store.finished_units("history") == {"seed=0", "seed=1"}
    assert len(store.read_table("history")) == 6


class Counting(Storage):
    """A storage that counts its listings, its single questions and the bytes of each file that it reads."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.listings: list[str] = []
        self.asked: list[str] = []
        self.bytes_read: dict[str, int] = {}

    def read(self, name: str) -> bytes:
        content = super().read(name)
        self.bytes_read[name] = self.bytes_read.get(name, 0) + len(content)
        return content

    def exists(self, name: str) -> bool:
        self.asked.append(name)
        return super().exists(name)

    def _list(self, folder: str):
        self.listings.append(folder)
        return super()._list(folder)


def test_what_is_finished_is_known_without_reading_it(store):
    for seed in range(5):
        store.write_table("history", f"seed={seed}", rows_of(seed))
        store.save_checkpoint("train", f"seed={seed}", {"a": torch.ones(1000)}, {})
        store.save_checkpoint("train-under-way", f"seed={seed}", {"a": torch.ones(1000)}, {})
    units, counting = {f"seed={seed}" for seed in range(5)}, Counting(store.path)
    again = RunStore(counting, store.experiment)
    with again.lock():
        counting.bytes_read.clear()
        again.remove_leftovers()
        counting.listings.clear()
        counting.asked.clear()
        assert again.finished_units("history") == again.finished_checkpoints("train") == units
        assert (len(counting.listings), counting.asked) == (2, [])
        assert all(again.has_checkpoint("train", unit) and again.has_unit("history", unit) for unit in units)
        assert counting.bytes_read == {}
        again.load_checkpoint("train", "seed=3")
        assert list(counting.bytes_read) == ["checkpoints/train/seed=3.safetensors"]


def test_a_check_reads_everything_and_deletes_what_is_damaged(store):
    damaged = []
    for name in ("history", "runs", "selections"):
        for unit in ("a", "b"):
            store.write_table(name, unit, [])
        damaged.append(f"tables/{name}/b.parquet")
    for stage in ("train", "train-under-way", "search-plan"):
        for unit in ("a", "b"):
            store.save_checkpoint(stage, unit, {"a": torch.ones(4)}, {})
        damaged.append(f"checkpoints/{stage}/b.safetensors")
    for file in damaged:
        (store.path / file).write_bytes(flip((store.path / file).read_bytes(), -5))
    with pytest.raises(DamagedFileError):
        store.check()
    assert all((store.path / file).exists() for file in damaged)
    with store.lock():
        store.check()
        assert sorted(store.damaged) == sorted(damaged)
        store.damaged.clear()
        store.check()
        assert store.damaged == []
    assert store.units("history") == store.checkpoints("train") == ["a"]


def test_a_worker_of_a_driver_that_holds_the_lock_deletes_what_is_damaged(store):
    store.save_checkpoint("train", "seed=0", {"a": torch.ones(4)}, {})
    path = store.path / "checkpoints/train/seed=0.safetensors"
    path.write_bytes(b"")
    with pytest.raises(DamagedFileError):
        pickle.loads(pickle.dumps(store)).load_checkpoint("train", "seed=0")
    assert path.exists()
    with store.lock():
        worker = pickle.loads(pickle.dumps(store))
        with pytest.raises(DamagedFileError, match="deleted: the same command again"):
            worker.load_checkpoint("train", "seed=0")
        assert worker.damaged == ["checkpoints/train/seed=0.safetensors"]
        assert not store.has_checkpoint("train", "seed=0")


@pytest.mark.parametrize("bits", [0xFF, 1])
def test_no_byte_changes_unseen(store, bits):
    store.write_table("history", "seed=0", rows_of(0))
    store.save_checkpoint("train", "seed=0", {"b.weight": torch.ones(2, 3), "a": torch.ones(2)}, {"epoch": 3})

    def _load():
        return store.load_checkpoint("train", "seed=0")

    table, checkpoint = (
        store.path / "tables/history/seed=0.parquet",
        store.path / "checkpoints/train/seed=0.safetensors",
    )
    for file in (table, checkpoint):
        content = file.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= bits
            file.write_bytes(changed)
            read = (lambda: store.read_table("history")) if file == table else _load
            with pytest.raises(DamagedFileError):
                read()
                pytest.fail(f"unseen at {place}")
        file.write_bytes(content)
    assert len(store.read_table("history")) == 3 and _load()


def test_a_file_cut_at_any_length_is_damaged(store):
    path = store.path / "tables/selections/all.parquet"
    store.write_table("selections", "all", [])
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFileError):
            store.read_table("selections")
    path.write_bytes(content)
    assert store.read_table("selections").empty


def test_files_without_a_checksum_are_damaged(store):
    """Versions before 0.1.0 wrote some."""
    store.write_table("history", "seed=0", rows_of(0))
    table = store.path / "tables/history/seed=0.parquet"
    arrow = pq.ParquetFile(table).read()
    metadata = {key: value for key, value in arrow.schema.metadata.items() if b"crc32" not in key}
    pq.write_table(arrow.replace_schema_metadata(metadata), table, write_page_checksum=True)
    with pytest.raises(DamagedFileError, match=r"damaged file .*seed=0\.parquet: it has no checksum"):
        store.read_table("history")
    checkpoint = store.path / "checkpoints/train/seed=0.safetensors"
    checkpoint.parent.mkdir(parents=True)
    raw = zlib.crc32(torch.ones(2).numpy().data, zlib.crc32(b"{}"))
    save_file({"a": torch.ones(2)}, checkpoint, {"gross_ray.description": "{}", "gross_ray.crc32": f"{raw:08x}"})
    with pytest.raises(DamagedFileError, match=r"damaged checkpoint .*seed=0\.safetensors: it has no checksum"):
        store.load_checkpoint("train", "seed=0")


def test_a_unit_of_another_schema_version_is_refused_and_kept(store, monkeypatch):
    monkeypatch.setattr(tables, "SCHEMA_VERSION", 99)
    path = store.path / "tables/history/seed=0.parquet"
    store.write_table("history", "seed=0", rows_of(0))
    monkeypatch.undo()
    with store.lock(), pytest.raises(RunFolderError, match="schema version 99, this gross_ray reads ") as caught:
        store.read_table("history")
    assert not isinstance(caught.value, DamagedFileError)
    assert path.exists() and store.damaged == []


class Evil:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return open, (str(self.made), "w")


def test_nothing_that_is_stored_is_unpickled(store, tmp_path):
    made = tmp_path / "made"
    store.write_table("history", "seed=0", rows_of(0))
    store.save_checkpoint("train", "seed=0", {"a": torch.ones(4)}, {"note": "hello"})
    files = [file for folder in ("tables", "checkpoints") for file in (store.path / folder).rglob("*.*")]
    assert {file.suffix for file in files} >= {".parquet", ".safetensors"}
    for write in (pickle.dump, torch.save):
        for file in files:
            with file.open("wb") as opened:
                write(Evil(made), opened)
        with pytest.raises(RunFolderError, match="damaged"):
            store.read_table("history")
        with pytest.raises(RunFolderError, match="damaged"):
            store.load_checkpoint("train", "seed=0")
        assert not made.exists()
    torch.load(files[0], weights_only=False)
    assert made.exists()  # as it would have, if they were loaded so


# Names


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        ".hidden",
        "_left_out_by_pyarrow",
        "a b",
        "é",
        "a\n",
        "x" * 151,
    ],
)
def test_names_that_leave_the_folder_or_hide_in_it_are_refused(store, name):
    attempts = [
        lambda: store.write_table("selections", name, []),
        lambda: store.delete_unit("selections", name),
        lambda: store.save_checkpoint("train", name, {}, {}),
        lambda: store.save_checkpoint(name, "seed=0", {}, {}),
        lambda: store.load_checkpoint(name, "seed=0"),
        lambda: store.has_checkpoint("train", name),
        lambda: store.delete_checkpoint("train", name),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidValueError, match="a name has 1 to 150 letters"):
            attempt()
    assert [file.name for file in store.path.iterdir()] == ["experiment.json"]


@pytest.mark.parametrize(
    "name",
    ["seed=0", "conv2,g=16,seed=0", "alpha=4,scaling=normalised,seed=0", "2-32-64,seed=1", "features.3", "x" * 150],
)
def test_names_of_units_are_taken(store, name):
    store.write_table("selections", name, [])
    store.save_checkpoint("decompose", name, {"a": torch.ones(1)}, {})
    assert store.finished_units("selections") == {name}
    assert store.has_checkpoint("decompose", name)
    assert pandas.read_parquet(store.path / "tables" / "selections").empty


# Checkpoints


def awkward_tensors():
    whole = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    return {
        "whole": whole,
        "shared.view": whole[0],
        "shared.same": whole,
        "transposed": whole.transpose(0, 2),
        "strided": whole[..., ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.rand(3)),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "half": torch.rand(3).to(torch.bfloat16),
        "mask": torch.tensor([True, False]),
    }


def test_tensors_and_description_come_back(store):
    description = {"layers": ["conv2"], "g": 16, "relative_error": 0.1 + 0.2, "text": "é", "none": None}
    tensors = awkward_tensors()
    path = store.path / "checkpoints/train/seed=0.safetensors"
    store.save_checkpoint("train", "seed=0", tensors, description)
    assert path == store.path / "checkpoints" / "train" / "seed=0.safetensors"
    loaded, told = store.load_checkpoint("train", "seed=0")
    assert told == description
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].is_contiguous() and not loaded[name].requires_grad


def test_changing_what_was_loaded_changes_neither_the_file_nor_the_next_load(store):
    store.save_checkpoint("train", "seed=0", {"a": torch.ones(4)}, {})
    first, _ = store.load_checkpoint("train", "seed=0")
    first["a"].zero_()
    assert torch.equal(store.load_checkpoint("train", "seed=0")[0]["a"], torch.ones(4))


def test_a_checkpoint_replaced_or_deleted_leaves_what_was_loaded_alone(store):
    store.save_checkpoint("train", "seed=0", {"a": torch.ones(4096)}, {})
    loaded, _ = store.load_checkpoint("train", "seed=0")
    store.save_checkpoint("train", "seed=0", {"a": torch.zeros(4096)}, {})
    store.delete_checkpoint("train", "seed=0")
    assert torch.equal(loaded["a"], torch.ones(4096))


def test_the_description_is_read_from_the_tensors_file_not_the_one_beside(store):
    path = store.path / "checkpoints/train/seed=0.safetensors"
    store.save_checkpoint("train", "seed=0", {"a": torch.ones(4)}, {"step": 3})
    beside = path.with_name("seed=0.json")
    assert '"step": 3' in beside.read_text()
    beside.unlink()
    assert store.load_checkpoint("train", "seed=0")[1] == {"step": 3}


def test_dots_in_a_unit_keep_checkpoints_apart(store):
    for unit in ("features.3", "features.5", "features"):
        store.save_checkpoint("decompose", unit, {"a": torch.ones(1)}, {"unit": unit})
    for unit in ("features.3", "features.5", "features"):
        assert store.load_checkpoint("decompose", unit)[1] == {"unit": unit}
    assert len(os.listdir(store.path / "checkpoints" / "decompose")) == 6


def test_a_missing_checkpoint_names_stage_and_unit(store):
    with pytest.raises(MissingStageError, match="stage 'train' has stored nothing for unit 'seed=0' .*run that stage"):
        store.load_checkpoint("train", "seed=0")


CHECKPOINT_DAMAGES = {name: damage for name, damage in DAMAGES.items() if name != "a flipped byte"} | {
    "a flipped byte of a tensor": lambda content: flip(content, len(content) - 1),
    "a flipped byte of the description": lambda content: content.replace(b"hello", b"hallo"),
}


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGES)
def test_a_damaged_checkpoint_is_named_and_deleted_by_the_next_driver(store, damage):
    path = store.path / "checkpoints/train/seed=0.safetensors"
    for unit in ("seed=0", "seed=1"):
        store.save_checkpoint("train", unit, {"a": torch.ones(4), "b": torch.tensor(True)}, {"note": "hello"})
    path.write_bytes(CHECKPOINT_DAMAGES[damage](path.read_bytes()))
    with pytest.raises(DamagedFileError, match=r"damaged checkpoint .*train/seed=0\.safetensors.*`gross check RUN`"):
        store.load_checkpoint("train", "seed=0")
    assert store.has_checkpoint("train", "seed=0") and path.exists()  # who holds no lock deletes nothing
    with store.lock():
        with pytest.raises(DamagedFileError, match=r"damaged checkpoint .*train/seed=0.*deleted: the same"):
            store.load_checkpoint("train", "seed=0")
        assert not store.has_checkpoint("train", "seed=0") and not path.exists()
        with pytest.raises(MissingStageError):
            store.load_checkpoint("train", "seed=0")
        assert store.has_checkpoint("train", "seed=1")
    assert store.damaged == ["checkpoints/train/seed=0.safetensors"]
    assert store.load_checkpoint("train", "seed=1")[1] == {"note": "hello"}


def test_a_tensors_file_of_someone_else_is_no_checkpoint(store):
    path = store.path / "checkpoints/train/seed=0.safetensors"
    store.save_checkpoint("train", "seed=0", {"a": torch.ones(4)}, {})
    path.write_bytes(save({"a": torch.ones(4)}))
    with pytest.raises(RunFolderError, match="damaged checkpoint"):
        store.load_checkpoint("train", "seed=0")


def test_delete_checkpoint(store):
    store.save_checkpoint("train", "seed=0", {"a": torch.ones(4)}, {})
    for _ in range(2):
        store.delete_checkpoint("train", "seed=0")
        assert not store.has_checkpoint("train", "seed=0")
    assert os.listdir(store.path / "checkpoints" / "train") == []


def test_files_are_readable_by_those_that_the_umask_allows(store):
    checkpoint = store.path / "checkpoints/train/seed=0.safetensors"
    store.save_checkpoint("train", "seed=0", {"a": torch.ones(4)}, {})
    plain = store.path / "plain"
    plain.write_text("")
    store.write_table("selections", "all", [])
    table = store.path / "tables/selections/all.parquet"
    for file in (checkpoint, table, store.path / "experiment.json"):
        assert file.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    "error",
    [
        pa.ArrowMemoryError("no memory"),
        pa.ArrowNotImplementedError("too new for it"),
        pa.ArrowCancelled("interrupted", 2),
    ],
)
def test_an_error_that_is_not_the_file_s_deletes_nothing(store, monkeypatch, error):
    store.write_table("history", "seed=0", rows_of(0))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pq.ParquetFile, "read", fail)
    with store.lock(), pytest.raises(type(error)):
        store.read_table("history")
    monkeypatch.undo()
    assert len(store.read_table("history")) == 3
    assert store.damaged == []
