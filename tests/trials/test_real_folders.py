"""Folders of images as Roboflow, fastai and people's own hands leave them: all is read, or a line says what is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cli import main
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.run.store import RunStore
from pipelines.commands import compressing

OWN = """
from torch import nn

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )
"""
RANDOM = np.random.default_rng(0)


def save(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file)


def test_valid_is_the_validation_split(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("valid", 10), ("test", 5)):
        for label in ("cat", "dog"):
            for i in range(count):
                save(tmp_path / split / label / f"{i}.png")
    splits = load_dataset(DataOptions(name=f"folder:{tmp_path}"))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 20, 10)
    assert splits.notes[-1] == "splits: 40 train, 20 validation, 10 test; valid is the validation split"


def test_no_image_is_left_out_for_its_ending_or_its_folder(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        for i in range(10):
            for name in (f"{i}.png", f"{i}.webp", f"{i}.bmp", f"day2/{i}.png"):
                save(tmp_path / label / name)
    splits = load_dataset(DataOptions(name=f"folder:{tmp_path}"))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 80
    assert splits.notes[0] == "read 80 images of 2 classes"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_real.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for label in ("cat", "dog"):
        for i in range(20):
            save(tmp_path / "images" / label / f"{i}.png")
    (tmp_path / "images" / "cat" / "notes.txt").touch()
    sys.modules.pop("own_real", None)
    yield tmp_path
    sys.modules.pop("own_real", None)


def gross(*words: str) -> Result:
    done = CliRunner().invoke(main, list(words), prog_name="gross")
    assert done.exit_code == 0, done.stderr
    return done


LINES = [
    "read 40 images of 2 classes; passed over 1 file: 1 .txt",
    "splits: 24 train, 8 validation, 8 test; all images were split 3:1:1, because there is no other split",
]


def test_what_was_read_is_shown_once_when_the_run_folder_is_made(folder: Path) -> None:
    settings = [
        "data.limit_train=0",
        "data.limit_validation=0",
        "training.epochs=1",
        "training.milestones=[]",
        "training.seeds=1",
        "search.budgets=[4]",
    ]
    words = [word for one in [*settings, "validation.fixed=[4]"] for word in ("--set", one)]
    place = ["run", "--in-process", "--num-cpus", "1"]
    done = gross(
        "train", *place, "--preset", "quickstart", "--model", "own_real:net", "--data", "folder:images", *words
    )
    assert [line for line in done.stderr.splitlines() if line.startswith(("read ", "splits: "))] == LINES
    assert not set(LINES) & set(done.stdout.splitlines())
    again = gross("decompose", *place)
    assert not set(LINES) & {*again.stderr.splitlines(), *again.stdout.splitlines()}
    assert RunStore.open(folder / "run").read_pin("data", dict)["classes"] == ["cat", "dog"]


def test_a_dry_run_shows_it_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressing, "estimate", lambda *_: {"all": 1.0})
    words = ["--model", "own_real:net", "--data", "folder:images", "--budget", "macs=90%", "--out", "run", "--dry-run"]
    done = gross("compress", *words)
    assert [line for line in done.stderr.splitlines() if line.startswith(("read ", "splits: "))] == LINES
    assert not (folder / "run").exists()
