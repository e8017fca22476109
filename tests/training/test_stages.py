import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gross_ray.btd.options import BTDOptions
from gross_ray.btd.solver import block_term_decomposition
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.normalisation import Normalisation
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Schedule
from gross_ray.space import DENSE, Configuration, SearchSpace
from gross_ray.supernet.build import build_supernet, decompose_model
from gross_ray.supernet.configure import extract, get_configuration, set_configuration
from gross_ray.supernet.series import SeriesConv2d
from gross_ray.training import stages
from gross_ray.training.loop import accuracy
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import finetune, reconstruct, response_error, train_network
from gross_ray.training.together import Member, reconstruct_together

SIZES: Mapping[str, Sequence[int]] = {"3": (1, 2, 4), "6": (2, 6)}
SCHEDULE = Schedule(epochs=3, lr=0.003, batch_size=10, weight_decay=0.0, augment="none")
Stage = Callable[..., Any]


def make_set(num_images: int, seed: int) -> ImageSet:
    """Images of three classes, told apart by which colour is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % 3
    pixels = torch.randint(200, (num_images, 3, 8, 8), generator=generator)
    pixels[torch.arange(num_images), labels] += 40
    return ImageSet(pixels.to(torch.uint8), labels)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits("colours", make_set(60, 0), make_set(30, 1), make_set(30, 2), ("red", "green", "blue"))


@pytest.fixture(scope="module")
def original(splits: Splits) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(20, 3),
        )
    train_network(network, splits, Schedule(epochs=3, lr=0.01, batch_size=10, augment="none"), seed=0)
    return network.eval()


@pytest.fixture(scope="module")
def decomposed(original: nn.Sequential) -> nn.Module:
    options = BTDOptions(tolerance=1e-3)
    return decompose_model(original, layers=list(SIZES), group_sizes=SIZES, options=options)


@pytest.fixture
def supernet(decomposed: nn.Module) -> nn.Module:
    return copy.deepcopy(decomposed)


@pytest.fixture(params=["reconstruct", "finetune"])
def stage(request: pytest.FixtureRequest, original: nn.Sequential, splits: Splits) -> Stage:
    """Either stage, called as stage(supernet, schedule, **options)."""

    def run(supernet: nn.Module, schedule: Schedule = SCHEDULE, **options: Any) -> Any:
        if request.param == "reconstruct":
            return reconstruct(supernet, original, splits, schedule, seed=3, **options)
        return finetune(supernet, splits, schedule, seed=3, **options)

    return run


def uniform_sampler(supernet: nn.Module) -> ConfigurationSampler:
    return ConfigurationSampler(SearchSpace.of(supernet), 0.0)


def series_terms(supernet: nn.Module) -> set[str]:
    kinds = ("pointwise_in", "grouped", "pointwise_out")
    return {f"{name}.{kind}.{place}" for name, sizes in SIZES.items() for kind in kinds for place in range(len(sizes))}


def changed(network: nn.Module, before: nn.Module) -> set[str]:
    old = before.state_dict()
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, old[name])}


def errors_of_responses(network: nn.Module, original: nn.Sequential, images: ImageSet) -> list[float]:
    """Eq. 9 of each decomposed layer, with the layers run by hand and numpy for the norms."""
    ours = theirs = Normalisation()(images.images)
    errors = []
    with torch.no_grad():
        for name, layer in original.named_children():
            ours, theirs = network.get_submodule(name)(ours), layer(theirs)
            if name in SIZES:
                errors.append(float(np.linalg.norm((ours - theirs).numpy()) / np.linalg.norm(theirs.numpy())))
    return errors


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_response_error_is_equation_9(shape: list[int], seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    response, target = rng.normal(size=shape), rng.normal(size=shape) * scale
    expected = np.sqrt(((response - target) ** 2).sum()) / np.sqrt((target**2).sum())
    found = response_error(torch.from_numpy(response), torch.from_numpy(target))
    assert found.shape == ()
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert float(response_error(torch.from_numpy(target), torch.from_numpy(target))) == 0


def test_reconstruction_lowers_the_response_error(supernet: nn.Module, original: nn.Sequential, splits: Splits) -> None:
    def errors() -> np.ndarray:
        networks = [extract(supernet, member) for member in SearchSpace.of(supernet)]
        return np.array([errors_of_responses(network, original, splits.train) for network in networks])

    before = errors()
    reconstruct(supernet, original, splits, SCHEDULE, seed=0, sampler=uniform_sampler(supernet))
    after = errors()
    assert (after.mean(axis=0) < before.mean(axis=0)).all(), (before, after)  # in each layer


def test_reconstruction_loss_is_the_sum_of_equation_9_over_the_layers(
    supernet: nn.Module, original: nn.Sequential, splits: Splits
) -> None:
    # One batch of all images: the first loss is that of the network before its first step.
    schedule = Schedule(epochs=1, lr=1e-3, batch_size=60, augment="none")
    set_configuration(supernet, (2, 2))
    expected = sum(errors_of_responses(copy.deepcopy(supernet).eval(), original, splits.train))
    (record,) = reconstruct(supernet, original, splits, schedule, seed=0)
    assert record.train_loss == pytest.approx(expected, rel=1e-5)
    assert record.val_accuracy is None


class Twice(nn.Module):
    """Calls one convolution twice, at two sizes of the image, and another once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 8, 3, padding=1)

    def calls(self, images: torch.Tensor) -> list[torch.Tensor]:
        early = self.shared(self.first(images).relu())
        late = self.shared(F.max_pool2d(early.relu(), 2))
        return [early, late, self.last(late.relu())]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.calls(images)[-1].mean((2, 3))[:, :3]


def a_network_that_calls_a_layer_twice() -> tuple[Twice, Twice]:
    """Return it and its supernet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Twice().double()
    options = BTDOptions(tolerance=1e-3)
    supernet = decompose_model(network, group_sizes={"shared": (1, 4), "last": (1, 2)}, options=options)
    assert isinstance(supernet, Twice)
    return network, supernet


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_each_call_of_a_layer_counts_in_the_response_error(
    splits: Splits, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageSet, "as_inputs", lambda self, images: images.double() / 255)
    network, supernet = a_network_that_calls_a_layer_twice()
    set_configuration(supernet, (1, 1))
    images = splits.train.as_inputs(splits.train.images)
    with torch.no_grad():
        pairs = zip(supernet.calls(images), network.calls(images), strict=True)
        errors = [float(((ours - theirs) ** 2).sum().sqrt() / (theirs**2).sum().sqrt()) for ours, theirs in pairs]
    schedule = Schedule(epochs=1, lr=1e-9, batch_size=len(splits.train), augment="none")
    largest_never = ConfigurationSampler(SearchSpace.of(supernet), 1000.0)  # draws the smallest group-sizes
    if together:
        (history,) = reconstruct_together([Member(supernet, 0, largest_never)], network, splits, schedule)
        assert isinstance(history, list)
    else:
        history = reconstruct(supernet, network, splits, schedule, seed=0, sampler=largest_never)
    assert len(errors) == 3
    assert min(errors) > 0.01
    assert history[0].train_loss == pytest.approx(sum(errors), rel=1e-6)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_an_activation_in_place_leaves_the_responses_as_the_layers_gave_them(splits: Splits, together: bool) -> None:
    losses = []
    for inplace in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 3)]
            network = nn.Sequential(*layers, nn.ReLU(inplace))
        supernet = decompose_model(network, options=BTDOptions(tolerance=1e-2))
        schedule, sampler = Schedule(epochs=1, lr=1e-3, augment="none"), uniform_sampler(supernet)
        if together:
            (history,) = reconstruct_together([Member(supernet, 0, sampler)], network, splits, schedule)
            assert isinstance(history, list)
        else:
            history = reconstruct(supernet, network, splits, schedule, seed=0, sampler=sampler)
        losses.append(history[0].train_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_passes_between_two_steps_are_no_calls_of_a_step(splits: Splits, together: bool) -> None:
    """As of a trial that measures its supernet, and whoever else uses the full network, after each epoch."""
    losses = {}
    for measured in (False, True):
        network, supernet = (one.float() for one in a_network_that_calls_a_layer_twice())

        def look(_: object, pair: tuple[nn.Module, ...] = (network, supernet), measured: bool = measured) -> None:
            for one in pair if measured else ():
                with torch.no_grad():
                    one(splits.train.as_inputs(splits.train.images[:2]))

        schedule = Schedule(epochs=2, lr=1e-3, augment="none")
        sampler = uniform_sampler(supernet)
        if together:
            (history,) = reconstruct_together([Member(supernet, 0, sampler, None, look)], network, splits, schedule)
            assert isinstance(history, list)
        else:
            history = reconstruct(supernet, network, splits, schedule, seed=0, sampler=sampler, on_epoch=look)
        losses[measured] = [record.train_loss for record in history]
    assert losses[True] == losses[False]


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_networks_that_call_a_layer_different_numbers_of_times_are_refused(splits: Splits, together: bool) -> None:
    class Once(Twice):
        def calls(self, images: torch.Tensor) -> list[torch.Tensor]:
            early = self.shared(self.first(images).relu())
            return [early, self.last(early.relu())]

    network, supernet = (one.float() for one in a_network_that_calls_a_layer_twice())
    once = Once()
    once.load_state_dict(network.state_dict())
    schedule = Schedule(epochs=1, lr=1e-9, augment="none")
    with pytest.raises(InvalidValueError, match="'shared' is called 2 times in the supernet and 1 times in the full"):
        if together:
            reconstruct_together([Member(supernet, 0, uniform_sampler(supernet))], once, splits, schedule)
        else:
            reconstruct(supernet, once, splits, schedule, seed=0)


def test_nothing_is_dropped_or_normalised_anew_while_reconstructing(splits: Splits) -> None:
    """Whatever modes the networks come in, also with dropout and batch-norm between the decomposed layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3)
        )
    supernet = decompose_model(network, group_sizes=(2,), options=BTDOptions(tolerance=1e-2))
    images = Normalisation()(splits.train.images)
    with torch.no_grad():
        ours, theirs = images, images
        expected = 0.0
        for place, (one, other) in enumerate(zip(copy.deepcopy(supernet).eval(), network.eval(), strict=True)):
            ours, theirs = one(ours), other(theirs)
            if place in (1, 4):
                expected += float((ours - theirs).norm() / theirs.norm())
    schedule = Schedule(epochs=1, lr=1e-3, batch_size=len(images), augment="none")
    before = copy.deepcopy(network.state_dict())
    (record,) = reconstruct(supernet.train(), network.train(), splits, schedule, seed=0)
    assert record.train_loss == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_finetuning_lowers_the_classification_loss(supernet: nn.Module, splits: Splits) -> None:
    set_configuration(supernet, (1, 2))

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(supernet.eval()(Normalisation()(splits.train.images)), splits.train.labels))

    before = loss()
    history = finetune(supernet, splits, SCHEDULE, seed=0)
    assert loss() < before
    assert history[-1].val_accuracy == accuracy(supernet, splits.validation)


def test_only_the_terms_of_the_series_change(stage: Stage, supernet: nn.Module) -> None:
    before = copy.deepcopy(supernet)
    stage(supernet, sampler=uniform_sampler(supernet))
    assert changed(supernet, before) == series_terms(supernet)  # no bias, no batch-norm statistic, no other layer
    assert {name for name, one in supernet.named_parameters() if one.requires_grad} == series_terms(supernet)


def test_original_network_is_left_as_it_was(supernet: nn.Module, original: nn.Sequential, splits: Splits) -> None:
    before = copy.deepcopy(original)
    original.zero_grad()
    reconstruct(supernet, original, splits, SCHEDULE, seed=0)
    assert changed(original, before) == set()
    assert all(parameter.grad is None for parameter in original.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays_behind(supernet: nn.Module, original: nn.Sequential, splits: Splits, fails: bool) -> None:
    def on_epoch(_record: object) -> None:
        if fails:
            raise KeyboardInterrupt

    try:
        reconstruct(supernet, original, splits, SCHEDULE, seed=0, on_epoch=on_epoch)
    except KeyboardInterrupt:
        assert fails
    for module in [*supernet.modules(), *original.modules()]:
        assert not module._forward_hooks


@pytest.mark.parametrize("configuration", [(1, 2), (2, 2), (4, 6)])
def test_without_sampler_the_active_configuration_is_trained_and_stays(
    stage: Stage, supernet: nn.Module, configuration: tuple[int, int]
) -> None:
    active: list[tuple[int, ...]] = []
    supernet[0].register_forward_hook(lambda *_: active.append(get_configuration(supernet)))
    before = copy.deepcopy(supernet)
    set_configuration(supernet, configuration)
    stage(supernet)
    assert set(active) == {configuration}
    assert get_configuration(supernet) == configuration
    # The terms above the active group-size take no part: no gradient, no momentum, and here no decay.
    trained = {
        name
        for name in series_terms(supernet)
        for layer, size in zip(SIZES, configuration, strict=True)
        if name.startswith(f"{layer}.") and int(name.rsplit(".", 1)[1]) <= SIZES[layer].index(size)
    }
    assert changed(supernet, before) == trained


def test_sampler_draws_anew_at_every_step(stage: Stage, supernet: nn.Module, splits: Splits) -> None:
    drawn: list[tuple[int, ...]] = []
    used: list[tuple[int, ...]] = []
    sampler = uniform_sampler(supernet)

    class Recorder(ConfigurationSampler):
        def draw(self, generator: torch.Generator) -> Any:
            drawn.append(sampler.draw(generator))
            return drawn[-1]

    def note(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            used.append(get_configuration(supernet))

    supernet[0].register_forward_pre_hook(note)
    schedule = Schedule(epochs=6, lr=1e-3, batch_size=6, augment="none")
    stage(supernet, schedule, sampler=Recorder(SearchSpace.of(supernet), 0.0))
    assert len(drawn) == 60
    assert used == drawn
    counts = Counter(drawn)
    assert set(counts) == set(product(*SIZES.values()))
    assert max(counts.values()) < 30


def test_accuracy_while_sampling_is_that_of_the_largest_group_sizes(supernet: nn.Module, splits: Splits) -> None:
    history = finetune(supernet, splits, SCHEDULE, seed=0, sampler=uniform_sampler(supernet))
    assert history[-1].val_accuracy == accuracy(extract(supernet, (4, 6)), splits.validation)


def test_finetuning_drops_out_and_leaves_batch_norm_alone(supernet: nn.Module, splits: Splits) -> None:
    modes: dict[str, set[bool]] = {"dropout": set(), "batch-norm": set()}

    def note(module: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        if not torch.is_inference_mode_enabled():
            modes["dropout" if isinstance(module, nn.Dropout) else "batch-norm"].add(module.training)

    for module in supernet.modules():
        if isinstance(module, nn.Dropout | nn.BatchNorm2d):
            module.register_forward_pre_hook(note)
    finetune(supernet, splits, SCHEDULE, seed=0)
    assert modes == {"dropout": {True}, "batch-norm": {False}}


def test_finetuning_leaves_the_statistics_of_other_norms_alone(splits: Splits) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.InstanceNorm2d(4, track_running_stats=True),
            nn.Conv2d(4, 4, 3),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
    supernet = decompose_model(network, group_sizes=(2,), options=BTDOptions(tolerance=1e-2))
    before = copy.deepcopy(supernet)
    finetune(supernet, splits, SCHEDULE, seed=0)
    assert {name.split(".")[0] for name in changed(supernet, before)} == {"2"}


def test_a_parameter_that_needs_no_gradient_is_not_trained(original: nn.Sequential, splits: Splits) -> None:
    network = copy.deepcopy(original)
    network[3].weight.requires_grad_(False)
    train_network(network, splits, replace(SCHEDULE, weight_decay=1e-3), seed=1)
    assert changed(network, original) == set(original.state_dict()) - {"3.weight"}
    with pytest.raises(InvalidValueError, match="there is nothing to train"):
        train_network(network.requires_grad_(False), splits, SCHEDULE, seed=1)


def test_base_network_trains_all_of_itself_and_learns(original: nn.Sequential, splits: Splits) -> None:
    assert accuracy(original, splits.validation) > 0.7
    network = copy.deepcopy(original)
    history = train_network(network, splits, replace(SCHEDULE, weight_decay=1e-3), seed=1)
    assert changed(network, original) == set(original.state_dict())
    assert len(history) == 3
    assert history[-1].val_accuracy == accuracy(network, splits.validation)


def test_supernet_of_one_layer_is_itself_the_network(splits: Splits) -> None:
    # A series as the whole network has the name "": hooks and parameters must find it too.
    conv = nn.Conv2d(3, 2, 3)
    series = SeriesConv2d(conv, [1, 3])
    for parameter in series.series_parameters():
        nn.init.constant_(parameter, 0.1)
    reconstruct(series, conv, splits, SCHEDULE, seed=0)
    assert {name for name, _ in stages.freeze_all_but_series(series).items()} == {
        f"{kind}.{place}" for kind in ("pointwise_in", "grouped", "pointwise_out") for place in range(2)
    }


@pytest.mark.parametrize("configuration", [(2, 6), (1, DENSE), (DENSE, DENSE)])
def test_all_trains_the_network_that_the_configuration_extracts(
    configuration: tuple[int, int], original: nn.Sequential, splits: Splits
) -> None:
    """The oracle is the training of the extracted plain network, whose parameters are the same."""
    chosen = dict(zip(SIZES, configuration, strict=True))
    bottlenecks = {
        name: [block_term_decomposition(original.get_submodule(name).weight, size).to_bottleneck()]  # type: ignore[arg-type]
        for name, size in chosen.items()
        if size != DENSE
    }
    dense = [name for name, size in chosen.items() if size == DENSE]
    own = build_supernet(original, bottlenecks | {name: [] for name in dense}, dense)
    started, before = extract(own, Configuration(configuration)), copy.deepcopy(original)
    plain = copy.deepcopy(started)
    schedule = replace(SCHEDULE, lr=0.01, weight_decay=1e-3)
    ours = finetune(own, splits, schedule, seed=3, trainable="all")
    theirs = train_network(plain.requires_grad_(), splits, schedule, seed=3)
    trained = extract(own, Configuration(configuration))
    assert trained.state_dict().keys() == plain.state_dict().keys()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert [record.train_loss for record in ours] == pytest.approx([record.train_loss for record in theirs], rel=1e-3)
    assert not changed(original, before)
    assert changed(trained, started) >= {"0.weight", "1.running_mean", "9.weight"}
