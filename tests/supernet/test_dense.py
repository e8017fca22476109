"""Layers that may stay as they are: the choice DENSE of a series, of a space, of costs and of an evaluation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gross_ray.btd.options import BTDOptions
from gross_ray.errors import InvalidValueError
from gross_ray.models import four_conv
from gross_ray.search.cost import configuration_macs, count_macs, layer_costs, peak_activations
from gross_ray.search.evaluator import NotTraceableWarning, evaluate_configurations
from gross_ray.search.latency import LatencyModel, LatencyOptions, measure_latency
from gross_ray.search.layer_forms import Siblings
from gross_ray.space import DENSE, Configuration, SearchSpace
from gross_ray.supernet.build import decompose_model
from gross_ray.supernet.configure import extract, largest_decomposed, set_configuration
from gross_ray.supernet.layers import choice_of
from gross_ray.supernet.series import SeriesConv2d
from gross_ray.training.sampling import ConfigurationSampler, sampling_probabilities

SHAPE = (3, 12, 12)


def network() -> nn.Sequential:
    """A small network with a stride, batch-norm and a layer without a bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, (3, 1), padding="same", padding_mode="reflect"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        ).eval()


@pytest.fixture(scope="module")
def original() -> nn.Sequential:
    return network().double()


@pytest.fixture(scope="module")
def supernet(original: nn.Sequential) -> nn.Module:
    options = BTDOptions(tolerance=1e-2, max_steps=10)
    return decompose_model(original, group_sizes=(1, 4), options=options, keep_dense=True, input_shape=SHAPE)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


choices = st.one_of(st.just(DENSE), st.integers(1, 99))


@given(st.lists(choices, min_size=1, max_size=6))
def test_a_configuration_is_read_as_it_is_written(sizes: list[int]) -> None:
    configuration = Configuration(sizes)
    assert str(configuration) == "-".join("d" if size == 0 else str(size) for size in sizes)
    assert Configuration.parse(str(configuration)) == configuration
    assert eval(repr(configuration)) == configuration


@pytest.mark.parametrize("text", ["0", "1-0", "D", "dd", "d-", "-d", "1-d4", "d 4"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match="d for a layer that stays as it is"):
        Configuration.parse(text)


@given(st.lists(st.sets(choices, min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_space_counts_the_dense_layer_as_its_last_choice(layers: list[set[int]]) -> None:
    space = SearchSpace({f"conv{number}": sizes for number, sizes in enumerate(layers)})
    for sizes, given_ones in zip(space.group_sizes.values(), layers, strict=True):
        assert set(sizes) == given_ones
        assert DENSE not in sizes[:-1]
        assert list(sizes[:-1]) == sorted(sizes[:-1])
    for index in {0, space.size // 2, space.size - 1}:
        assert space.index(space[index]) == index


def test_configurations_are_sorted_as_the_space_is() -> None:
    space = SearchSpace({"a": (1, 16, DENSE), "b": (2, DENSE)})
    everything = list(space)
    assert sorted(everything[::-1]) == everything
    assert sorted(everything, reverse=True) == everything[::-1]
    assert max(everything) == (DENSE, DENSE) and min(everything) == (1, 2)
    first, last = everything[0], everything[-1]
    assert first < last and first <= last and last > first and last >= first and first <= first and first >= first
    assert not first < first and not last <= first


def test_a_dense_layer_is_the_original_convolution(original: nn.Sequential, supernet: nn.Module) -> None:
    dense = Configuration([DENSE, DENSE])
    assert SearchSpace.of(supernet)[-1] == dense
    set_configuration(supernet, dense)
    with torch.no_grad():
        assert torch.equal(supernet(images()), original(images()))
    plain = extract(supernet, dense)
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in original.named_modules()]
    assert repr(plain) == repr(original)
    for name, weight in original.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight)


def test_its_weight_is_frozen_and_not_part_of_the_state(original: nn.Sequential, supernet: nn.Module) -> None:
    assert not any("dense" in name for name, _ in supernet.named_parameters())
    without = decompose_model(original, group_sizes=(1, 4), options=BTDOptions(max_steps=1))
    assert supernet.state_dict().keys() == without.state_dict().keys()
    halved = copy.deepcopy(supernet).to(torch.float32)
    assert halved.get_submodule("2").dense_weight.dtype == torch.float32


def test_a_supernet_begins_at_the_largest_group_sizes(original: nn.Sequential) -> None:
    supernet = decompose_model(original, group_sizes=(1, 4), options=BTDOptions(max_steps=1), keep_dense=True)
    assert [supernet.get_submodule(name).group_size for name in ("2", "5")] == [4, 4]
    assert largest_decomposed(supernet) == (4, 4)


def test_a_series_may_have_the_dense_layer_alone(original: nn.Sequential) -> None:
    conv = original.get_submodule("5")
    assert isinstance(conv, nn.Conv2d)
    layer = SeriesConv2d.from_bottlenecks(conv, [], keep_dense=True)
    assert layer.group_sizes == (DENSE,) and layer.group_size == DENSE and not layer.series_parameters()
    hidden = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(layer(hidden), conv(hidden))
    with pytest.raises(InvalidValueError, match="a series needs one or more"):
        SeriesConv2d.from_bottlenecks(conv, [])
    with pytest.raises(InvalidValueError, match="group-size 4 is not in this layer's series; choose one of: d"):
        layer.group_size = 4
    plain = SeriesConv2d(conv, [1, 4])
    with pytest.raises(InvalidValueError, match="group-size d is not in this layer's series; choose one of: 1, 4"):
        plain.to_modules(DENSE)


def test_costs_are_those_of_the_extracted_network(supernet: nn.Module) -> None:
    costs = {name: layer_costs(supernet, SHAPE, name) for name in ("macs", "parameters")}
    for active in (Configuration([1, DENSE]), Configuration([4, 4])):  # the closed forms do not depend on it
        set_configuration(supernet, active)
        for configuration in SearchSpace.of(supernet):
            plain = extract(supernet, configuration)
            macs, parameters = count_macs(plain, SHAPE), sum(each.numel() for each in plain.parameters())
            assert configuration_macs(supernet, configuration, SHAPE) == costs["macs"].of_one(configuration) == macs
            assert costs["parameters"].of_one(configuration) == parameters
            set_configuration(supernet, configuration)
            assert peak_activations(supernet, SHAPE) == peak_activations(plain, SHAPE)
            set_configuration(supernet, active)
    table = [list(configuration) for configuration in SearchSpace.of(supernet)]
    assert costs["macs"].of(table).tolist() == [costs["macs"].of_one(one) for one in SearchSpace.of(supernet)]


def test_the_papers_convention_counts_a_dense_layer_as_it_runs(original: nn.Sequential, supernet: nn.Module) -> None:
    dense = configuration_macs(supernet, [DENSE, DENSE], SHAPE, convention="paper")
    others = sum(count_macs(original[number], shape) for number, shape in ((2, (4, 12, 12)), (5, (8, 6, 6))))
    assert dense == others


@pytest.mark.parametrize("form", ["auto", "dense", "bottleneck"])
def test_an_evaluation_equals_separate_passes(supernet: nn.Module, form: str) -> None:
    batch, labels = images(17), torch.arange(17) % 5
    found = evaluate_configurations(supernet, batch, labels, form=form, memory_budget=2**20)
    assert len(found) == 9
    for row in found.itertuples():
        with torch.no_grad():
            logits = extract(supernet, Configuration.parse(row.configuration))(batch)
        assert row.correct == int((logits.argmax(1) == labels).sum())
        assert row.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-9)


def test_it_is_drawn_as_the_largest_choice() -> None:
    space = SearchSpace({"a": (1, 4, DENSE)})
    sampler, generator = ConfigurationSampler(space, 3.0), torch.Generator().manual_seed(0)
    drawn = [sampler.draw(generator)[0] for _ in range(4000)]
    shares = torch.tensor([drawn.count(size) / 4000 for size in (1, 4, DENSE)], dtype=torch.float64)
    torch.testing.assert_close(shares, sampling_probabilities(3, 3.0), rtol=0, atol=0.03)


def test_default_sizes_that_need_no_fewer_macs_are_left_out() -> None:
    """The oracle counts the operations of each layer's own supernet."""
    model = four_conv()
    choice = choice_of(model, keep_dense=True, input_shape=(3, 32, 32))
    everything = choice_of(model, input_shape=(3, 32, 32)).group_sizes
    for name, sizes in everything.items():
        supernet = decompose_model(model, layers=[name], options=BTDOptions(max_steps=1))
        paying = [
            size
            for size in sizes
            if count_macs(extract(supernet, [size]), (3, 32, 32)) < count_macs(model, (3, 32, 32))
        ]
        assert choice.group_sizes[name] == (*paying, DENSE)
        rest = ", ".join(str(size) for size in sizes if size not in paying)
        told = f"group-sizes {rest}: no fewer MACs or parameters than the original layer" if rest else None
        assert choice.dropped.get(name) == told
    assert choice.dropped
    named = choice_of(model, sizes=(1, 32), keep_dense=True, input_shape=(3, 32, 32))
    assert set(named.group_sizes.values()) == {(1, 32, DENSE)} and not named.dropped
    by_layer = choice_of(model, by_layer={"conv4": (64,)}, keep_dense=True, input_shape=(3, 32, 32))
    assert by_layer.group_sizes["conv4"] == (64, DENSE)


def test_a_layer_of_which_no_size_pays_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 1, 2), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 12, 12))
    choice = choice_of(model, keep_dense=True, input_shape=SHAPE)
    assert list(choice.group_sizes) == ["1"]
    assert choice.left_alone["2"] == "no group-size needs fewer MACs or parameters than it"
    with pytest.raises(
        InvalidValueError, match="layer '2': no group-size needs fewer .* than it; name other group-sizes"
    ):
        choice_of(model, ["1", "2"], keep_dense=True, input_shape=SHAPE)


def test_a_size_that_needs_fewer_parameters_alone_stays_a_choice() -> None:
    """With a stride, the first 1x1 runs at more positions than the original convolution."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, (3, 1), stride=(2, 1)), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, *SHAPE))
    assert choice_of(model, keep_dense=True, input_shape=SHAPE).group_sizes == {"1": (1, 2, DENSE)}
    supernet = decompose_model(model, group_sizes=(1, 2), options=BTDOptions(max_steps=1))
    for size in (1, 2):
        plain = extract(supernet, [size])
        assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in model.parameters())
        assert count_macs(plain, SHAPE) >= count_macs(model, SHAPE)


def test_the_walk_runs_choices_in_the_order_of_the_space(supernet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the dense layer joins the stacked convolution, as in the timing that chose the form."""
    asked: set[tuple[int, ...]] = set()
    run = Siblings.run

    def noted(self: Siblings, rows: Tensor, sizes: Any) -> Tensor:
        asked.add(tuple(sizes))
        return run(self, rows, sizes)

    monkeypatch.setattr(Siblings, "run", noted)
    evaluate_configurations(supernet, images(2), torch.arange(2), form="dense", memory_budget=2**24)
    assert (1, 4, DENSE) in asked


class Untraceable(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, rows: Tensor) -> Tensor:
        return self.body(rows if float(rows.sum()) else rows)


def test_the_memory_of_an_untraceable_network_is_that_of_its_largest_configuration(original: nn.Sequential) -> None:
    batches = []
    for keep_dense in (False, True):
        supernet = decompose_model(
            Untraceable(original), group_sizes=(1, 4), options=BTDOptions(max_steps=1), keep_dense=keep_dense
        )
        seen: list[int] = []
        supernet.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        with pytest.warns(NotTraceableWarning):
            evaluate_configurations(supernet, images(40), torch.zeros(40, dtype=torch.int64), memory_budget=2**17)
        batches.append(max(seen))
    assert batches[0] == batches[1] < 40


def test_latency_is_measured_of_the_dense_layer_too(supernet: nn.Module, tmp_path: Any) -> None:
    options = LatencyOptions(runtime="torch", repeats=3, num_sampled=4)
    model = measure_latency(supernet, SHAPE, options, generator=torch.Generator().manual_seed(0))
    assert {name: set(times) for name, times in model.added_ms.items()} == {"2": {1, 4, DENSE}, "5": {1, 4, DENSE}}
    model.save(tmp_path / "times.parquet")
    assert LatencyModel.load(tmp_path / "times.parquet") == model
    assert model.predict(Configuration([DENSE, 1])) > 0
