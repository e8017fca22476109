"""Weights from a user's files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from gross_ray.errors import InvalidValueError
from gross_ray.weights import load_weights


@pytest.fixture
def trained() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        made(torch.randn(8, 3, 5, 5))
    return made.state_dict()


def fresh() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


FORMS = {
    "safetensors": lambda tensors, file: save_file(tensors, file),
    "plain.pt": lambda tensors, file: torch.save(tensors, file),
    "wrapped.pth": lambda tensors, file: torch.save({"epoch": 3, "state_dict": tensors}, file),
    "parallel.pt": lambda tensors, file: torch.save({f"module.{name}": one for name, one in tensors.items()}, file),
    "old.pt": lambda tensors, file: torch.save(tensors, file, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_state_dict_is_read(trained: dict[str, Tensor], tmp_path: Path, form: str) -> None:
    file = tmp_path / f"network.{form}"
    FORMS[form](trained, file)
    loaded = fresh()
    load_weights(loaded, file)
    assert all(torch.equal(one, trained[name]) for name, one in loaded.state_dict().items())


def test_weights_of_another_network_are_refused_in_one_line(trained: dict[str, Tensor], tmp_path: Path) -> None:
    del trained["0.bias"], trained["1.weight"]
    trained |= {"head.weight": torch.zeros(2), "2.bias": torch.zeros(5)}
    save_file(trained, tmp_path / "w.safetensors")
    line = (
        r"w.safetensors: belong to another network: 2 missing \(0.bias, 1.weight\); 1 unexpected \(head.weight\); "
        r"1 of another shape \(2.bias \(5,\), not \(2,\)\); closest, its and ours: head.weight "
        r"\(2,\) and 1.weight \(4,\); name the model that they were trained in$"
    )
    loaded = fresh()
    before = {name: one.clone() for name, one in loaded.state_dict().items()}
    with pytest.raises(InvalidValueError, match=line):
        load_weights(loaded, tmp_path / "w.safetensors")
    assert all(torch.equal(one, before[name]) for name, one in loaded.state_dict().items())


def test_a_file_without_the_counts_of_batch_norm_fits(tmp_path: Path) -> None:
    network, other = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    tensors = {name: one for name, one in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(tensors, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert all(torch.equal(one, other.state_dict()[name]) for name, one in tensors.items())
    del tensors["1.running_mean"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(InvalidValueError, match=r"1 missing \(1.running_mean\)"):
        load_weights(other, tmp_path / "w.safetensors")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


def test_a_file_without_a_state_dict_is_refused_and_none_of_its_code_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({}, tmp_path / "empty.pt")
    torch.save(Evil(), tmp_path / "evil.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    (tmp_path / "bytes.pt").write_bytes(b"\x80\x02.")
    (tmp_path / "hosts.pt").write_text("root:x:0:0\n")
    torch.save({0: torch.ones(1)}, tmp_path / "numbered.pt")
    torch.save({"0.weight": torch.eye(2).to_sparse()}, tmp_path / "sparse.pt")
    refused = {
        "list.pt": "is a list, not a state dict of tensors",
        "empty.pt": "is a dict, not a state dict",
        "evil.pt": "is a dict, not a state dict",
        "plain.pkl": "cannot be read",
        "text.pt": "cannot be read",
        "bytes.pt": r"cannot be read \(a pickle of code, a TorchScript program, or not a file of torch.save\); save a",
        "hosts.pt": "cannot be read",
        "numbered.pt": "is a dict, not a state dict",
        "sparse.pt": "is a dict, not a state dict",
        "text.safetensors": "cannot be read",
        "nowhere.pt": "there is no such file",
    }
    for name, part in refused.items():
        with pytest.raises(InvalidValueError, match=part) as error:
            load_weights(fresh(), tmp_path / name)
        assert len(str(error.value).splitlines()) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1j])
def test_weights_that_are_not_finite_real_numbers_are_refused(
    trained: dict[str, Tensor], tmp_path: Path, value: complex
) -> None:
    trained["0.weight"] = trained["0.weight"] * value
    torch.save(trained, tmp_path / "w.pt")
    with pytest.raises(
        InvalidValueError, match=r"1 contain NaN, infinity or complex numbers \(0.weight\); use weights"
    ):
        load_weights(fresh(), tmp_path / "w.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_dropped(trained: dict[str, Tensor], tmp_path: Path, prefix: str) -> None:
    torch.save({f"{prefix}{name}": tensor for name, tensor in trained.items()}, tmp_path / "w.pt")
    loaded = fresh()
    load_weights(loaded, tmp_path / "w.pt")
    assert all(torch.equal(one, trained[name]) for name, one in loaded.state_dict().items())


class Twice(nn.Module):
    """One convolution under two names, and another of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Conv2d(3, 3, 3)
        self.other = nn.Conv2d(3, 3, 3)


def test_a_module_under_two_names_may_be_stored_under_one(tmp_path: Path) -> None:
    made, network = Twice(), Twice()
    save_model(made, str(tmp_path / "shared.safetensors"))
    load_weights(network, tmp_path / "shared.safetensors")
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in made.state_dict().items())
    lacking = {name: one for name, one in made.state_dict().items() if not name.startswith("other")}
    torch.save(lacking, tmp_path / "lacking.pt")
    with pytest.raises(InvalidValueError, match="2 missing .other.weight, other.bias"):
        load_weights(network, tmp_path / "lacking.pt")


def test_a_network_whose_names_begin_like_a_prefix_keeps_them(trained: dict[str, Tensor], tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = fresh()

    for prefix in ("module.", "module.module."):
        torch.save({f"{prefix}{name}": one for name, one in trained.items()}, tmp_path / "w.pt")
        loaded = Wrapped()
        load_weights(loaded, tmp_path / "w.pt")
        assert all(torch.equal(one, trained[name]) for name, one in loaded.module.state_dict().items())
