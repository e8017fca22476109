import copy
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gross_ray.errors import GrossRayError, InvalidValueError
from gross_ray.export import check_export, export_network, export_onnx, export_program, export_weights
from gross_ray.supernet.configure import extract

SIZES = {"1": (1, 2, 4), "4": (2, 8)}


@pytest.fixture(scope="module")
def supernet(random_supernet: Callable[..., nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 8, 3, padding=1, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(6 * 9, 5),
        )
    return random_supernet(model, SIZES)


def test_onnx_file_computes_what_the_network_does_for_any_batch_size(supernet: nn.Module, tmp_path: Path) -> None:
    network = extract(supernet, (2, 8)).to(memory_format=torch.channels_last)
    file = tmp_path / "network.onnx"
    export_onnx(network, str(file), (3, 10, 10))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["images"]
    assert [one.name for one in session.get_outputs()] == ["logits"]
    images = torch.randn(10, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = network(batch)
        (logits,) = session.run(None, {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)
    assert list(tmp_path.iterdir()) == [file]


def test_modes_and_random_state_stay_unchanged(supernet: nn.Module, tmp_path: Path) -> None:
    network = extract(supernet, (4, 2)).train()
    network[2].eval()
    state = torch.get_rng_state()
    export_onnx(network, tmp_path / "network.onnx", (3, 10, 10))
    assert [module.training for module in network] == [index != 2 for index in range(len(network))]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("ending", ["onnx", "pt2", "safetensors"])
def test_supernet_is_refused(supernet: nn.Module, tmp_path: Path, ending: str) -> None:
    with pytest.raises(InvalidValueError, match="needs a plain network, not a supernet; extract a configuration first"):
        export_network(supernet, tmp_path / f"network.{ending}", (3, 10, 10))
    assert not list(tmp_path.iterdir())


WITHOUT_GROSS_RAY = """
import sys, torch
network = torch.export.load("network.pt2").module()
images = torch.load("images.pt")
torch.save([network(batch).detach() for batch in (images, images[:1])], "logits.pt")
assert not [name for name in sys.modules if name.startswith(("gross_ray", "pipelines"))]
"""


def test_a_program_runs_without_gross_ray(supernet: nn.Module, tmp_path: Path) -> None:
    network = extract(supernet, (2, 8)).train()
    export_program(network, tmp_path / "network.pt2", (3, 10, 10))
    assert network.training
    assert [file.name for file in tmp_path.iterdir()] == ["network.pt2"]
    images = torch.randn(10, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_GROSS_RAY], cwd=tmp_path, check=True, timeout=200)
    network.eval()
    for batch, logits in zip((images, images[:1]), torch.load(tmp_path / "logits.pt"), strict=True):
        torch.testing.assert_close(logits, network(batch).detach(), rtol=1e-5, atol=1e-5)


def test_weights_are_those_of_the_plain_network(supernet: nn.Module, tmp_path: Path) -> None:
    network = extract(supernet, (2, 8)).to(memory_format=torch.channels_last)
    network.append(network[-1])  # shared
    export_weights(network, tmp_path / "network.safetensors")
    again = copy.deepcopy(network)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(load_file(tmp_path / "network.safetensors"))
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), again.parameters(), strict=True))


def test_the_ending_chooses_the_format_and_an_unknown_one_is_refused(supernet: nn.Module, tmp_path: Path) -> None:
    network = extract(supernet, (2, 8))
    export_network(network, tmp_path / "network.safetensors", (3, 10, 10))
    assert load_file(tmp_path / "network.safetensors")
    with pytest.raises(InvalidValueError, match="network.h5: must end in .onnx, .pt2, .safetensors; choose a format"):
        export_network(network, "network.h5", (3, 10, 10))
    with pytest.raises(InvalidValueError, match="nowhere/network.pt2: there is no folder .*nowhere; create it"):
        export_network(network, tmp_path / "nowhere" / "network.pt2", (3, 10, 10))
    for export in (export_onnx, export_program, export_weights):
        with pytest.raises(InvalidValueError, match="nowhere/network: there is no folder .*nowhere; create it"):
            export(network, tmp_path / "nowhere" / "network", (3, 10, 10))


@pytest.mark.parametrize("earlier", [None, b"whole"])
def test_no_partial_file_stays_if_the_exporter_fails(
    supernet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bytes | None
) -> None:
    file = tmp_path / "network.onnx"
    if earlier is not None:
        file.write_bytes(earlier)

    def fail(_model: nn.Module, _arguments: Any, path: str, **_options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("the exporter failed")

    monkeypatch.setattr(torch.onnx, "export", fail)
    network = extract(supernet, (1, 2)).train()
    with pytest.raises(GrossRayError, match="ONNX cannot trace this network: RuntimeError: the exporter failed;"):
        export_onnx(network, file, (3, 10, 10))
    assert network.training
    assert [one.read_bytes() for one in tmp_path.iterdir()] == ([] if earlier is None else [earlier])


class Sized(nn.Module):
    """Turns the batch size into a Python number, which fixes it in a trace."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) + torch.zeros(int(len(images)), 1)


@pytest.mark.parametrize(("export", "name"), [(export_onnx, "network.onnx"), (export_program, "network.pt2")])
def test_a_network_that_fixes_the_size_of_a_batch_is_refused(tmp_path: Path, export: Any, name: str) -> None:
    with pytest.raises(
        GrossRayError, match="cannot trace this network: .*batch.*; write its weights instead"
    ) as caught:
        export(nn.Sequential(nn.Conv2d(3, 4, 3), Sized()), tmp_path / name, (3, 8, 8))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InvalidValueError, match="the network cannot run an image of 4x8x8"):
        export(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / name, (4, 8, 8))
    assert list(tmp_path.iterdir()) == []


class Forks(nn.Module):
    """Branches on the values of the images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


@pytest.mark.parametrize(("export", "name"), [(export_onnx, "network.onnx"), (export_program, "network.pt2")])
def test_a_network_that_cannot_be_traced_is_refused_in_one_line(tmp_path: Path, export: Any, name: str) -> None:
    with pytest.raises(GrossRayError, match="cannot trace this network: .*write its weights instead") as caught:
        export(nn.Sequential(nn.Conv2d(3, 4, 3), Forks()), tmp_path / name, (3, 8, 8))
    assert len(str(caught.value).splitlines()) == 1
    assert not re.search(r"\x1b|step \d/\d", str(caught.value))  # colours and progress of the exporter
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(
    supernet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    with pytest.raises(GrossRayError, match=f"needs the package {package}: pip install {package}"):
        export_onnx(extract(supernet, (1, 2)), tmp_path / "network.onnx", (3, 10, 10))


def outputs_of(file: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def test_a_file_is_compared_with_its_network(supernet: nn.Module, tmp_path: Path) -> None:
    network = extract(supernet, (1, 2)).eval()
    images = torch.randn(11, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images)
    for ending, runtime in (("onnx", "ONNX Runtime 1."), ("pt2", "torch.export 2."), ("safetensors", "torch 2.")):
        file = tmp_path / f"network.{ending}"
        export_network(network, file, (3, 10, 10))
        check = check_export(file, network.train(), images.split(4))
        assert network.training
        network.eval()
        assert check.runtime.startswith(runtime)
        assert (check.images, check.predictions_that_differ) == (11, 0)
        assert check.largest_logit == pytest.approx(float(expected.abs().max()))
        assert 0 <= check.largest_difference < 1e-5
        if ending == "onnx":
            found = float((outputs_of(file, images) - expected).abs().max())
            assert check.largest_difference == pytest.approx(found, abs=1e-6)
        assert f"on 11 images: logits up to {check.largest_logit:.3g} differ by" in str(check)


@pytest.mark.parametrize("ending", ["onnx", "pt2", "safetensors"])
@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_a_file_of_another_network_is_found(supernet: nn.Module, tmp_path: Path, ending: str, value: float) -> None:
    network, file = extract(supernet, (1, 2)), tmp_path / f"network.{ending}"
    export_network(network, file, (3, 10, 10))
    with torch.no_grad():
        next(network.parameters()).flatten()[0] = value
    with pytest.raises(GrossRayError, match="does not compute what its network does: checked in .* choose another fo"):
        check_export(file, network, [torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))])


def test_a_file_that_onnx_runtime_cannot_run_is_one_line(supernet: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "network.onnx"
    file.write_bytes(b"no network")
    with pytest.raises(GrossRayError, match="ONNX Runtime cannot run the file: ") as caught:
        check_export(file, extract(supernet, (1, 2)), [])
    assert "\n" not in str(caught.value)
