"""A run that is opened once: what is read at most once, and what is forgotten when a stage has changed it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from gross_ray.errors import MissingStageError
from gross_ray.models import build_model
from gross_ray.presets import preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.create(tmp_path / "run", preset("quickstart").override(["training.seeds=3"]))


def put_networks(store: RunStore, accuracies: list[float]) -> None:
    about = {"num_classes": 10, "image_size": 32, "input_shape": [3, 32, 32], "classes": list("abcdefghij")}
    for seed, accuracy in enumerate(accuracies):
        generator = torch.Generator().manual_seed(seed)
        network = build_model("four-conv", num_classes=10, image_size=32, generator=generator)
        store.save_checkpoint("train", f"seed={seed}", network.state_dict(), about)
        row = {"seed": seed, "val_correct": 1, "val_total": 10, "val_accuracy": accuracy, "test_accuracy": 0.0}
        store.write_table("networks", f"seed={seed}", [{**row, "macs": 1, "parameters": 1}])


def test_what_is_read_is_read_once_until_something_changed(store: RunStore) -> None:
    run, reads = Run(store), []

    def read() -> int:
        reads.append("x")
        return len(reads)

    assert [run.once("plan", read), run.once("plan", read), run.once("another", read)] == [1, 1, 2]
    run.changed()
    assert [run.once("plan", read), run.once("plan", read)] == [3, 3]


def test_only_what_depends_on_the_results_that_changed_is_read_again(store: RunStore) -> None:
    run, reads = Run(store), []

    def read(name: str, *depends: str) -> None:
        run.once(name, lambda: reads.append(name), depends=depends)

    def read_all() -> list[str]:
        reads.clear()
        read("plan of the search", "search")
        read("what is validated", "search", "latency")
        read("a learning rate")
        return reads

    assert len(read_all()) == 3 and read_all() == []
    run.changed("validate", "train")
    assert read_all() == []
    run.changed("latency")
    assert read_all() == ["what is validated"]
    run.changed("search", "train")
    assert read_all() == ["plan of the search", "what is validated"]


def test_an_error_is_not_kept(store: RunStore) -> None:
    run = Run(store)
    with pytest.raises(MissingStageError, match="0 of 3 base networks are stored"):
        _ = run.base
    put_networks(store, [0.5, 0.9, 0.1])
    assert run.base.seed == 0  # the median of three


def test_the_base_network_is_read_once_and_stays_when_later_stages_change_the_folder(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_networks(store, [0.5, 0.9, 0.1])
    run = Run(store)
    base, space = run.base, run.space
    monkeypatch.setattr(RunStore, "load_checkpoint", lambda *_: pytest.fail("read again"))
    run.changed()
    assert run.base is base and run.space is space
    assert base.on("cpu") is base.on("cpu") is not base.network  # whoever runs it leaves the stored one as it is


def test_a_run_pickles_to_its_folder_so_that_another_process_reads_for_itself(store: RunStore) -> None:
    put_networks(store, [0.5, 0.9, 0.1])
    run = Run(store)
    base = run.base
    run.once("plan", lambda: object())
    there = pickle.loads(pickle.dumps(run))
    assert there.base is not base
    theirs, ours = (each.network.state_dict() for each in (there.base, base))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert there.once("plan", lambda: "read") == "read"
