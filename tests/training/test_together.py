import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_loop import Slot, timeless
from torch import Tensor, nn

from gross_ray.btd.options import BTDOptions
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import DivergedError, InvalidValueError
from gross_ray.experiment import EngineOptions, Schedule
from gross_ray.space import DENSE, Configuration, SearchSpace
from gross_ray.supernet.build import decompose_model
from gross_ray.supernet.configure import series_layers, set_configuration
from gross_ray.supernet.stacked import SupernetStack
from gross_ray.training import loop, together
from gross_ray.training.loop import EpochRecord
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import finetune, reconstruct
from gross_ray.training.together import (
    Member,
    Outcome,
    check_stackable,
    finetune_together,
    reconstruct_together,
)

SIZES = {"0": (1, 3), "3": (1, 2, 4), "6": (2,)}
SCHEDULE = Schedule(epochs=3, lr=0.05, milestones=(2,), batch_size=12, weight_decay=1e-2)
ALPHAS = (0.0, 2.0, 0.5)


@pytest.fixture(scope="module")
def splits() -> Splits:
    def images(count: int, seed: int) -> ImageSet:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.randint(3, (count,), generator=generator))

    return Splits("noise", images(40, 0), images(30, 1), images(30, 2), ("a", "b", "c"))


@pytest.fixture(scope="module")
def original() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1, stride=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(6, 5, 1, bias=False),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(20, 3),
        )
    return network.double().eval()


def decomposed(original: nn.Module, **more: Any) -> list[nn.Module]:
    options = BTDOptions(tolerance=1e-3, max_steps=20)
    return [
        decompose_model(original, layers=list(SIZES), group_sizes=SIZES, options=options, seed=seed, **more)
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def supernets(original: nn.Sequential) -> list[nn.Module]:
    return decomposed(original)


@pytest.fixture(autouse=True)
def in_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality but for rounding is told from anything else with 16 digits, not with 7."""
    inputs_of = ImageSet.as_inputs
    monkeypatch.setattr(ImageSet, "as_inputs", lambda self, images: inputs_of(self, images).double())
    monkeypatch.setattr(loop, "PART", 5)


def members(supernets: list[nn.Module], **more: Any) -> list[Member]:
    return [
        Member(copy.deepcopy(supernet), 10 + place, ConfigurationSampler(SearchSpace.of(supernet), alpha), **more)
        for place, (supernet, alpha) in enumerate(zip(supernets, ALPHAS, strict=True))
    ]


Stage = Callable[..., Any]


@pytest.fixture(params=["reconstruct", "finetune"])
def stage(request: pytest.FixtureRequest, original: nn.Sequential, splits: Splits) -> tuple[Stage, Stage]:
    """Either stage, as (of one member, of all together)."""

    def one(member: Member, schedule: Schedule = SCHEDULE, **options: Any) -> list[EpochRecord]:
        arguments = {"seed": member.seed, "sampler": member.sampler, "checkpoint": member.checkpoint, **options}
        if request.param == "reconstruct":
            return reconstruct(member.supernet, copy.deepcopy(original), splits, schedule, **arguments)
        return finetune(member.supernet, splits, schedule, **arguments)

    def all_of_them(members: list[Member], schedule: Schedule = SCHEDULE, **options: Any) -> list[Outcome]:
        if request.param == "reconstruct":
            return reconstruct_together(members, copy.deepcopy(original), splits, schedule, **options)
        return finetune_together(members, splits, schedule, **options)

    return one, all_of_them


def assert_close(ours: nn.Module, theirs: nn.Module) -> None:
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(
            tensor, wanted[name], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_history(ours: Outcome, theirs: list[EpochRecord]) -> None:
    assert isinstance(ours, list) and len(ours) == len(theirs)
    for one, other in zip(timeless(ours), timeless(theirs), strict=True):
        ours_by_name, theirs_by_name = ({k: v for k, v in vars(each).items() if v is not None} for each in (one, other))
        assert ours_by_name == pytest.approx(theirs_by_name, rel=1e-9)


def test_each_is_trained_as_by_itself(supernets: list[nn.Module], stage: tuple[Stage, Stage]) -> None:
    alone, together = members(supernets), members(supernets)
    histories = [stage[0](member) for member in alone]
    outcomes = stage[1](together)
    for ours, theirs, outcome, history, before in zip(together, alone, outcomes, histories, supernets, strict=True):
        assert_close(ours.supernet, theirs.supernet)
        assert_same_history(outcome, history)
        assert not torch.equal(ours.supernet.get_submodule("3").grouped[0], before.get_submodule("3").grouped[0])


def test_each_is_trained_as_by_itself_where_layers_may_stay_dense(
    original: nn.Sequential, stage: tuple[Stage, Stage]
) -> None:
    supernets = decomposed(original, keep_dense=True)
    alone, together = members(supernets), members(supernets)
    drawn: list[Configuration] = []
    for member in alone:
        draw = member.sampler.draw
        member.sampler.draw = lambda generator, draw=draw: drawn.append(draw(generator)) or drawn[-1]  # type: ignore[method-assign, func-returns-value]
    histories = [stage[0](member) for member in alone]
    assert Configuration([DENSE] * 3) in drawn  # a step without gradients
    outcomes = stage[1](together)
    for ours, theirs, outcome, history in zip(together, alone, outcomes, histories, strict=True):
        assert_close(ours.supernet, theirs.supernet)
        assert_same_history(outcome, history)
        for name in SIZES:
            dense = ours.supernet.get_submodule(name).dense_weight
            assert torch.equal(dense, original.get_submodule(name).weight)


def test_parts_of_one_member_are_the_supernet_by_itself(supernets: list[nn.Module]) -> None:
    stack = SupernetStack(supernets)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for place, supernet in enumerate(supernets):
        for configuration in SearchSpace.of(supernet):
            set_configuration(supernet, configuration)
            terms = {name: term[place] for name, term in stack.terms.items()}
            active = {name: mask[0] for name, mask in stack.active([[configuration]])[0].items()}
            ours = torch.func.functional_call(stack.template.eval(), {**terms, **active}, (images,))
            torch.testing.assert_close(ours, supernet.eval()(images), rtol=1e-10, atol=1e-12)
        for name, tensor in stack.unstack(stack.terms, place).items():
            assert torch.equal(tensor, dict(supernet.named_parameters())[name]), name


def test_resumed_from_checkpoints_of_either_kind(supernets: list[nn.Module], stage: tuple[Stage, Stage]) -> None:
    """One member has two epochs of a training by itself, one has one epoch of them together, one nothing."""
    undisturbed = members(supernets)
    histories = [stage[0](member) for member in undisturbed]
    slots = [Slot(), Slot(), Slot()]
    begun = [replace(one, checkpoint=slot) for one, slot in zip(members(supernets), slots, strict=True)]
    stage[0](begun[0], replace(SCHEDULE, epochs=2))
    stage[1](begun[1:2], replace(SCHEDULE, epochs=1))
    again = [replace(one, checkpoint=slot) for one, slot in zip(members(supernets), slots, strict=True)]
    outcomes = stage[1](again)
    for ours, theirs, outcome, history in zip(again, undisturbed, outcomes, histories, strict=True):
        assert_close(ours.supernet, theirs.supernet)
        assert_same_history(outcome, history)
    assert [len(slot.saved) for slot in slots] == [3, 3, 3]
    finished = members(supernets)[2]
    stage[0](replace(finished, checkpoint=slots[2]))  # nothing left to do: what is stored is the last epoch's
    assert_close(finished.supernet, undisturbed[2].supernet)


def test_one_that_diverges_leaves_the_others_as_they_are(
    supernets: list[nn.Module], stage: tuple[Stage, Stage]
) -> None:
    alone, together = members(supernets), members(supernets)
    broken = together[1].supernet.get_submodule("3")
    with torch.no_grad():
        broken.grouped[2].fill_(float("nan"))  # met at the first draw of its group-size
    outcomes = stage[1](together)
    assert isinstance(outcomes[1], DivergedError) and "of epoch 1 with learning rate 0.05" in str(outcomes[1])
    for place in (0, 2):
        assert_same_history(outcomes[place], stage[0](alone[place]))
        assert_close(together[place].supernet, alone[place].supernet)


@pytest.mark.parametrize("count", [1, 2])
def test_all_diverge(supernets: list[nn.Module], stage: tuple[Stage, Stage], count: int) -> None:
    together = members(supernets)[:count]
    for member in together:
        with torch.no_grad():
            member.supernet.get_submodule("6").grouped[0].fill_(float("nan"))
    outcomes = stage[1](together)
    assert len(outcomes) == count
    assert all(isinstance(outcome, DivergedError) and "of epoch 1" in str(outcome) for outcome in outcomes)


def test_each_has_its_share_of_the_seconds(
    supernets: list[nn.Module], stage: tuple[Stage, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three members share the epoch's 6 seconds; of 40 images each."""
    clock = itertools.count(step=6.0)
    monkeypatch.setattr(together.time, "perf_counter", lambda: next(clock))
    (first, *_), *_ = stage[1](members(supernets))
    assert (first.seconds, first.images_per_second) == (2.0, 20.0)


def test_supernets_of_different_networks_are_refused(supernets: list[nn.Module], splits: Splits) -> None:
    others = members(supernets)
    with torch.no_grad():
        others[2].supernet.get_submodule("10").bias.add_(1)
    with pytest.raises(InvalidValueError, match=r"must come from one network: '10.bias' differs"):
        finetune_together(others, splits, SCHEDULE)
    fewer = members(supernets)
    series = series_layers(fewer[0].supernet)["3"]
    series.group_sizes = series.group_sizes[:-1]
    with pytest.raises(InvalidValueError, match="their group-sizes differ"):
        SupernetStack([member.supernet for member in fewer])


def test_a_dropout_that_is_used_twice_is_refused(supernets: list[nn.Module], splits: Splits) -> None:
    twice = members(supernets)
    for member in twice:
        member.supernet[9] = member.supernet[7]
    with pytest.raises(InvalidValueError, match=r"dropout '7' is used twice .*engine.parallel_seeds=1"):
        finetune_together(twice, splits, SCHEDULE)


class Look(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images if float(images.sum()) > 0 else -images


class Blink(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images * torch.rand_like(images)


def test_random_numbers_of_other_kinds_are_refused(supernets: list[nn.Module], splits: Splits) -> None:
    blinking = members(supernets)
    for member in blinking:
        member.supernet[2] = Blink()
    with pytest.raises(InvalidValueError, match=r"random numbers other than by nn.Dropout.*engine.parallel_seeds=1"):
        finetune_together(blinking, splits, SCHEDULE)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (EngineOptions(capture=True), "engine.capture=false"),
        (EngineOptions(compile=True, parallel_seeds=2), "engine.parallel_seeds=1, engine.compile=false"),
    ],
)
def test_what_no_stack_can_have_is_told_with_the_options_that_stack(
    supernets: list[nn.Module], engine: EngineOptions, options: str
) -> None:
    single = copy.deepcopy(supernets[0])
    before = copy.deepcopy(single.state_dict())
    check_stackable(single, (3, 8, 8), engine)
    assert all(torch.equal(value, before[name]) for name, value in single.state_dict().items())
    single[2] = Look()
    with pytest.raises(InvalidValueError, match=r"cannot be mapped over several supernets: .*item.*: train"):
        check_stackable(single, (3, 8, 8), engine)
    single[2] = Blink()
    with pytest.raises(InvalidValueError, match=rf"than by nn.Dropout: train .* one by one \({options}\)$"):
        check_stackable(single, (3, 8, 8), engine)


def test_a_convolution_that_is_used_twice_is_trained_as_by_itself(splits: Splits) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shared = nn.Conv2d(4, 4, 3, padding=1)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(144, 3)
        ).double()
    options = BTDOptions(tolerance=1e-3)
    supernets = [decompose_model(network, group_sizes={"2": (1, 4)}, options=options, seed=seed) for seed in range(3)]
    ours, theirs = members(supernets), members(supernets)
    finetune_together(ours, splits, SCHEDULE)
    reconstruct_together(ours, network, splits, SCHEDULE)
    for member in theirs:
        finetune(member.supernet, splits, SCHEDULE, seed=member.seed, sampler=member.sampler)
        reconstruct(member.supernet, network, splits, SCHEDULE, seed=member.seed, sampler=member.sampler)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one.supernet, other.supernet)


@pytest.mark.parametrize("stage", ["reconstruct", "finetune"])
def test_a_compiler_of_forward_and_backward_takes_the_loss(
    supernets: list[nn.Module], original: nn.Module, splits: Splits, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AOTAutograd, as under inductor, refuses tensors of the mapped members that leave the graph by a side door."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="aot_eager", dynamic=False))
    torch._dynamo.reset()
    compiled, plain = members(supernets), members(supernets)
    for those, engine in ((compiled, EngineOptions(compile=True)), (plain, EngineOptions())):
        if stage == "finetune":
            finetune_together(those, splits, SCHEDULE, engine=engine)
        else:
            reconstruct_together(those, original, splits, SCHEDULE, engine=engine)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert_close(ours.supernet, theirs.supernet)


@pytest.mark.parametrize("stage", ["reconstruct", "finetune"])
def test_one_graph_serves_all_configurations(
    supernets: list[nn.Module], original: nn.Module, splits: Splits, stage: str
) -> None:
    """The compiled loss is traced once for each size of a batch or part, however many configurations are drawn."""

    def train(those: list[Member], engine: EngineOptions = EngineOptions()) -> None:  # noqa: B008 (frozen)
        if stage == "finetune":
            finetune_together(those, splits, SCHEDULE, engine=engine)
        else:
            reconstruct_together(those, original, splits, SCHEDULE, engine=engine)

    torch._dynamo.reset()
    graphs = 0

    def counted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = members(supernets)
    with pytest.MonkeyPatch.context() as patch:
        compile_ = torch.compile
        patch.setattr(torch, "compile", lambda function: compile_(function, backend=counted, dynamic=False))
        train(compiled, EngineOptions(compile=True))
    plain = members(supernets)
    train(plain)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert_close(ours.supernet, theirs.supernet)
    assert 0 < graphs <= 3  # parts of 5, 2 and 4 images
