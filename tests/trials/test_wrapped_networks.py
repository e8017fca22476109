"""Networks that are compiled, wrapped, quantised or without weights, or of another floating-point type."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import gross_ray
from gross_ray.errors import ConvertedNetworkWarning, InvalidValueError
from gross_ray.export import export_network
from gross_ray.models import model_of
from gross_ray.nn.calls import output_of

SHAPE = (3, 9, 9)


def plain(num_classes: int = 5) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convs = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3)
        return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)).eval()


def compiled() -> nn.Module:
    network = torch.compile(plain(), backend="eager")
    with torch.no_grad():
        network(torch.zeros(1, *SHAPE))  # from now on, calls of its layers are not seen
    return network


def compiled_in_place() -> nn.Module:
    network = plain()
    network.compile(backend="eager")
    with torch.no_grad():
        network(torch.zeros(1, *SHAPE))
    return network


def within(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    network = plain()
    network[2] = wrap(network[2])
    return network


def distributed() -> nn.Module:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return DistributedDataParallel(plain())
    finally:
        torch.distributed.destroy_process_group()


def scripted(network: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(network)


def traced(network: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(network, torch.zeros(1, *SHAPE))


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        return torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8)


def of_integers() -> nn.Module:
    network = plain()
    network[5].weight = nn.Parameter(torch.ones(5, 8, dtype=torch.int8), requires_grad=False)
    return network


def meta() -> nn.Module:
    with torch.device("meta"):
        return plain()


def own(num_classes: int) -> nn.Module:
    raise AssertionError("each test has one of its own")


WRAPPED = [
    compiled,
    compiled_in_place,
    lambda: nn.DataParallel(plain()),
    lambda: torch.compile(nn.DataParallel(plain()), backend="eager"),
    lambda: AveragedModel(plain()),
    distributed,
]


@pytest.mark.parametrize("make", WRAPPED)
def test_a_wrapper_is_taken_off(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    choice = gross_ray.choice_of(make(), sizes=(1, 4), input_shape=SHAPE)
    assert list(choice.convs) == ["2"] and type(choice.network) is nn.Sequential
    supernet = gross_ray.decompose_model(make(), group_sizes=(1, 4), keep_dense=True, input_shape=SHAPE)
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    gross_ray.set_configuration(supernet, [0])
    with torch.no_grad():
        torch.testing.assert_close(supernet(images), plain()(images))
    monkeypatch.setattr(sys.modules[__name__], "own", make)
    network = model_of(f"{__name__}:own", num_classes=5, image_size=9)
    assert list(network.state_dict()) == list(plain().state_dict())
    assert all(module._compiled_call_impl is None for module in network.modules())


@pytest.mark.parametrize("make", WRAPPED)
def test_a_wrapped_network_is_exported(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    images = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain()(images)
    for ending in (".onnx", ".pt2", ".safetensors"):
        export_network(make(), tmp_path / f"network{ending}", SHAPE)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.export.load(tmp_path / "network.pt2").module()(images), expected)
    assert load_file(tmp_path / "network.safetensors").keys() == plain().state_dict().keys()


WRAPS = "put the module that it wraps, its attribute"
QUANTISED = "with quantised weights: use the network from before it was quantised"
OF_JIT = "of torch.jit, whose layers cannot be replaced: use the nn.Module that it was made from"
REFUSED = [
    (lambda: scripted(plain()), f"it is a RecursiveScriptModule {OF_JIT}"),
    (lambda: traced(plain()), f"it is a TopLevelTracedModule {OF_JIT}"),
    (lambda: within(scripted), f"its module '2' is a RecursiveScriptModule {OF_JIT}"),
    (lambda: within(torch.compile), f"its module '2' is wrapped in OptimizedModule: {WRAPS} _orig_mod, in its place"),
    (lambda: within(nn.DataParallel), f"its module '2' is wrapped in DataParallel: {WRAPS} module, in its place"),
    (quantised, f"its module '5' is a Linear {QUANTISED}"),
    (of_integers, f"its module '5' is a Linear {QUANTISED}"),
    (meta, "its module '0' is a Conv2d on the meta device, without weights: build it on the CPU, or call to_empty"),
    (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "its module '0' is a LazyConv2d without weights yet: run an image"),
]


@pytest.mark.parametrize(("make", "line"), REFUSED)
def test_what_cannot_be_compressed_is_refused_before_it_runs(
    make: Callable[[], nn.Module], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in (None, SHAPE):
        with pytest.raises(InvalidValueError, match=f"^the network: {line}") as refused:
            gross_ray.decompose_model(make(), input_shape=shape)
        assert len(str(refused.value).splitlines()) == 1
    monkeypatch.setattr(sys.modules[__name__], "own", make)
    with pytest.raises(InvalidValueError, match=f"^model '{__name__}:own': {line}"):
        model_of(f"{__name__}:own", num_classes=5, image_size=9)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda network: network.half(), "float16"),
        (lambda network: network.to(torch.bfloat16), "bfloat16"),
        (lambda network: nn.Sequential(*network[:3].half(), *network[3:].bfloat16()), "bfloat16, float16"),
    ],
)
def test_half_precision_is_converted_with_a_line(
    change: Callable[[nn.Module], nn.Module], names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = change(plain())
    before = copy.deepcopy(network.state_dict())
    line = f"has parameters of {names}; converted to float32, in which it is compressed$"
    with pytest.warns(ConvertedNetworkWarning, match=f"^the network: {line}"):
        supernet = gross_ray.decompose_model(network, group_sizes=(4,), keep_dense=True, input_shape=SHAPE)
    assert {tensor.dtype for tensor in supernet.parameters()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())  # a copy
    expected = network.float()
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    gross_ray.set_configuration(supernet, [0])
    with torch.no_grad():
        torch.testing.assert_close(supernet(images), expected(images))
    monkeypatch.setattr(sys.modules[__name__], "own", lambda: change(plain()))
    with pytest.warns(ConvertedNetworkWarning, match=f"^model '{__name__}:own': {line}"):
        model_of(f"{__name__}:own", num_classes=5, image_size=9)


def test_float64_is_converted_for_a_run_and_kept_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = gross_ray.choice_of(plain().double(), input_shape=SHAPE)
    assert choice.convs["2"].weight.dtype == torch.float64
    monkeypatch.setattr(sys.modules[__name__], "own", lambda: plain().double())
    with pytest.warns(ConvertedNetworkWarning, match="parameters of float64; converted to float32"):
        network = model_of(f"{__name__}:own", num_classes=5, image_size=9)
    output_of(network, SHAPE)


@pytest.mark.parametrize("make", [lambda: plain().half(), compiled_in_place])
@pytest.mark.filterwarnings("ignore::gross_ray.errors.ConvertedNetworkWarning")
def test_a_network_with_a_lock_that_has_to_be_changed_is_copied_without_the_lock(make: Callable[[], nn.Module]) -> None:
    network = make()
    network.lock = threading.Lock()
    choice = gross_ray.choice_of(network, input_shape=SHAPE)
    assert choice.network is not network and choice.network.lock is network.lock
    assert choice.convs["2"].weight.dtype == torch.float32
    assert all(module._compiled_call_impl is None for module in choice.network.modules())


class Refuses(nn.Sequential):
    def __deepcopy__(self, memo: object) -> Refuses:
        raise RuntimeError("there is only one of this")


def test_what_has_to_be_copied_and_cannot_be_is_refused() -> None:
    line = "this network cannot be copied: RuntimeError: there is only one of this"
    with pytest.warns(ConvertedNetworkWarning), pytest.raises(InvalidValueError, match=line):
        gross_ray.choice_of(Refuses(*plain().half()))
