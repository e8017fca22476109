"""Networks that hold what cannot be copied: copies share it, but have modules, parameters and buffers of their own."""

from __future__ import annotations

import copy
import functools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from gross_ray.btd.options import BTDOptions
from gross_ray.errors import InvalidValueError
from gross_ray.export import check_export, export_network
from gross_ray.nn.copies import copied
from gross_ray.nn.replace import replace_modules
from gross_ray.run.opened import Base
from gross_ray.search.evaluator import evaluate_configurations
from gross_ray.search.folding import fold
from gross_ray.search.latency import LatencyOptions, measure_latency
from gross_ray.supernet.build import decompose_model
from gross_ray.supernet.configure import extract, set_configuration
from gross_ray.training.options import EngineOptions
from gross_ray.training.together import check_stackable

SHAPE = (3, 8, 8)
QUICK = BTDOptions(max_steps=20)


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
        self.held: Any = None


class Handle:
    """Closes what it holds when it is collected: a copy of it would close it for the original too."""

    def __init__(self) -> None:
        self.lock, self.closed = threading.Lock(), [False]

    def __del__(self) -> None:
        self.closed[0] = True


class Method:
    """Has a lock, and a method that is used as a hook."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), [0]

    def hook(self, *_: object) -> None:
        with self.lock:
            self.calls[0] += 1


HELD: dict[str, Callable[[Path], Any]] = {
    "lock": lambda _: threading.Lock(),
    "open file": lambda folder: open(folder / "log.txt", "w"),  # noqa: SIM115
    "generator": lambda _: (number for number in range(3)),
    "python module": lambda _: numpy,
    "socket": lambda _: socket.socket(),
    "torch's generator": lambda _: torch.Generator(),
    "an object with one": lambda _: Handle(),
    "in a dict of lists": lambda _: {"all": [(threading.Lock(), {"one": threading.Lock()})]},
    "in a partial": lambda _: functools.partial(print, threading.Lock()),
}


@pytest.fixture(params=HELD)
def held(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    value = HELD[request.param](tmp_path)
    yield value
    if hasattr(value, "close") and not isinstance(value, dict):
        value.close()


def parts(value: Any) -> Any:
    """Return the lock inside a container, and any other value itself."""
    if isinstance(value, dict):
        return value["all"][0][0]
    return value.args[0] if isinstance(value, functools.partial) else value


def assert_own_tensors(copy: nn.Module, original: nn.Module) -> None:
    theirs = original.state_dict(keep_vars=True)
    for name, tensor in copy.state_dict(keep_vars=True).items():
        assert tensor is not theirs[name] and torch.equal(tensor, theirs[name])
        assert tensor.data_ptr() != theirs[name].data_ptr()


def test_what_cannot_be_copied_is_shared_and_the_tensors_are_not(held: Any) -> None:
    network = Net()
    network.held = held
    network[2].also = [held]
    result = copied(network)
    assert isinstance(result, Net) and result[2] is not network[2]
    assert_own_tensors(result, network)
    if not isinstance(held, torch.Generator):  # newer versions of torch copy it
        assert parts(result.held) is parts(held) and parts(result[2].also[0]) is parts(held)
    del result
    if isinstance(held, Handle):
        assert not held.closed[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, for adaptive pooling
def test_every_entry_point_takes_such_a_network(tmp_path: Path) -> None:
    network = Net()
    network.held, network[0].held = threading.Lock(), [threading.Lock()]
    supernet = decompose_model(network, group_sizes=(1, 8), options=QUICK, input_shape=SHAPE)
    images, labels = torch.zeros(4, *SHAPE, dtype=torch.uint8), torch.arange(4) % 3
    assert len(evaluate_configurations(supernet, images, labels)) == 2
    set_configuration(supernet, (8,))
    plain = extract(supernet, (8,))
    assert plain.held is network.held  # type: ignore[union-attr]
    folded, _ = fold(plain, SHAPE, objective="macs")
    for number, ending in enumerate((".onnx", ".pt2", ".safetensors")):
        file = tmp_path / f"network{ending}"
        export_network((plain, folded)[number % 2], file, SHAPE)
        check_export(file, (plain, folded)[number % 2], [torch.zeros(2, *SHAPE)])
    check_stackable(supernet, SHAPE, EngineOptions(parallel_seeds=2))
    options = LatencyOptions(runtime="torch", repeats=2, num_sampled=2)
    measure_latency(supernet, SHAPE, options, generator=torch.Generator().manual_seed(0))
    base = Base(network, 0, SHAPE, None, ("a", "b", "c"), "")  # type: ignore[arg-type]
    assert base.on("cpu") is not network and base.on("cpu").held is network.held


def test_an_object_that_holds_layers_is_copied_with_them() -> None:
    network = Net()
    network.held = SimpleNamespace(layer=network[2], lock=threading.Lock())
    result = copied(network)
    assert result.held.layer is result[2] and result.held.lock is network.held.lock


def test_a_hook_of_an_object_with_a_lock_still_runs() -> None:
    network, method = Net(), Method()
    network[2].register_forward_hook(method.hook)
    copied(network)(torch.zeros(2, *SHAPE))
    assert method.calls[0] == 1


class Remembers(Net):
    """Keeps its last output, and a buffer that autograd computed."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        self.buffer = buffer
        self.register_buffer("mean", torch.zeros(1, 3))

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        self.last = [output]
        if self.buffer:
            self.mean = output.mean(0, keepdim=True)
        return output


@pytest.mark.filterwarnings("ignore::gross_ray.search.traceability.NotTraceableWarning")
@pytest.mark.parametrize("buffer", [False, True])
def test_a_tensor_with_a_graph_is_copied_without_it(buffer: bool) -> None:
    network = Remembers(buffer=buffer)
    network(torch.ones(2, *SHAPE))
    assert not network.last[0].is_leaf
    result = copied(network)
    for mine, theirs in ((result.last[0], network.last[0]), (result.mean, network.mean)):
        assert mine.is_leaf and mine is not theirs and torch.equal(mine, theirs)
    supernet = decompose_model(network, group_sizes=(1, 8), options=QUICK, input_shape=SHAPE)
    assert len(evaluate_configurations(supernet, torch.zeros(2, *SHAPE), torch.arange(2))) == 2


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "pruned"])
def test_weights_that_a_hook_computes_are_computed_by_the_copy_too(wrap: str) -> None:
    network = Net()
    if wrap == "pruned":
        prune.l1_unstructured(network[0], "weight", 0.5)
    else:
        network[0] = getattr(nn.utils, wrap)(network[0])
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    network(images)
    with pytest.raises(RuntimeError, match="deepcopy"):  # else this tests nothing
        copy.deepcopy(network)
    result = copied(network)
    with torch.no_grad():
        for own in (network[0], result[0]):
            for parameter in own.parameters():
                parameter.add_(0.5)
    torch.testing.assert_close(result.eval()(images), network.eval()(images))
    result(images).sum().backward()
    assert all(parameter.grad is not None for parameter in result[0].parameters())
    assert all(parameter.grad is None for parameter in network[0].parameters())
    supernet = decompose_model(network, group_sizes=(1, 8), options=QUICK, input_shape=SHAPE)
    assert len(evaluate_configurations(supernet, images, torch.arange(2))) == 2


class Refuses(Net):
    def __deepcopy__(self, memo: dict[int, Any]) -> Refuses:
        raise RuntimeError("there is only\none of this")


def test_a_network_that_refuses_is_one_line() -> None:
    network = Refuses()
    with pytest.raises(
        InvalidValueError, match="this network cannot be copied: RuntimeError: there is only one of"
    ) as no:
        decompose_model(network, group_sizes=(1, 8), options=QUICK)
    assert len(str(no.value).splitlines()) == 1


def test_lazy_modules_are_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(InvalidValueError, match="module '3' is a LazyLinear without weights yet: run an image through"):
        decompose_model(network, group_sizes=(1, 4), options=QUICK)
    network(torch.zeros(1, *SHAPE))
    decompose_model(network, group_sizes=(1, 4), options=QUICK, input_shape=SHAPE)


def test_weights_can_be_shared_on_request() -> None:
    network = Net()
    network.held = threading.Lock()
    result = replace_modules(network, {}, share_weights=True)
    assert result is not network and result[2].weight is network[2].weight and result.held is network.held
