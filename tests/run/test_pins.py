"""A run folder stores the hashes of its images and of the weights it was given, and refuses other ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from gross_ray.data.identity import identity_of
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import DatasetError, InvalidValueError, RunFolderError
from gross_ray.experiment import DataOptions, Experiment, TrainingOptions
from gross_ray.run.pins import fingerprint, pin, pin_weights, stored_data, stored_weights
from gross_ray.run.store import RunStore
from gross_ray.weights import hash_of_tensors, read_weights


def splits_of(value: int) -> Splits:
    images = ImageSet(torch.full((4, 3, 2, 2), value, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    return Splits("own", images, images, images, ("a", "b"))


def given(path: Path | str) -> Experiment:
    return Experiment(weights=str(path), training=TrainingOptions(seeds=1))


def of_folder(path: Path | str) -> Experiment:
    return Experiment(data=DataOptions(name=f"folder:{path}"))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


# Images


def test_the_images_that_are_loaded_first_are_pinned_and_others_are_refused(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", Experiment())
    assert stored_data(store) is None
    first = splits_of(1)
    pin(store, first)
    before = (store.path / "data.json").stat().st_mtime_ns
    pin(RunStore.open(store.path), first)
    assert stored_data(store) == identity_of(first)
    with pytest.raises(DatasetError, match=rf"the validation split differs from the one that {store.path} was made"):
        pin(store, replace(first, validation=splits_of(2).validation))
    assert (store.path / "data.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"train": {"hash": "a"}}'])
@pytest.mark.parametrize("name", ["data", "weights"])
def test_a_damaged_pin_is_named(tmp_path: Path, name: str, text: str) -> None:
    store = RunStore.create(tmp_path / "run", given("w.pt"))
    (store.path / f"{name}.json").write_text(text)
    with pytest.raises(RunFolderError, match=rf"run/{name}\.json is damaged .*restore it, or delete it") as caught:
        stored_data(store) if name == "data" else stored_weights(store)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_of_images_may_move_but_not_before_it_is_pinned(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", of_folder("/data/a"))
    with pytest.raises(RunFolderError, match=r"data.name \('folder:/data/b', not 'folder:/data/a'\)"):
        RunStore.create(store.path, of_folder("/data/b"))
    pin(store, splits_of(1))
    moved = RunStore.create(store.path, of_folder("/data/b"))
    pin(moved, splits_of(1))
    with moved.lock():
        assert moved.experiment.data.name == "folder:/data/b"
    with pytest.raises(DatasetError, match="the train split differs"):
        pin(moved, splits_of(2))
    with pytest.raises(RunFolderError, match=r"data.name \('cifar10', not 'folder:/data/a'\)"):
        RunStore.create(store.path, Experiment(data=DataOptions(name="cifar10")))


def test_fingerprints_go_by_hashes_in_place_of_paths(tmp_path: Path) -> None:
    told = {}
    for name, path, value in (("a", "/data/a", 1), ("moved", "/mnt/b", 1), ("other", "/data/a", 2)):
        store = RunStore.create(tmp_path / name, of_folder(path))
        pin(store, splits_of(value))
        told[name] = fingerprint(store)
    assert told["a"] == told["moved"] != told["other"]
    plain = RunStore.create(tmp_path / "plain", Experiment())
    assert fingerprint(plain) == Experiment().fingerprint()
    pin(plain, splits_of(1))
    assert fingerprint(plain) == Experiment().fingerprint()  # without a path, it does not wait for the images


# Weights


def test_one_hash_for_every_form_of_the_same_weights(tmp_path: Path) -> None:
    tensors = network().state_dict()
    expected = hash_of_tensors(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    torch.save(tensors, tmp_path / "w.pth")
    torch.save({"epoch": 3, "state_dict": dict(reversed(tensors.items()))}, tmp_path / "wrapped.pt")
    torch.save({f"module._orig_mod.{name}": one for name, one in tensors.items()}, tmp_path / "prefixed.pt")
    counted = {name: one for name, one in tensors.items() if not name.endswith("num_batches_tracked")}
    torch.save(counted, tmp_path / "uncounted.pt")
    laid_out = network().to(memory_format=torch.channels_last).state_dict()
    assert not laid_out["0.weight"].is_contiguous()
    torch.save(laid_out, tmp_path / "channels_last.pt")
    for file in sorted(tmp_path.iterdir()):
        assert hash_of_tensors(read_weights(file)) == expected, file.name


def test_a_shared_tensor_counts_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.again = nn.Conv2d(3, 3, 3)
            self.other = nn.Conv2d(3, 3, 3)

    made = Twice()
    save_model(made, str(tmp_path / "w.safetensors"))
    torch.save(made.state_dict(), tmp_path / "w.pt")
    hashes = {hash_of_tensors(read_weights(tmp_path / name)) for name in ("w.safetensors", "w.pt")}
    assert hashes == {hash_of_tensors(made.state_dict())}
    separate = {name: one.clone() for name, one in made.state_dict().items()}
    assert hash_of_tensors(separate) not in hashes


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape", "sign", "lacking"])
def test_any_change_of_weights_gives_another_hash(change: str) -> None:
    tensors: dict[str, Tensor] = {name: one.clone() for name, one in network().state_dict().items()}
    expected = hash_of_tensors(tensors)
    if change == "value":
        tensors["2.weight"][1, 2, 0, 0] += 1e-6
    elif change == "name":
        tensors["2.gain"] = tensors.pop("2.weight")
    elif change == "dtype":
        tensors["2.weight"] = tensors["2.weight"].double()
    elif change == "shape":
        tensors["2.weight"] = tensors["2.weight"].reshape(4, 2, 1, 1)
    elif change == "sign":
        tensors["1.running_mean"][0] = -0.0
    else:
        del tensors["2.bias"]
    assert hash_of_tensors(tensors) != expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64])
def test_tensors_of_every_kind_have_a_hash(dtype: torch.dtype) -> None:
    one, other = ({"a": torch.tensor(value).to(dtype), "b": torch.zeros(0, 3).to(dtype)} for value in (0.0, 1.0))
    assert hash_of_tensors(one) != hash_of_tensors(other)
    assert hash_of_tensors(one) == hash_of_tensors({name: tensor.clone() for name, tensor in one.items()})


def test_a_file_of_weights_may_move_and_change_its_form_but_not_its_tensors(tmp_path: Path) -> None:
    torch.save(network(0).state_dict(), tmp_path / "w.pth")
    save_file(network(0).state_dict(), tmp_path / "elsewhere.safetensors")
    torch.save(network(1).state_dict(), tmp_path / "other.pth")
    store = RunStore.create(tmp_path / "run", given(tmp_path / "w.pth"))
    pin_weights(store, read_weights(tmp_path / "w.pth"))
    moved = RunStore.create(store.path, given(tmp_path / "elsewhere.safetensors"))
    pin_weights(moved, read_weights(moved.experiment.weights))
    assert fingerprint(moved) == fingerprint(store) != store.experiment.fingerprint(weights="another")
    other = RunStore.create(store.path, given(tmp_path / "other.pth"))
    then, now = (hash_of_tensors(network(seed).state_dict())[:12] for seed in (0, 1))
    with pytest.raises(InvalidValueError, match=rf"other.pth: the tensors differ .*their hash is {now}, not {then}; "):
        pin_weights(other, read_weights(other.experiment.weights))
    with pytest.raises(RunFolderError, match="weights \\('', not "):
        RunStore.create(store.path, Experiment(training=TrainingOptions(seeds=1)))
