"""Captured steps do what the steps themselves do. On a CPU a stand-in for CUDA's graph replays the call."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_loop import timeless
from torch import Tensor, nn

from gross_ray.btd.options import BTDOptions
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import EngineOptions, Schedule
from gross_ray.space import SearchSpace
from gross_ray.supernet.build import decompose_model
from gross_ray.training import capture
from gross_ray.training.capture import WARM_UP, CapturedStep, captures
from gross_ray.training.draws import EpochDraws
from gross_ray.training.loop import EpochRecord, train
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import finetune
from gross_ray.training.together import Member, finetune_together, reconstruct_together

SCHEDULE = Schedule(epochs=5, lr=0.05, milestones=(3,), batch_size=12, weight_decay=1e-2)
CAPTURE = EngineOptions(capture=True)
STAGES = ["train", "reconstruct", "finetune"]


class StandIn:
    """A graph of a machine without CUDA: what is captured does not run until the replay, and keeps its results."""

    made = 0

    def __init__(self, call: Callable[[], tuple[Tensor, ...]], _: Sequence[torch.Generator], stream: Any) -> None:
        StandIn.made += 1
        self._call = call
        self._results: tuple[Tensor, ...] | None = None

    def replay(self) -> tuple[Tensor, ...]:
        results = self._call()
        if self._results is None:
            self._results = results
        for mine, result in zip(self._results, results, strict=True):
            mine.copy_(result)
        return self._results


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(StandIn, "made", 0)
        monkeypatch.setattr(capture, "Graph", StandIn)
        for module in ("loop", "together"):
            monkeypatch.setattr(f"gross_ray.training.{module}.captures", lambda engine, _: engine.capture)
            monkeypatch.setattr(f"gross_ray.training.{module}.images_of_part", lambda _, inputs: len(inputs))
    return request.param


@pytest.fixture(autouse=True)
def in_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs_of = ImageSet.as_inputs
    monkeypatch.setattr(ImageSet, "as_inputs", lambda self, images: inputs_of(self, images).double())


def images_of(count: int, seed: int, device: str) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(3, (count,), generator=generator)).to(device)


def a_network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1, stride=2),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(96, 3),
        )
    return network.double()


class Training:
    """One of the trainings that there are, from the same start each time it is asked for."""

    def __init__(self, stage: str, device: str) -> None:
        self.stage, self.device = stage, device
        self.images = images_of(40, 0, device)
        self.network = a_network().to(device)
        self.supernets: list[nn.Module] = []
        if stage != "train":
            sizes = {"0": (1, 3), "3": (1, 2, 4)}
            options = BTDOptions(tolerance=1e-2, max_steps=5)
            self.supernets = [
                decompose_model(self.network, layers=list(sizes), group_sizes=sizes, options=options, seed=seed)
                for seed in range(2)
            ]

    def __call__(self, engine: EngineOptions) -> tuple[list[nn.Module], list[list[EpochRecord]]]:
        network = copy.deepcopy(self.network)
        if self.stage == "train":
            history = train(
                network,
                self.images,
                SCHEDULE,
                parameters=dict(network.named_parameters()),
                loss=lambda inputs, labels: F.cross_entropy(network(inputs), labels),
                seed=7,
                set_mode=network.train,
                engine=engine,
            )
            return [network], [history]
        few = self.images.first(10)
        splits = Splits("noise", self.images, few, few, ("a", "b", "c"))
        members = [
            Member(copy.deepcopy(one), seed, ConfigurationSampler(SearchSpace.of(one), 0.5))
            for seed, one in enumerate(self.supernets)
        ]
        if self.stage == "reconstruct":
            outcomes: Any = reconstruct_together(members, network.eval(), splits, SCHEDULE, engine=engine)
        else:
            outcomes = finetune_together(members, splits, SCHEDULE, engine=engine)
        return [member.supernet for member in members], outcomes


@pytest.fixture(params=STAGES)
def training(request: pytest.FixtureRequest, device: str) -> Training:
    return Training(request.param, device)


def test_captured_steps_train_the_same_networks(training: Training) -> None:
    """Order, crops, dropout, configurations, statistics, momenta, the last batch and the decay: all as without."""
    ours, our_histories = training(CAPTURE)
    theirs, their_histories = training(EngineOptions())
    for one, other in zip(ours, theirs, strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-9, atol=1e-12, msg=name)
    for mine, yours in zip(our_histories, their_histories, strict=True):
        for record, expected in zip(timeless(mine), timeless(yours), strict=True):
            assert record.train_loss == pytest.approx(expected.train_loss, rel=1e-9)
            assert record.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-9)
            assert (record.epoch, record.lr, record.val_accuracy) == (
                expected.epoch,
                expected.lr,
                expected.val_accuracy,
            )
    if training.device == "cpu":  # of 12 images and, once each is warm, of the 4 of the last step; for each rate
        assert StandIn.made == 4


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("captured", [False, True])
def test_no_step_waits_for_the_device(stage: str, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(of: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def batches(*arguments: Any) -> Iterator[Any]:
            found = list(of(*arguments))  # their making is a step's, too
            for number, batch in enumerate(found):
                if number > 0:  # the first finds out what there is to draw
                    torch.cuda.set_sync_debug_mode("error")
                yield batch
                torch.cuda.set_sync_debug_mode("default")

        return batches

    training = Training(stage, "cuda")
    training(EngineOptions(capture=captured))  # what is made once
    if not captured:  # a capture itself waits
        monkeypatch.setattr(EpochDraws, "batches", watched(EpochDraws.batches))
        monkeypatch.setattr(EpochDraws, "batches_of_all", staticmethod(watched(EpochDraws.batches_of_all)))
        training(EngineOptions())
    with monkeypatch.context() as patch:
        replay = capture.Graph.replay

        def strict(graph: capture.Graph) -> tuple[Tensor, ...]:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return replay(graph)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        patch.setattr(capture.Graph, "replay", strict)
        training(EngineOptions(capture=captured))


def test_results_are_the_callers_and_arguments_are_taken(device: str) -> None:
    total = torch.zeros((), device=device)

    def step(value: Tensor) -> tuple[Tensor, ...]:
        total.add_(value.sum())
        return (total * 1,)

    captured = CapturedStep(step)
    results = [captured(torch.full((2,), float(number), device=device))[0] for number in range(6)]
    assert [float(result) for result in results] == [0.0, 2.0, 6.0, 12.0, 20.0, 30.0]


def test_what_is_no_tensor_is_that_of_the_capture_until_it_is_forgotten(device: str) -> None:
    rate = 1.0

    def step(value: Tensor) -> tuple[Tensor, ...]:
        return (value * rate,)

    captured = CapturedStep(step)
    one = torch.ones(1, device=device)
    for _ in range(WARM_UP + 1):
        captured(one)
    rate = 3.0
    if device == "cuda":
        assert float(captured(one)[0]) == 1.0
    captured.forget()
    assert float(captured(one)[0]) == 3.0


def test_a_step_that_cannot_be_captured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA tells it where a step asks for a number."""

    @contextmanager
    def capturing(*_: object, **__: object) -> Iterator[None]:
        yield
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might")

    monkeypatch.setattr("torch.cuda.CUDAGraph", object)
    monkeypatch.setattr("torch.cuda.graph", capturing)
    with pytest.raises(InvalidValueError) as told:
        capture.Graph(lambda: (), [], None)
    assert "\n" not in str(told.value)
    assert "operation not permitted when stream is capturing" in str(told.value)
    assert "set engine.capture=false" in str(told.value)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_is_told() -> None:
    captured = CapturedStep(lambda value: (value * float(value.sum()),))
    one = torch.ones(1, device="cuda")
    for _ in range(WARM_UP):
        captured(one)
    with pytest.raises(InvalidValueError, match="cannot be captured"):
        captured(one)
    assert float((one + 1).sum()) == 2.0  # the device goes on


def test_nothing_is_captured_on_a_cpu() -> None:
    assert not captures(CAPTURE, torch.device("cpu"))
    assert captures(CAPTURE, torch.device("cuda"))
    assert not captures(EngineOptions(), torch.device("cuda"))


def test_steps_that_draw_a_configuration_are_not_left_uncaptured_without_a_word(device: str) -> None:
    training = Training("finetune", device)
    few = training.images.first(10)
    splits = Splits("noise", training.images, few, few, ("a", "b", "c"))
    supernet = training.supernets[0]
    sampler = ConfigurationSampler(SearchSpace.of(supernet), 0.5)
    with pytest.raises(InvalidValueError, match=r"finetune_together, or set engine\.capture=false"):
        finetune(supernet, splits, SCHEDULE, seed=0, sampler=sampler, engine=CAPTURE)
