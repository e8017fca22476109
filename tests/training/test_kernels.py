"""Every kernel of `EngineOptions.kernels` trains the same networks, and each is really used."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gross_ray.btd.options import BTDOptions
from gross_ray.data.augment import Crop
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import EngineOptions, Experiment, Schedule
from gross_ray.nn.products import conv2d_by_products
from gross_ray.space import SearchSpace
from gross_ray.supernet import stacked
from gross_ray.supernet.build import decompose_model
from gross_ray.supernet.configure import series_layers
from gross_ray.supernet.series import SeriesConv2d
from gross_ray.training import draws
from gross_ray.training.kernels import kernels_of
from gross_ray.training.options import KERNELS
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import finetune, reconstruct, train_network
from gross_ray.training.together import Member, finetune_together, reconstruct_together

SCHEDULE = Schedule(epochs=3, lr=0.05, milestones=(2,), batch_size=12, weight_decay=1e-2)
ALONE = ("train", "reconstruct", "finetune")
STACKED = ("reconstruct together", "finetune together")


@pytest.fixture(autouse=True)
def in_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs_of = ImageSet.as_inputs
    monkeypatch.setattr(ImageSet, "as_inputs", lambda self, images: inputs_of(self, images).double())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def splits(device: str) -> Splits:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    train = ImageSet(pixels, torch.randint(3, (40,), generator=generator)).to(device)
    return Splits("noise", train, train.first(10), train.first(10), ("a", "b", "c"))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        layers += [nn.Conv2d(4, 6, 3, padding=1, stride=2, padding_mode="reflect"), nn.Dropout(0.3)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 3)).double()


@pytest.fixture(scope="module")
def supernets(network: nn.Module) -> list[nn.Module]:
    sizes = {"0": (1, 3), "3": (1, 2, 4)}
    options = BTDOptions(tolerance=1e-2, max_steps=5)
    choices: dict[str, Any] = {"layers": list(sizes), "group_sizes": sizes, "keep_dense": True}
    return [decompose_model(network, options=options, seed=seed, **choices) for seed in range(2)]


@pytest.fixture(params=[*ALONE, *STACKED])
def training(
    request: pytest.FixtureRequest, splits: Splits, network: nn.Module, supernets: list[nn.Module], device: str
) -> Callable[..., list[nn.Module]]:
    """Do the training from the same start, and return the trained networks."""

    def run(*kernels: str, capture: bool = False) -> list[nn.Module]:
        engine = EngineOptions(kernels=kernels, capture=capture)
        where: dict[str, Any] = {"device": device, "memory_format": torch.channels_last}
        original, *ours = (copy.deepcopy(one).to(**where) for one in (network, *supernets))
        samplers = [ConfigurationSampler(SearchSpace.of(one), 0.5) for one in ours]
        members = [Member(one, seed, sampler) for seed, (one, sampler) in enumerate(zip(ours, samplers, strict=True))]
        options: dict[str, Any] = {"engine": engine}
        if request.param == "train":
            train_network(original, splits, SCHEDULE, seed=7, **options)
            return [original]
        if request.param == "reconstruct":
            reconstruct(ours[0], original, splits, SCHEDULE, seed=7, sampler=samplers[0], **options)
            return ours[:1]
        if request.param == "finetune":
            finetune(ours[0], splits, SCHEDULE, seed=7, sampler=samplers[0], **options)
            return ours[:1]
        if request.param == "reconstruct together":
            reconstruct_together(members, original.eval(), splits, SCHEDULE, **options)
        else:
            finetune_together(members, splits, SCHEDULE, **options)
        return ours

    run.stage = request.param  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize("kernels", [*((kernel,) for kernel in KERNELS), KERNELS], ids=str)
def test_networks_are_the_same(training: Callable[..., list[nn.Module]], kernels: tuple[str, ...]) -> None:
    assert_same(training(*kernels), training())


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("kernels", [*((kernel,) for kernel in KERNELS), KERNELS], ids=str)
def test_networks_are_the_same_if_steps_are_captured(
    training: Callable[..., list[nn.Module]], kernels: tuple[str, ...]
) -> None:
    if training.stage in ("reconstruct", "finetune"):  # type: ignore[attr-defined]
        pytest.skip("steps that draw a configuration are captured as a stack")
    assert_same(training(*kernels, capture=True), training())


def assert_same(some: list[nn.Module], others: list[nn.Module]) -> None:
    for ours, theirs in zip(some, others, strict=True):
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the steps called, by the name of what shows a kernel."""
    seen: list[Any] = []
    convolution, crop, step = F.conv2d, Crop.__call__, torch.optim.SGD.step
    inputs_of, by_products, run_bottleneck = ImageSet.as_inputs, conv2d_by_products, SeriesConv2d.convolve

    def as_inputs(self: ImageSet, images: Tensor) -> Tensor:
        inputs = inputs_of(self, images)
        if torch.is_grad_enabled():  # no evaluation
            seen.append("contiguous" if inputs.is_contiguous() else "channels-last")
            seen.append("cudnn-benchmark" if torch.backends.cudnn.benchmark else "no benchmark")
        return inputs

    def convolved(images: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and weight.shape[-1] > 1 and images.shape[1] > 1:
            seen.extend("contiguous" if one.is_contiguous() else "channels-last" for one in (images, weight))
        return convolution(images, weight, *arguments)

    def multiplied(*arguments: Any) -> Tensor:
        seen.append("products")
        return by_products(*arguments)

    def cropped(self: Crop, images: Tensor, drawn: Tensor) -> Tensor:
        seen.append(("cropped", len(images)))
        return crop(self, images, drawn)

    def stepped(self: torch.optim.SGD, *arguments: Any) -> Any:
        seen.append("fused-sgd" if self.defaults["fused"] else "SGD")
        return step(self, *arguments)

    def bottleneck(self: SeriesConv2d, *arguments: Any, composed: bool = False, **options: Any) -> Tensor:
        seen.append("composed" if composed else "bottleneck")
        return run_bottleneck(self, *arguments, composed=composed, **options)

    monkeypatch.setattr(F, "conv2d", convolved)
    monkeypatch.setattr(stacked, "conv2d_by_products", multiplied)
    monkeypatch.setattr(SeriesConv2d, "convolve", bottleneck)
    monkeypatch.setattr(Crop, "__call__", cropped)
    monkeypatch.setattr(torch.optim.SGD, "step", stepped)
    monkeypatch.setattr(ImageSet, "as_inputs", as_inputs)
    return seen


def test_kernels_are_used_where_they_apply(training: Callable[..., list[nn.Module]], calls: list[Any]) -> None:
    stage = training.stage  # type: ignore[attr-defined]
    training()
    assert not {*KERNELS} & {*calls} - {"contiguous"}
    crops = [len(call) for call in calls if isinstance(call, tuple)]
    calls.clear()
    training(*KERNELS)
    applied = {"contiguous", "cudnn-benchmark"}
    applied |= {"fused-sgd"} if stage in ALONE else {"products"}
    applied |= {"composed"} if stage != "train" else set()
    assert {*KERNELS} & {*calls} == applied
    assert not {"channels-last", "no benchmark", "SGD"} & {*calls}
    cropped = [call for call in calls if isinstance(call, tuple)]
    assert len(crops) == 4 * SCHEDULE.epochs and len(cropped) == SCHEDULE.epochs
    assert {count for _, count in cropped} == {80 if stage in STACKED else 40}


def test_crops_at_once_keep_within_their_bytes(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "AT_ONCE", 30 * 3 * 8 * 8)  # 30 images: two steps of 12
    sizes: list[int] = []
    crop = Crop.__call__
    monkeypatch.setattr(
        Crop, "__call__", lambda self, images, drawn: sizes.append(len(images)) or crop(self, images, drawn)
    )
    plain = list(draws.EpochDraws(splits.train, 3, SCHEDULE).batches(12))
    assert sizes == [12, 12, 12, 4]
    sizes.clear()
    together = list(draws.EpochDraws(splits.train, 3, SCHEDULE).batches(12, at_once=True))
    assert sizes == [24, 16]
    for (one, labels), (other, expected) in zip(together, plain, strict=True):
        assert torch.equal(one, other) and torch.equal(labels, expected)


def test_settings_are_as_before_after_an_error(supernets: list[nn.Module]) -> None:
    supernet = copy.deepcopy(supernets[0])
    with pytest.raises(KeyError), kernels_of(EngineOptions(kernels=KERNELS), supernet):
        assert torch.backends.cudnn.benchmark
        assert all(layer.composed for layer in series_layers(supernet).values())
        raise KeyError
    assert not torch.backends.cudnn.benchmark
    assert not any(layer.composed for layer in series_layers(supernet).values())


@pytest.mark.parametrize("wrong", [("faster",), ("composed", "composed")])
def test_unknown_kernels_are_refused(wrong: tuple[str, ...]) -> None:
    with pytest.raises(InvalidValueError, match=r"engine\.kernels = .*: must be among fused-sgd, .*, each named once"):
        EngineOptions(kernels=wrong)


def test_kernels_that_nothing_uses_are_reported() -> None:
    of_stacks = Experiment().override(['engine.kernels=["products"]'])
    assert any("engine.kernels = products: no supernets are stacked" in line for line in of_stacks.without_effect())
    assert of_stacks.override(["engine.capture=true"]).without_effect(device="cpu")[1:] == [
        "engine.kernels = products: engine.capture stacks supernets on a GPU only, not on cpu"
    ]
    for setting in ("engine.capture=true", "engine.compile=true", "engine.parallel_seeds=2"):
        assert not of_stacks.override([setting]).without_effect()
    of_gpus = dataclasses.replace(Experiment(), engine=EngineOptions(kernels=("cudnn-benchmark",)))
    assert of_gpus.without_effect(device="cuda:0") == of_gpus.without_effect() == []
    assert of_gpus.without_effect(device="cpu") == [
        "engine.kernels = cudnn-benchmark: trainings run on cpu, which has no cuDNN"
    ]
