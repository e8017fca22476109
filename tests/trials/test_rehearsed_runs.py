"""What passes the checks before a run passes the run: each stage is rehearsed, and a fault is one line, status 2."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn.utils import prune

from cli import main
from gross_ray import read_table
from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import DataOptions
from gross_ray.models import MODELS
from gross_ray.presets import preset
from gross_ray.report.searched import Searched
from gross_ray.run.store import RunStore
from pipelines.commands.preflight import check_experiment

SETTINGS = ["search.budgets=[2]", "validation.fixed=[2]"]


@pytest.fixture(scope="module")
def splits() -> Splits:
    """9 images for training."""
    return load_dataset(DataOptions(name="sample", limit_train=9, limit_validation=4, limit_test=4))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], nn.Module]], None]:
    """Let an experiment build its network by this function of the number of classes."""

    def put(network: Callable[[int], nn.Module]) -> None:
        monkeypatch.setitem(MODELS, "four-conv", lambda num_classes, image_size: network(num_classes))

    return put


def check(splits: Splits, *settings: str, endings: Sequence[str] = ()) -> None:
    check_experiment(preset("quickstart").override([*SETTINGS, *settings]), splits, endings=endings)


def refused(splits: Splits, *settings: str, endings: Sequence[str] = ()) -> str:
    with pytest.raises(InvalidValueError) as error:
        check(splits, *settings, endings=endings)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


class Net(nn.Module):
    """Two convolutions, and a head after them."""

    def __init__(self, num_classes: int, *head: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, stride=4), nn.Conv2d(4, 4, 3)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head, nn.Linear(4, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv2(torch.relu(self.conv1(images))))


def normalising(num_classes: int) -> nn.Module:
    return Net(num_classes, nn.BatchNorm1d(4))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["training.batch_size=1"], "training.batch_size = 1: model 'four-conv' cannot be trained on a single image: "
         "ValueError: Expected more than 1 value per channel.*; set another training.batch_size, like 3$"),
        (["training.batch_size=8"], "training.batch_size = 8: the last of 9 images is a batch by itself, which model "
         ".* cannot be trained on: ValueError.*; set another training.batch_size, like 9$"),
        (["training.batch_size=4", "training.images=5"], "batch_size = 4: the last of 5 images .*, like 5$"),
        (["training.images=1"], "training.batch_size = 32: model .* on a single image: .*; take more images$"),
        (["training.batch_size=3"], None),
        (["training.batch_size=8", "training.images=8"], None),
        # The statistics of batch-norm are fixed in every other stage.
        (["reconstruction.batch_size=1", "finetuning.batch_size=8", "validation.finetuning.batch_size=1"], None),
    ],
)  # fmt: skip
def test_batches_of_a_single_image(
    splits: Splits, use: Callable[..., None], settings: list[str], line: str | None
) -> None:
    use(normalising)
    with nullcontext() if line is None else pytest.raises(InvalidValueError, match=line):
        check(splits, *settings)


class OwnNorm(nn.Module):
    """Divides by the deviation over the batch, in training mode: not a batch-norm of torch's."""

    def forward(self, features: Tensor) -> Tensor:
        if self.training and len(features) < 2:
            raise ValueError("one image\nhas no deviation")
        return features / (features.std(0) + 1) if self.training else features


@pytest.mark.parametrize("field", ["training", "finetuning", "validation.finetuning"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_stage_in_training_mode_is_rehearsed_with_its_own_batches(
    splits: Splits, use: Callable[..., None], field: str, batch_size: int
) -> None:
    use(lambda num_classes: Net(num_classes, OwnNorm()))
    line = refused(splits, "training.batch_size=3", f"{field}.batch_size={batch_size}")
    assert line.startswith(f"{field}.batch_size = {batch_size}: ")
    assert "ValueError: one image has no deviation; set another" in line
    check(splits, "training.batch_size=3", f"reconstruction.batch_size={batch_size}", f"{field}.batch_size=9")


class OfThirds(nn.Module):
    """Runs in training mode only on batches that three divides."""

    def forward(self, features: Tensor) -> Tensor:
        assert not self.training or len(features) in (2, 3, 6), "batches of 3 or 6"
        return features


def test_the_base_network_runs_batches_of_the_size_of_its_training(splits: Splits, use: Callable[..., None]) -> None:
    use(lambda num_classes: Net(num_classes, OfThirds()))
    line = refused(splits, "training.batch_size=5")
    assert line.startswith("training.batch_size = 5: model 'four-conv' cannot be trained on a batch of 4 images: ")
    check(splits, "training.batch_size=6", "finetuning.batch_size=3", "validation.finetuning.batch_size=3")
    line = refused(splits, "training.batch_size=6", "finetuning.batch_size=5", "validation.finetuning.batch_size=3")
    assert line.startswith("finetuning.batch_size = 5: model 'four-conv' cannot be trained on a batch of 4 images: ")


class Fails(nn.Module):
    """Fails in one of the ways in which a stage calls a network."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def forward(self, features: Tensor) -> Tensor:
        graph, rows = features.requires_grad, len(features)
        wrong = {
            "reconstruction": not self.training and graph,
            "search": not self.training and rows > 1 and not graph and torch.is_inference_mode_enabled(),
        }
        if wrong[self.when]:
            raise RuntimeError("not\nlike this")
        return features


@pytest.mark.parametrize(
    ("when", "line"),
    [
        (
            "reconstruction",
            "model 'four-conv': a step of reconstruction fails: RuntimeError: not like this; it needs the",
        ),
        ("search", "RuntimeError: not like this"),
    ],
)
def test_the_loss_of_every_stage_and_the_search(splits: Splits, use: Callable[..., None], when: str, line: str) -> None:
    use(lambda num_classes: Net(num_classes, Fails(when)))
    with pytest.raises(InvalidValueError, match=line) as error:
        check(splits)
    assert len(str(error.value).splitlines()) == 1


def test_a_network_that_autocast_does_not_fit_is_found(splits: Splits, use: Callable[..., None]) -> None:
    class InFloat32(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            assert features.dtype == torch.float32, "only float32"
            return features

    use(lambda num_classes: Net(num_classes, nn.Linear(4, 4), InFloat32()))
    check(splits)
    assert "AssertionError: only float32" in refused(splits, "engine.precision=bfloat16")


def test_a_rehearsal_leaves_the_random_numbers_alone(splits: Splits, use: Callable[..., None]) -> None:
    use(lambda num_classes: Net(num_classes, nn.Dropout(0.5)))
    state = torch.get_rng_state()
    check(splits)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_weight_that_is_not_a_number_is_left_to_the_training(splits: Splits, use: Callable[..., None]) -> None:
    class NotANumber(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features * float("nan")

    use(lambda num_classes: Net(num_classes, NotANumber()))
    check(splits)


class Arguments(nn.Module):
    """A wrapper whose forward passes all its arguments on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.network(*args, **kwargs)


class Branches(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features if features.sum() > 0 else -features


def test_an_export_is_rehearsed(splits: Splits, use: Callable[..., None]) -> None:
    use(lambda num_classes: Arguments(Net(num_classes)))
    check(splits, endings=[".onnx", ".pt2", ".safetensors"])
    use(lambda num_classes: Net(num_classes, Branches()))
    check(splits, endings=[".safetensors"])
    for ending, exporter in ((".onnx", "ONNX"), (".pt2", "torch.export")):
        line = refused(splits, endings=[ending])
        assert line.startswith(f"model 'four-conv': {exporter} cannot trace this network: ")


class ByView(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.view(features.size(0), -1)


@pytest.mark.parametrize("together", [1, 2])
def test_a_flatten_by_view_passes(splits: Splits, use: Callable[..., None], together: int) -> None:
    use(lambda n: nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Conv2d(4, 4, 3), ByView(), nn.Linear(4 * 6 * 6, n)))
    check(splits, f"engine.parallel_seeds={together}")


def test_the_command_says_it_in_one_line_with_status_2(
    use: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(normalising)
    monkeypatch.chdir(tmp_path)
    settings = [*SETTINGS, "training.batch_size=1", "data.limit_train=9"]
    words = [word for setting in settings for word in ("--set", setting)]
    found = CliRunner().invoke(main, ["run", "--preset", "quickstart", "--out", "run", *words])
    assert found.exit_code == 2
    assert found.stderr.startswith("Error: training.batch_size = 1: model 'four-conv' cannot be trained on a single")
    assert len(found.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, for adaptive pooling
def test_a_stack_of_supernets_is_rehearsed_in_every_stage(splits: Splits, use: Callable[..., None]) -> None:
    use(lambda num_classes: Net(num_classes, nn.BatchNorm1d(4)))
    check(splits, "engine.parallel_seeds=2", "finetuning.batch_size=8")
    use(lambda num_classes: Net(num_classes, OwnNorm()))
    stacked = ["engine.parallel_seeds=2", "training.batch_size=3"]
    assert refused(splits, *stacked, "finetuning.batch_size=8").startswith("finetuning.batch_size = 8: the last of 9")


def test_a_network_that_only_copied_can_copy_passes(splits: Splits, use: Callable[..., None]) -> None:
    def pruned(num_classes: int) -> nn.Module:
        network = Net(num_classes)
        prune.l1_unstructured(network.conv1, "weight", 0.5)
        network.lock = threading.Lock()  # type: ignore[assignment]
        return network

    use(pruned)
    check(splits)


def test_few_images_are_enough(use: Callable[..., None], splits: Splits) -> None:
    use(lambda num_classes: Net(num_classes))
    check(replace(splits, train=splits.train.first(1), validation=splits.validation.first(1)))


def test_a_convolution_that_pads_its_input_itself_is_rehearsed_as_the_run_decomposes_it(
    splits: Splits, use: Callable[..., None]
) -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)

    def net(num_classes: int) -> nn.Module:
        network = Net(num_classes)
        network.conv2 = Padded(4, 4, 3)
        return network

    use(net)
    check(splits)


def test_responses_too_small_for_the_papers_count_are_searched_and_reported_without_it(
    tmp_path: Path, use: Callable[..., None]
) -> None:
    def net(num_classes: int) -> nn.Module:
        network = Net(num_classes)  # 8x8 responses; with the stride first, 1x1 would be left for the kernel of 3x3
        network.conv2 = nn.Conv2d(4, 4, 3, stride=8)
        return network

    use(net)
    few = ["data.limit_train=64", "data.limit_validation=32", "data.limit_test=32", "decomposition.max_steps=3"]
    few += ["training.epochs=1", "training.milestones=[]", "training.seeds=1", "supernet.seeds=1", "sweep.alphas=[]"]
    few += ["validation.seeds=1", "validation.fixed=[]", "search.budgets=[2]", "search.top=1"]
    words = [word for setting in few for word in ("--set", setting)]
    run = str(tmp_path / "run")
    found = CliRunner().invoke(main, ["run", "--preset", "quickstart", "--out", run, "--in-process", *words])
    assert found.exit_code == 0, found.stderr
    for table in ("configurations", "validations"):
        assert read_table(run, table)["macs_paper"].isna().all()
    assert "macs_paper" not in Searched.of(RunStore.open(run)).costs
    asked = CliRunner().invoke(main, ["search", run, "--budget", "macs_paper=1M"])
    assert asked.exit_code == 2 and "leaves nothing of a small response; use macs" in asked.stderr
