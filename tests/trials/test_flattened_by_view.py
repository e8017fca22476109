"""Networks that run contiguous images alone, for example because they flatten by `view`, work everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.experiment import Schedule
from gross_ray.export import check_export, export_network
from gross_ray.models import MODELS, four_conv
from gross_ray.nn.memory_format import memory_format_of
from gross_ray.search.evaluator import evaluate_configurations
from gross_ray.search.latency import LatencyOptions, measure_latency
from gross_ray.space import SearchSpace
from gross_ray.supernet.configure import extract
from gross_ray.training.loop import accuracy
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import finetune, reconstruct, train_network
from gross_ray.training.together import Member, finetune_together, reconstruct_together

SHAPE = (3, 8, 8)
SIZES = {"conv2": (1, 2, 8), "conv3": (2, 8)}
SCHEDULE = Schedule(epochs=2, lr=0.01, batch_size=16)
Flatten = Callable[[nn.Module, Tensor], Tensor]


def by_view(_: nn.Module, images: Tensor) -> Tensor:
    return images.view(images.size(0), -1)


def only_in_training(module: nn.Module, images: Tensor) -> Tensor:
    return by_view(module, images) if module.training else images.flatten(1)


def if_contiguous(_: nn.Module, images: Tensor) -> Tensor:
    assert images.is_contiguous(), "this network needs contiguous tensors"
    return images.flatten(1)


class _Halved(torch.autograd.Function):
    """Halves features, and flattens their gradient by `view`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient.view(-1) / 2).view(gradient.shape)


def by_flatten(_: nn.Module, images: Tensor) -> Tensor:
    return images.flatten(1)


class Net(nn.Module):
    """Three convolutions, batch-norm and a linear layer, flattened by a function."""

    def __init__(self, flatten: Flatten) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.conv3 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fc, self.flatten = nn.Linear(8 * 8 * 8, 3), flatten

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv2(torch.relu(self.conv1(images)))))
        return self.fc(self.flatten(self, torch.relu(self.conv3(hidden))))


class Halving(nn.Module):
    """Halves features, by a gradient of its own or by autograd's."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.own = own

    def forward(self, features: Tensor) -> Tensor:
        return _Halved.apply(features) if self.own else features / 2  # type: ignore[no-untyped-call,no-any-return]


def network_of(flatten: Flatten) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(flatten)


def halving(*, own: bool) -> nn.Module:
    network = network_of(by_flatten)
    network.norm = nn.Sequential(network.norm, Halving(own=own))  # type: ignore[assignment]
    return network


def image_set(number: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    pixels = torch.randint(180, (number, *SHAPE), generator=generator)
    pixels[torch.arange(number), labels] += 70
    return ImageSet(pixels.to(torch.uint8), labels)


def normal(number: int) -> Tensor:
    return torch.randn(number, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits, labels).detach())


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits("colours", image_set(40, 0), image_set(20, 1), image_set(20, 2), ("red", "green", "blue"))


@pytest.mark.filterwarnings("ignore::gross_ray.search.traceability.NotTraceableWarning")  # of if_contiguous
@pytest.mark.parametrize("form", ["dense", "bottleneck", "auto"])
@pytest.mark.parametrize("flatten", [by_view, if_contiguous])
def test_the_search_counts_what_a_forward_pass_of_each_network_counts(
    flatten: Flatten, form: str, random_supernet: Callable[..., nn.Module]
) -> None:
    supernet = random_supernet(network_of(flatten), SIZES).double()
    images, labels = normal(10), torch.arange(10) % 3
    for calibration in (None, images[:6]):
        found = evaluate_configurations(supernet, images, labels, form=form, calibration=calibration)
        for row, configuration in zip(found.itertuples(), SearchSpace.of(supernet), strict=True):
            plain = extract(supernet, configuration)
            if calibration is not None:  # one batch: its own statistics
                plain.norm.train().momentum = 1.0
                plain(calibration)
            logits = plain.eval()(images)
            assert row.correct == int((logits.argmax(1) == labels).sum())
            assert row.loss == pytest.approx(cross_entropy(logits, labels), rel=1e-9)


def test_siblings_of_different_forms_share_a_batch(random_supernet: Callable[..., nn.Module]) -> None:
    from gross_ray.search.evaluator import Evaluator
    from gross_ray.search.layer_forms import LayerForm

    supernet = random_supernet(network_of(by_view), SIZES).double()
    images, labels = normal(6), torch.arange(6) % 3
    mixed = {
        "conv2": LayerForm({1: "bottleneck", 2: "dense", 8: "dense"}),
        "conv3": LayerForm({2: "dense", 8: "dense"}),
    }
    evaluator = Evaluator(supernet, forms=mixed)
    correct, loss = evaluator.evaluate(images, labels, list(SearchSpace.of(supernet)))
    assert evaluator.not_traceable is None
    for count, total, configuration in zip(correct, loss, SearchSpace.of(supernet), strict=True):
        logits = extract(supernet, configuration).eval()(images)
        assert int(count) == int((logits.argmax(1) == labels).sum())
        assert float(total) == pytest.approx(cross_entropy(logits, labels) * 6, rel=1e-9)


def trained_in_every_way(flatten: Flatten, splits: Splits, random_supernet: Any) -> Iterator[nn.Module]:
    """Yield a network after each training; the supernets have the same terms for each `flatten`."""
    base = network_of(flatten)
    train_network(base, splits, SCHEDULE, seed=0)
    yield base
    supernet = random_supernet(network_of(flatten), SIZES).float()
    sampler = ConfigurationSampler(SearchSpace.of(supernet), 0.0)
    reconstruct(supernet, network_of(flatten), splits, SCHEDULE, seed=0, sampler=sampler)
    yield supernet
    finetune(supernet, splits, SCHEDULE, seed=0, sampler=sampler)
    yield supernet
    stacked = random_supernet(network_of(flatten), SIZES).float()
    reconstruct_together([Member(stacked, 0, sampler)], network_of(flatten), splits, SCHEDULE)
    yield stacked
    finetune_together([Member(stacked, 0, sampler)], splits, SCHEDULE)
    yield stacked


@pytest.mark.parametrize("flatten", [by_view, only_in_training, if_contiguous])
def test_every_training_is_that_of_the_same_network_with_another_flatten(
    flatten: Flatten, splits: Splits, random_supernet: Callable[..., nn.Module]
) -> None:
    ours = trained_in_every_way(flatten, splits, random_supernet)
    for one, other in zip(ours, trained_in_every_way(by_flatten, splits, random_supernet), strict=True):
        expected = other.state_dict()
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
        assert accuracy(one, splits.test) == pytest.approx(accuracy(other, splits.test), abs=0.051)


def test_a_gradient_of_ones_own_that_needs_contiguous_tensors(splits: Splits) -> None:
    ours, other = halving(own=True), halving(own=False)
    for network in (ours, other):
        train_network(network, splits, SCHEDULE, seed=0)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".safetensors"])
def test_an_exported_file_is_checked_on_the_images_of_the_search(
    ending: str, tmp_path: Path, splits: Splits, random_supernet: Callable[..., nn.Module]
) -> None:
    plain = extract(random_supernet(network_of(by_view), SIZES).float(), (2, 8))
    file = tmp_path / f"network{ending}"
    export_network(plain, file, SHAPE)
    check = check_export(file, plain, [splits.test.as_inputs(splits.test.images)])  # channels last
    assert check.images == 20 and check.predictions_that_differ == 0


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_latency_is_measured(runtime: str, random_supernet: Callable[..., nn.Module]) -> None:
    supernet = random_supernet(network_of(by_view), SIZES).float()
    options = LatencyOptions(runtime=runtime, repeats=2, num_sampled=4)
    measured = measure_latency(supernet, SHAPE, options, generator=torch.Generator().manual_seed(0))
    assert measured.full_ms > 0 and set(measured.added_ms) == set(SIZES)


def test_the_format_is_decided_by_what_the_network_can_run() -> None:
    assert memory_format_of(network_of(by_view), SHAPE) == torch.contiguous_format
    assert memory_format_of(network_of(by_flatten), SHAPE, trained=True) == torch.channels_last
    assert memory_format_of(network_of(only_in_training), SHAPE) == torch.channels_last
    assert memory_format_of(network_of(only_in_training), SHAPE, trained=True) == torch.contiguous_format
    assert memory_format_of(halving(own=True), SHAPE, trained=True) == torch.contiguous_format
    assert memory_format_of(network_of(by_view), (3, 9, 9)) == torch.channels_last  # it runs in neither
    with_3d = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 2, 3), nn.Flatten())
    assert memory_format_of(with_3d, SHAPE) == torch.contiguous_format  # network.to(channels_last) raises


def test_deciding_the_format_changes_nothing() -> None:
    network = four_conv(3, 16).to(memory_format=torch.channels_last)
    network.append(nn.BatchNorm1d(3)).train()
    network[3].eval()
    before, tensors = copy.deepcopy(network.state_dict()), {name: t for name, t in network.state_dict().items()}
    places = {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in tensors.items()}
    modes, state = [module.training for module in network.modules()], torch.get_rng_state()
    assert memory_format_of(network, (3, 16, 16), trained=True) == torch.channels_last
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]) and (tensor.data_ptr(), tensor.stride()) == places[name]
    assert all(parameter.grad is None for parameter in network.parameters())


def test_images_stay_channels_last_for_a_network_that_runs_them(splits: Splits) -> None:
    seen = []
    network = network_of(by_flatten)
    network.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    train_network(network, splits, Schedule(epochs=1, lr=0.01, batch_size=16), seed=0)
    assert {stride[1] for stride in seen} == {1}


def test_a_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from cli import main

    class Own(nn.Module):
        def __init__(self, num_classes: int, image_size: int) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, stride=4), nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(4 * 8 * 8, num_classes)

        def forward(self, images: Tensor) -> Tensor:
            hidden = torch.relu(self.conv2(torch.relu(self.conv1(images))))
            return self.fc(hidden.view(hidden.size(0), -1))

    monkeypatch.setitem(MODELS, "four-conv", Own)
    settings = ["data.limit_train=40", "data.limit_validation=20", "data.limit_test=20", "training.epochs=1"]
    settings += ["training.milestones=[]", "training.seeds=1", "supernet.seeds=1", "sweep.alphas=[0]", "sweep.seeds=1"]
    settings += ["search.budgets=[2]", "validation.fixed=[2]", "validation.seeds=1", "search.form=dense"]
    settings += ["engine.parallel_seeds=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["run", "--preset", "quickstart", "--out", str(tmp_path / "run"), "--in-process", "--num-cpus", "1"]
    done = CliRunner().invoke(main, [*command, *words])
    assert done.exit_code == 0, done.stderr
