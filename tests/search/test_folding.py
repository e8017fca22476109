"""Folding bottlenecks back into dense convolutions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from networks import Twice
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.nn.replace import replace_modules
from gross_ray.search import folding, timing
from gross_ray.search.budgets import Budget
from gross_ray.search.cost import count_macs, count_parameters, peak_activations
from gross_ray.search.folding import bottlenecks, dense_convolution, fold, fold_within
from gross_ray.search.latency import LatencyModel
from gross_ray.search.options import LatencyOptions
from gross_ray.space import DENSE, SearchSpace
from gross_ray.supernet.build import decompose_model
from gross_ray.supernet.configure import extract
from gross_ray.supernet.series import SeriesConv2d


def drawn(module: nn.Module) -> nn.Module:
    """Draw all weights, so that nothing is equal by being zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return module.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 2), "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (1, 2), "padding_mode": "circular", "bias": False},
        {"kernel_size": (1, 5), "padding": (0, 2)},
    ],
)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_dense_convolution_equals_the_bottleneck(options: dict[str, Any], size: int) -> None:
    conv = nn.Conv2d(8, 6, **{"kernel_size": 3, **options})
    bottleneck = drawn(SeriesConv2d(conv, (1, 2, 4, 8)).to_modules(size))
    dense = dense_convolution(bottleneck)
    assert dense.weight.shape == conv.weight.shape
    batch = images(3, 8, 9, 10)
    expected = bottleneck.double()(batch.double())
    torch.testing.assert_close(dense(batch).double(), expected, rtol=1e-5, atol=1e-5)
    assert (dense.bias is None) == (conv.bias is None)


@pytest.fixture
def supernet() -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 12, 3),
        nn.Flatten(),
        nn.Linear(12 * 9, 5),
    )
    return decompose_model(drawn(network).double())


@pytest.mark.parametrize("objective", ["macs", "parameters"])
def test_no_other_choice_of_forms_costs_less(supernet: nn.Module, objective: str) -> None:
    shape, batch = (3, 12, 12), images(4, 3, 12, 12).double()
    forms: set[tuple[bool, ...]] = set()
    for configuration in SearchSpace.of(supernet):
        plain = extract(supernet, configuration).eval()
        folded, found = fold(plain, shape, objective=objective)

        def cost(network: nn.Module) -> int:
            return count_macs(network, shape) if objective == "macs" else sum(p.numel() for p in network.parameters())

        dense = {name: dense_convolution(module) for name, module in bottlenecks(plain).items()}
        others = [
            cost(replace_modules(plain, {name: dense[name] for name in chosen}))
            for count in range(len(dense) + 1)
            for chosen in itertools.combinations(dense, count)
        ]
        assert cost(folded) == min(others)
        saved = sum(one.bottleneck - one.dense for one in found if one.folded)
        assert cost(plain) - saved == cost(folded)
        assert [one.group_size for one in found] == list(configuration)
        torch.testing.assert_close(folded(batch), plain(batch), rtol=1e-9, atol=1e-9)
        assert set(bottlenecks(folded)) == {one.layer for one in found if not one.folded}
        forms.add(tuple(one.folded for one in found))
    assert len(forms) > 1  # the choice depends on the group-sizes


def most_held(network: nn.Module, batch: torch.Tensor) -> int:
    """The oracle: what a convolution or linear layer is given and returns, as an image runs."""
    found: list[int] = []
    layers = [one for one in network.modules() if isinstance(one, nn.Conv2d | nn.Linear)]
    handles = [
        one.register_forward_hook(lambda _, given, returned: found.append(given[0][0].numel() + returned[0].numel()))
        for one in layers
    ]
    network(batch)
    for handle in handles:
        handle.remove()
    return max(found)


def test_activations_held_at_once_decide(supernet: nn.Module) -> None:
    shape, batch = (3, 12, 12), images(2, 3, 12, 12).double()
    assert peak_activations(supernet, shape) == most_held(extract(supernet, (1, 1, 1)), batch)
    plain = extract(supernet, (8, 1, 4)).eval()
    assert peak_activations(plain, shape) == most_held(plain, batch)
    folded, found = fold(plain, shape, objective="activations")
    for one in found:
        alone = replace_modules(plain, {one.layer: dense_convolution(bottlenecks(plain)[one.layer])})
        kernels = (plain.get_submodule(one.layer), alone.get_submodule(one.layer))
        inputs: list[torch.Tensor] = []
        handle = kernels[0].register_forward_pre_hook(lambda _, given, to=inputs: to.append(given[0]))
        plain(batch)
        handle.remove()
        assert (one.bottleneck, one.dense) == tuple(most_held(kernel, inputs[0]) for kernel in kernels)
    # As many channels in as out, halved places, more channels out: only the second holds less where it is dense.
    assert [one.folded for one in found] == [False, True, False]
    torch.testing.assert_close(folded(batch), plain(batch), rtol=1e-9, atol=1e-9)


def test_a_shared_layer_is_folded_once() -> None:
    supernet = decompose_model(drawn(Twice()), layers=["shared"])
    plain = extract(supernet, (4,)).eval()
    folded, found = fold(plain, (3, 12, 12))
    assert [(one.layer, one.folded) for one in found] == [("shared", True)]
    assert sum(isinstance(one, nn.Conv2d) for one in folded.modules()) == 2
    batch = images(2, 3, 12, 12)
    torch.testing.assert_close(folded(batch), plain(batch), rtol=1e-5, atol=1e-5)
    assert count_macs(plain, (3, 12, 12)) - count_macs(folded, (3, 12, 12)) == found[0].bottleneck - found[0].dense


def test_measured_times_decide(supernet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[str, int]] = []

    def work(runtime: object, module: nn.Module, inputs: list[torch.Tensor]) -> tuple[str, int]:
        assert [len(one) for one in inputs] == [7]
        return "dense" if isinstance(module, nn.Conv2d) else "bottleneck", inputs[0].shape[1]

    def milliseconds(work: tuple[str, int], clock: object) -> float:
        timed.append(work)
        return {("dense", 4): 1.0, ("bottleneck", 4): 2.0}.get(work, 3.0)

    monkeypatch.setattr(folding, "_work", work)
    monkeypatch.setattr(timing, "_sample_ms", milliseconds)
    plain = extract(supernet, (1, 1, 1))
    plain.train()
    plain[3].eval()
    options = LatencyOptions(batch_size=7, repeats=3)
    folded, found = fold(plain, (3, 12, 12), objective="latency_ms", latency=options)
    assert [(one.layer, one.folded) for one in found] == [("2", False), ("4", False), ("6", True)]
    assert found[2].dense == pytest.approx(1.0)
    assert found[2].bottleneck == pytest.approx(2.0)
    assert set(timed) == {(form, channels) for form in ("dense", "bottleneck") for channels in (8, 4)}
    assert [one.training for one in (plain, plain[2], plain[3])] == [True, True, False]
    assert [one.training for one in (folded, folded[3], folded[6])] == [True, False, True]
    assert all(not module._forward_pre_hooks for module in [*plain.modules(), *folded.modules()])


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_real_times_are_measured(supernet: nn.Module, runtime: str) -> None:
    options = LatencyOptions(repeats=2, runtime=runtime)
    plain = extract(supernet, (1, 2, 4)).float()
    _, found = fold(plain, (3, 12, 12), objective="latency_ms", latency=options)
    assert all(one.dense > 0 and one.bottleneck > 0 for one in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_times_are_taken_where_there_is_no_gpu(supernet: nn.Module) -> None:
    with pytest.raises(InvalidValueError, match="device = 'cuda': this machine has none that torch can use; use cpu"):
        fold(extract(supernet, (1, 1, 1)), (3, 12, 12), objective="latency_ms", device="cuda")


def test_an_unknown_objective_is_refused(supernet: nn.Module) -> None:
    with pytest.raises(InvalidValueError, match="'speed': must be one of macs, parameters, activations, latency_ms"):
        fold(extract(supernet, (1, 1, 1)), (3, 12, 12), objective="speed")


def test_a_supernet_and_a_strange_device_are_refused() -> None:
    with pytest.raises(
        InvalidValueError, match="fold needs a plain network, not a supernet; extract a configuration first"
    ):
        fold(nn.Sequential(SeriesConv2d(nn.Conv2d(8, 6, 3), (1, 8))), (8, 9, 9))
    plain = nn.Sequential(SeriesConv2d(nn.Conv2d(8, 6, 3), (1, 8)).to_modules(1))
    with pytest.raises(InvalidValueError, match="device = 'gpu': latency is measured on cpu or cuda"):
        fold(plain, (8, 9, 9), objective="latency_ms", device="gpu")


COUNTS = {"macs": lambda network: count_macs(network, (3, 12, 12)), "parameters": count_parameters}


@pytest.mark.parametrize("cost", COUNTS)
def test_folding_for_speed_stops_at_a_limit_on_another_cost(supernet: nn.Module, cost: str) -> None:
    space = SearchSpace.of(supernet)
    added = {layer: {DENSE: 0.0} | dict.fromkeys(sizes, 0.1) for layer, sizes in space.group_sizes.items()}
    slower = LatencyModel(
        runtime="torch", version="1", device="a", host="b", batch_size=1, threads=1, full_ms=9.0, added_ms=added,
        num_sampled=3, median_error=0.1, noise=0.1,
    )  # fmt: skip
    network, count = extract(supernet, space[0]), COUNTS[cost]
    dense, _ = slower.fold(network)
    has, would_have = count(network), count(dense)
    assert has < would_have
    enough, exact, too_little = ([Budget(cost, limit)] for limit in (would_have, would_have - 1, has - 1))
    for limits, folds in (
        ([], True),
        ([enough], True),
        ([exact], False),
        ([too_little], True),  # the network is not within it either
        ([too_little, exact], False),
        ([exact, enough], True),  # each limit has its own candidates: one is enough
        ([[*exact, Budget("latency_ms", 1.0)]], False),
        ([[Budget("latency_ms", 1.0)]], True),
    ):
        found, chosen, why_not = fold_within(network, slower, (3, 12, 12), limits)
        assert not bottlenecks(found) if folds else bottlenecks(found)
        assert bool(chosen) == folds and bool(why_not) != folds
        assert folds or f"{cost}=" in why_not
