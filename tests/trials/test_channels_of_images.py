"""Networks that take one channel get grey images; of any other number, the line says what is possible."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn

from cli import main
from gross_ray.data.grey import grey, luminance
from gross_ray.data.image_set import ImageSet
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.errors import InvalidValueError
from gross_ray.nn.calls import input_channels
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore

OWN = """
from torch import nn

def of(channels):
    def net(num_classes):
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, num_classes),
        )
    return net

one, three, four = of(1), of(3), of(4)

def particular(num_classes):
    if num_classes != 5:
        raise ValueError("five classes only")
    return of(3)(num_classes)

def half(num_classes):
    return of(1)(num_classes).half()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_channels.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_channels", None)
    yield tmp_path
    sys.modules.pop("own_channels", None)


def gross(*words: str) -> Result:
    result = CliRunner().invoke(main, list(words), prog_name="gross")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_luminance_is_pillows() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 3, 40, 40), dtype=torch.uint8, generator=generator)
    images[0], images[1] = 255, 0
    found = luminance(images)
    assert (found.shape, found.dtype) == ((50, 1, 40, 40), torch.uint8)
    for image, one in zip(images, found, strict=True):
        expected = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))
        assert np.array_equal(one[0].numpy(), expected)
    every = torch.arange(256, dtype=torch.uint8)[:, None, None, None]
    assert torch.equal(luminance(every.expand(256, 3, 1, 1)), every)


def test_more_images_than_are_converted_at_a_time() -> None:
    images = torch.randint(256, (4099, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = grey(ImageSet(images, torch.zeros(4099, dtype=torch.int64)))
    assert torch.equal(found.images, luminance(images))


def test_a_folders_images_are_read_in_grey(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = {}
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(5):
                image = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
                image.save(tmp_path / split / name / f"{number}.png")
                pixels[np.asarray(image.convert("L")).tobytes()] = name
    splits = load_dataset(DataOptions(name=f"folder:{tmp_path}", channels=1, mean=(0.4,), std=(0.2,)))
    for images in (splits.train, splits.validation, splits.test):
        assert images.images.shape[1:] == (1, 6, 7) and len(images)
        for image, label in zip(images.images, images.labels, strict=True):
            assert pixels.pop(image.numpy().tobytes()) == splits.classes[label]
        expected = (images.images.float() / 255 - 0.4) / 0.2
        torch.testing.assert_close(images.as_inputs(images.images), expected)
    assert not pixels


@pytest.mark.parametrize("options", [{"channels": 2}, {"channels": 1, "mean": (0.5, 0.4, 0.3)}])
def test_options_that_do_not_fit_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidValueError, match=r"data.channels = \d: (must be 3|grey images take one number)"):
        DataOptions(**options)  # type: ignore[arg-type]


class Adapts(nn.Module):
    """Takes grey images and repeats them, or colours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)


class Repeats(Adapts):
    """Takes grey images only."""

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images.repeat(1, 3, 1, 1))


class Checks(nn.Module):
    """Refuses other images itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] != 4:
            raise ValueError("four channels only")
        return self.conv(images)


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (lambda: nn.Conv2d(1, 2, 3), 1),
        (lambda: nn.Conv2d(4, 2, 3), 4),
        (lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3)), 3),
        (lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 4, 3)), 1),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 1),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), 3),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 2)), None),  # of another size
        (nn.Flatten, None),
        (Adapts, 3),
        (Repeats, 1),
        (Checks, 4),
    ],
)
def test_the_channels_are_those_that_the_first_layer_needs(make: Callable[[], nn.Module], channels: int | None) -> None:
    network = make()
    assert input_channels(network, 8) == channels
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_networks_of_any_number_of_channels_are_inspected(folder: Path) -> None:
    for name, channels in (("one", 1), ("three", 3), ("four", 4)):
        shown = gross("inspect", "--model", f"own_channels:{name}")
        assert shown.exit_code == 0, shown.stderr
        assert f"Decomposed: 1 layers, for images of {channels}x32x32" in shown.stdout


SETTINGS = [
    *("data.limit_train=40", "data.limit_validation=20", "data.limit_test=20", "training.epochs=1"),
    *("training.milestones=[]", "training.seeds=1", "search.budgets=[4]", "validation.fixed=[4]"),
]
TRAIN = ["train", "run", "--preset", "quickstart", *(word for one in SETTINGS for word in ("--set", one))]
TRAIN += ["--in-process", "--num-cpus", "1"]


def test_a_network_of_one_channel_is_trained_on_grey_images(folder: Path) -> None:
    line = "data.channels = 1: the network takes one channel, so the images are made grey\n"
    for _ in range(2):  # the same command again agrees with the folder
        done = gross(*TRAIN, "--model", "own_channels:one")
        assert done.exit_code == 0, done.stderr
        assert line in done.stderr
    store = RunStore.open(folder / "run")
    assert store.experiment.data.channels == 1
    assert Run(store).base.input_shape == (1, 32, 32)
    kept = gross("decompose", "run", "--in-process", "--num-cpus", "1")
    assert kept.exit_code == 0, kept.stderr
    assert "channel, so" not in kept.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--model", "own_channels:four"],
            "model 'own_channels:four': takes images of 4 channels, and the images have 3 (data.channels: 3, or 1 for "
            "grey ones); put nn.Conv2d(3, 4, 1) before it",
        ),
        (
            ["--model", "own_channels:three", "--set", "data.channels=1"],
            "takes images of 3 channels, and the images have 1 (data.channels: 3, or 1 for grey ones); set "
            "data.channels=3",
        ),
        (
            ["--model", "own_channels:one", "--set", "data.mean=[0.5,0.4,0.3]"],
            "data.channels = 1: grey images take one number as data.mean, one as data.std",
        ),
        (["--set", "data.channels=1"], "the network cannot run an image of 1x32x32"),
        (["--model", "own_channels:particular"], "'own_channels:particular': its factory fails: ValueError: five"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_made(folder: Path, words: list[str], line: str) -> None:
    refused = gross(*TRAIN, *words)
    assert refused.exit_code == 2
    errors = [each for each in refused.stderr.splitlines() if each.startswith("Error: ")]
    assert len(errors) == 1 and line in errors[0]
    assert not (folder / "run").exists()


@pytest.mark.filterwarnings("always::gross_ray.errors.ConvertedNetworkWarning")
def test_a_half_network_is_converted_with_one_line(folder: Path) -> None:
    done = gross(*TRAIN, "--model", "own_channels:half")
    assert done.exit_code == 0, done.stderr
    line = "model 'own_channels:half': has parameters of float16; converted to float32, in which it is compressed"
    assert done.stderr.count(f"Warning: {line}\n") == 1
    assert done.stderr.count("float16") == 1
    stored, _ = RunStore.open(folder / "run").load_checkpoint("train", "seed=0")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
