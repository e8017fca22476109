"""One contract for every runtime, and the ONNX models that are made without exporting each network."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import pytest
import torch
from networks import Twice
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.models import four_conv, model_of
from gross_ray.search import runtimes
from gross_ray.search.onnx_variants import OnnxVariants, exported
from gross_ray.search.options import RUNTIMES
from gross_ray.search.runtimes import READ_ONNX, is_installed, runtime_of
from gross_ray.search.variants import Variants, balanced
from gross_ray.space import DENSE
from gross_ray.supernet.build import empty_supernet, made_up

Supernets = Callable[[nn.Module, Mapping[str, Sequence[int]]], nn.Module]
CPU = torch.device("cpu")
IMAGE = (3, 16, 16)
needs_openvino = pytest.mark.skipif(not is_installed("openvino"), reason="needs openvino")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
EACH_RUNTIME = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks={"openvino": [needs_openvino], "compiled": [needs_compiler]}.get(name, []))
        for name in RUNTIMES
    ],
)


class Geometry(nn.Module):
    """Convolutions with stride, dilation, other padding on each side, without a bias, and with a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.strided = nn.Conv2d(8, 4, (3, 2), stride=(1, 2), padding=(2, 0), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.dilated = nn.Conv2d(4, 6, 3, padding="same", dilation=2)
        self.head = nn.Linear(6, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.strided(self.stem(images))))
        return self.head(self.dilated(hidden).mean(dim=(2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "four-conv": (lambda: four_conv(image_size=16), {"conv2": (1, 4, 32), "conv4": (2, 64)}),
    "geometry": (Geometry, {"strided": (1, 2, 8), "dilated": (1, 4)}),
    "twice": (Twice, {"shared": (1, 2, 4)}),
}


def variants_of(name: str, random_supernet: Supernets) -> Variants:
    make, sizes = NETWORKS[name]
    return Variants(random_supernet(make(), sizes), CPU, IMAGE)


def images(number: int = 2) -> torch.Tensor:
    return torch.randn(number, *IMAGE, generator=torch.Generator().manual_seed(0))


@EACH_RUNTIME
@pytest.mark.parametrize("threads", [1, 2])
def test_a_runtime_computes_what_the_network_computes(name: str, threads: int, random_supernet: Supernets) -> None:
    if name == "compiled" and threads == 2:
        pytest.skip("each compilation takes seconds")
    variants, batch = variants_of("geometry", random_supernet), images()
    before = torch.get_num_threads()
    runtime = runtime_of(name, CPU, min(threads, os.cpu_count() or 1))
    assert runtime.name == name and runtime.version[0].isdigit()
    network = variants.network((8, 1))
    with torch.no_grad():
        expected = network(batch)
    with runtime.settings():
        run = runtime.load(network, batch)
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)  # as often as it is timed
        assert runtime.clock()(run) > 0
        load = runtime.variants(variants, batch)
        assert load((DENSE, 4))().shape == expected.shape
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("network", ["four-conv", "twice"])
@pytest.mark.parametrize("name", ["torch", "onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_every_variant_is_the_network_with_these_forms(name: str, network: str, random_supernet: Supernets) -> None:
    variants, batch = variants_of(network, random_supernet), images(3)
    runtime = runtime_of(name, CPU, 1)
    load = runtime.variants(variants, batch)
    for forms in balanced(variants.forms, 9, torch.Generator().manual_seed(0)):
        with torch.no_grad():
            expected = variants.network(forms)(batch)
        torch.testing.assert_close(load(forms)(), expected, rtol=1e-4, atol=1e-4)


def nodes(model: onnx.ModelProto) -> list[tuple[Any, ...]]:
    """Return what a model computes, without its names: operators, settings, and the shapes of weights."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return [
        (
            node.op_type,
            sorted((one.name, str(onnx.helper.get_attribute_value(one))) for one in node.attribute if one.name in KEPT),
            [shapes.get(name) for name in node.input],
        )
        for node in model.graph.node
    ]


KEPT = ("group", "strides", "dilations", "pads")


@pytest.mark.parametrize("network", list(NETWORKS))
def test_an_exchanged_model_is_that_of_the_exporter(network: str, random_supernet: Supernets) -> None:
    variants = variants_of(network, random_supernet)
    for module in variants.full.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    models = OnnxVariants(variants)
    assert models.complete
    for forms in balanced(variants.forms, 4, torch.Generator().manual_seed(1)):
        exchanged, real = onnx.load_from_string(models.model(forms)), exported(variants.network(forms), IMAGE)
        onnx.checker.check_model(exchanged)
        assert _explicit(nodes(exchanged)) == _explicit(nodes(real))


def _explicit(listed: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Leave out settings of a 1x1 convolution, which are all the defaults there."""
    return [
        (kind, settings if not inputs[1:2] or inputs[1] is None or inputs[1][2:] != (1, 1) else [], inputs)
        for kind, settings, inputs in listed
    ]


def test_a_layer_that_pads_by_itself_is_exported_each_time(random_supernet: Supernets) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.LazyLinear(3)
    )
    network(images())
    variants = Variants(random_supernet(network, {"1": (1, 2)}), CPU, IMAGE)
    assert not OnnxVariants(variants).complete
    with pytest.warns(UserWarning, match="each network is exported separately, which takes seconds"):
        run = runtime_of("onnxruntime", CPU, 1).variants(variants, images())((2,))
    with torch.no_grad():
        torch.testing.assert_close(run(), variants.network((2,))(images()), rtol=1e-4, atol=1e-4)


def test_real_networks_are_exchanged_without_exporting_each() -> None:
    for name, layers in (("resnet20", ["layer1.0.conv1", "layer2.0.conv1"]), ("vgg16", ["features.7"])):
        network = model_of(name, num_classes=10, image_size=32).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
        supernet = made_up(empty_supernet(network, dict.fromkeys(layers, (1, 4))), torch.Generator().manual_seed(0))
        assert OnnxVariants(Variants(supernet, CPU, (3, 32, 32))).complete


def test_every_form_is_drawn_equally_often() -> None:
    forms = {"a": (DENSE, 1, 4), "b": (DENSE, 1, 2, 4, 8), "c": (DENSE, 2)}
    for number in (12, 17, 24):
        drawn = balanced(forms, number, torch.Generator().manual_seed(number))
        assert len(drawn) == len(set(drawn)) == number
    assert set(balanced(forms, 1000, torch.Generator())) == {
        (a, b, c) for a in forms["a"] for b in forms["b"] for c in forms["c"]
    }
    many = {str(layer): (DENSE, 1, 2, 4, 8, 16) for layer in range(20)}
    drawn = balanced(many, 50, torch.Generator().manual_seed(0))
    for layer in range(20):
        counts = [sum(one[layer] == size for one in drawn) for size in many["0"]]
        assert max(counts) - min(counts) <= 1
    assert (
        balanced(many, 50, torch.Generator().manual_seed(0))
        == drawn
        != balanced(many, 50, torch.Generator().manual_seed(1))
    )


# Errors


def test_what_is_not_available_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValueError, match="runtime = 'tflite': must be one of onnxruntime, openvino, torch"):
        runtime_of("tflite", CPU, 1)
    with pytest.raises(InvalidValueError, match=r"threads = 4096: this machine has \d+; ask for \d+ or fewer"):
        runtime_of("onnxruntime", CPU, 4096)
    with pytest.raises(InvalidValueError, match="device = 'cuda': runtime openvino runs on cpu; choose --device"):
        runtime_of("openvino", torch.device("cuda"), 1)
    if not torch.cuda.is_available():
        with pytest.raises(InvalidValueError, match="no CUDAExecutionProvider; choose --device cpu or"):
            runtime_of("onnxruntime", torch.device("cuda"), 1)
    monkeypatch.setattr(runtimes, "import_module", missing)
    with pytest.raises(InvalidValueError, match="runtime openvino is not installed: pip install openvino, or choose"):
        runtime_of("openvino", CPU, 1)


def missing(package: str) -> None:
    raise ImportError(package)


def test_only_some_read_onnx() -> None:
    for name in RUNTIMES:
        if name not in READ_ONNX:
            with pytest.raises(InvalidValueError, match=f"runtime {name} does not read ONNX; choose onnxruntime"):
                runtime_of(name, CPU, 1).read(b"", images())


def test_a_file_that_fixes_another_batch_is_refused(tmp_path: Any) -> None:
    network, file = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)).eval(), tmp_path / "fixed.onnx"
    torch.onnx.export(network, (images(1),), str(file), input_names=["images"], dynamo=True, verbose=False)
    runtime = runtime_of("onnxruntime", CPU, 1)
    assert runtime.read(file, images(1))().shape == (1, 2)
    with pytest.raises(InvalidValueError, match="ONNX Runtime cannot run the network: .*another runtime or batch"):
        runtime.read(file, images(3))


def test_a_runtime_without_the_operator_is_reported() -> None:
    with pytest.raises(
        InvalidValueError, match="ONNX Runtime cannot run the network: NotImpl.* implementation for Conv"
    ):
        runtime_of("onnxruntime", CPU, 1).load(nn.Conv2d(3, 2, 3).double(), images().double())


@needs_compiler
def test_a_network_that_cannot_be_compiled_is_reported() -> None:
    class Asks(nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows if float(rows.sum()) > 0 else -rows

    with pytest.raises(InvalidValueError, match="torch.compile cannot trace the network: "):
        runtime_of("compiled", CPU, 1).load(Asks(), images())


@pytest.mark.parametrize("name", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_a_network_that_onnx_cannot_hold_is_reported(name: str) -> None:
    class Asks(nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows if float(rows.sum()) > 0 else -rows

    with pytest.raises(InvalidValueError, match=f"{RUNTIMES[name]} reads ONNX: .*; choose --runtime torch"):
        runtime_of(name, CPU, 1).load(Asks(), images())


def test_installed_means_that_the_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    assert [is_installed(name) for name in RUNTIMES] == [True, False, True, True]
