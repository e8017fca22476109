"""Images, weights and code that every command reads anew."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from miniature import invoke
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import DatasetError, InvalidValueError
from gross_ray.models import four_conv
from gross_ray.run.opened import Run
from gross_ray.run.pins import pin, stored_data, stored_weights
from gross_ray.run.store import RunStore
from pipelines import driver
from pipelines.commands.run_folders import run_folder
from pipelines.driver import DataSource
from pipelines.stages import train
from pipelines.stages.reuse import check_reusable, take_over
from pipelines.units import Context

OWN = """
import torch
from torch.utils.data import TensorDataset, random_split

def pictures():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (60, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return TensorDataset(pixels, torch.arange(60) % 4)

def unseeded():
    return random_split(pictures(), [30, 20, 10])

def seeded():
    return random_split(pictures(), [30, 20, 10], torch.Generator().manual_seed(0))
"""
SHORT = ("data.limit_train=0", "data.limit_validation=0", "data.limit_test=0")
SHORT += ("training.epochs=1", "training.milestones=[]", "training.seeds=1", "sweep.alphas=[]")
BEGINS = "Error: no unit is done here"


@pytest.fixture(autouse=True)
def no_unit_is_done(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where the first unit would be done: a command that gets as far ends with BEGINS."""

    def refuse(*_: object) -> None:
        raise InvalidValueError("no unit is done here")

    monkeypatch.setattr(driver, "InProcess", refuse)
    DataSource.forget()
    yield
    DataSource.forget()


@pytest.fixture
def own_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_pictures.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_pictures", None)


def command(*words: str) -> str:
    """Return the line with which a command ends that does not succeed; it loads the images itself."""
    DataSource.forget()
    with torch.random.fork_rng(devices=[]):
        torch.seed()  # as a new process has it
        ended = invoke(*words, "--in-process")
    assert ended.exit_code == 2, ended
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    return line


@pytest.mark.parametrize("function", ["seeded", "unseeded"])
def test_a_function_that_splits_without_a_seed_is_refused(tmp_path: Path, own_pictures: None, function: str) -> None:
    run = str(tmp_path / "run")
    settings = [word for setting in SHORT for word in ("--set", setting)]
    made = command("train", run, "--preset", "quickstart", "--data", f"own_pictures:{function}", *settings)
    assert made.startswith(BEGINS)
    stored = stored_data(RunStore.open(run))
    assert stored is not None
    assert [stored.train.count, stored.validation.count, stored.test.count] == [30, 20, 10]
    again = command("train", run)
    if function == "seeded":
        assert again.startswith(BEGINS)
    else:
        assert f"the train split differs from the one that {run} was made with: its hash is " in again
        assert f"not {stored.train.hash[:12]} (30 images); restore the images (a data function must split" in again
    assert stored_data(RunStore.open(run)) == stored


def flowers(folder: Path, value: int = 0) -> str:
    for split in ("train", "validation", "test"):
        for number in range(8):
            place = folder / split / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (number, value, 0)).save(place / f"{number}.png")
    return f"data.name=folder:{folder}"


def new_run(run: Path, *settings: str, reuse: RunStore | None = None) -> RunStore:
    DataSource.forget()
    return run_folder(str(run), "quickstart", (*SHORT, *settings), DataSource(), reuse)


def test_a_folder_of_images_may_move_but_not_change(tmp_path: Path) -> None:
    store = new_run(tmp_path / "run", flowers(tmp_path / "a"))
    moved = new_run(tmp_path / "run", flowers(tmp_path / "b"))
    assert stored_data(moved) == stored_data(store) is not None
    with pytest.raises(DatasetError, match="the train split differs from the one that "):
        new_run(tmp_path / "run", flowers(tmp_path / "c", 1))  # before any stage: all may be finished
    flowers(tmp_path / "a", 1)
    assert "the train split differs from the one that " in command("train", str(tmp_path / "run"))


def test_reuse_of_a_run_on_other_images_is_refused(tmp_path: Path) -> None:
    other = new_run(tmp_path / "other", flowers(tmp_path / "a"))
    same = new_run(tmp_path / "same", flowers(tmp_path / "b"), reuse=other)
    assert stored_data(same) == stored_data(other)
    refused = r"the train split differs from the one that .*other was made with: .*leave --reuse out"
    with pytest.raises(DatasetError, match=refused):
        new_run(tmp_path / "run", flowers(tmp_path / "c", 1), reuse=other)
    assert not (tmp_path / "run").exists()
    without = new_run(tmp_path / "run", flowers(tmp_path / "c", 1))  # and where the run folder is there already
    with pytest.raises(DatasetError, match=refused):
        take_over(without, other)
    (without.path / "data.json").unlink()  # not pinned yet: what is taken over decides
    take_over(without, other)
    assert stored_data(without) == stored_data(other)
    (other.path / "data.json").unlink()  # of a version that stored no hashes: the path is all that is known
    with pytest.raises(InvalidValueError, match="data.name is 'folder:.*/c' here and 'folder:.*/a' there"):
        check_reusable(without.experiment, other)


def trained_file(file: Path, seed: int) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = four_conv(2, 16).state_dict()
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)
    return f"weights={file}"


def test_weights_are_known_by_their_tensors(tmp_path: Path) -> None:
    images = flowers(tmp_path / "images")
    store = new_run(tmp_path / "run", images, trained_file(tmp_path / "w.pth", 0))
    assert stored_weights(store)
    moved = new_run(tmp_path / "run", images, trained_file(tmp_path / "moved.safetensors", 0))
    assert moved.experiment.weights == str(tmp_path / "moved.safetensors")
    differ = r"other.pth: the tensors differ from those that .* was made with: their hash is \w{12}, not \w{12}; "
    with pytest.raises(InvalidValueError, match=differ):
        new_run(tmp_path / "run", images, trained_file(tmp_path / "other.pth", 1))
    new_run(tmp_path / "reusing", images, f"weights={tmp_path / 'moved.safetensors'}", reuse=store)
    with pytest.raises(InvalidValueError, match=differ + ".*leave --reuse out"):
        new_run(tmp_path / "refused", images, f"weights={tmp_path / 'other.pth'}", reuse=store)
    assert not (tmp_path / "refused").exists()
    third = new_run(tmp_path / "third", images, f"weights={tmp_path / 'other.pth'}")
    with pytest.raises(InvalidValueError, match=differ + ".*leave --reuse out"):
        take_over(third, store)


def test_weights_that_change_under_their_path_are_refused_and_a_file_that_is_gone_is_not_missed(tmp_path: Path) -> None:
    store = new_run(tmp_path / "run", flowers(tmp_path / "images"), trained_file(tmp_path / "w.pth", 0))
    trained_file(tmp_path / "w.pth", 1)
    with pytest.raises(InvalidValueError, match="w.pth: the tensors differ from those that "):
        train.keep_given(store)  # no unit is done yet: nothing wrong is copied
    assert not store.checkpoints(train.GIVEN)
    trained_file(tmp_path / "w.pth", 0)
    train.keep_given(store)
    (store.path / "weights.json").unlink()  # of a version that stored no hash
    trained_file(tmp_path / "w.pth", 1)
    with pytest.raises(InvalidValueError, match="w.pth: the tensors differ from those that "):
        train.check_given(store)
    (tmp_path / "w.pth").unlink()
    train.check_given(store)
    new_run(tmp_path / "run", flowers(tmp_path / "images"), f"weights={tmp_path / 'w.pth'}")


WIDTH = 4


def network(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, WIDTH, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, num_classes)
    )


def test_a_factory_whose_network_has_changed_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageSet(torch.zeros(8, 3, 12, 12, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    splits = Splits("noise", images, images, images, ("a", "b"))
    settings = [f"model={__name__}:network", *SHORT, "search.budgets=[4]", "validation.fixed=[4]"]
    store = new_run(tmp_path / "run", flowers(tmp_path / "images"), *settings)
    for unit in train.plan(Run(store)):
        train.work(Context(Run(store), splits, "cpu", lambda *_, **__: None), unit)
    assert Run(store).base.seed == 0
    monkeypatch.setattr(sys.modules[__name__], "WIDTH", 6)
    line = (
        r"^train, seed=0 in .*run does not fit the network that the model's code builds now: 3 of another shape "
        r"\(1.weight \(4, 4, 3, 3\), not \(6, 4, 3, 3\), .*\); restore the code .*--out$"
    )
    with pytest.raises(InvalidValueError, match=line):
        Run(store).base  # noqa: B018
    with pytest.raises(DatasetError, match="the train split differs"):
        pin(store, splits)
