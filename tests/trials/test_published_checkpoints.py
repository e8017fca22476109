"""Checkpoints as public training scripts write them: the weights are taken, and the rest is reported."""

from __future__ import annotations

import argparse
import enum
import sys
import types
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gross_ray.errors import InvalidValueError
from gross_ray.weights import LoadedWeights, load_weights

State = dict[str, Tensor]


class Network(nn.Module):
    """A convolution, batch-norm and a classifier called fc."""

    def __init__(self, num_classes: int = 4, channels: int = 6) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(images)).mean(dim=(2, 3)))


def made(seed: int = 1, **options: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(**options)
        network(torch.randn(8, 3, 5, 5))  # statistics
    return network


def trained(seed: int = 1, **options: int) -> State:
    return made(seed, **options).state_dict()


def under(prefix: str, tensors: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def saved(folder: Path, found: Any, *, legacy: bool = False) -> Path:
    file = folder / "checkpoint.pt"
    torch.save(found, file, _use_new_zipfile_serialization=not legacy)
    return file


def loaded(
    folder: Path, found: Any, *, key: str = "", expect: State | None = None, legacy: bool = False
) -> LoadedWeights:
    """Save, load, and compare each tensor with the expected one."""
    network, expect = made(seed=9), expect or trained()
    result = load_weights(network, saved(folder, found, legacy=legacy), key=key)
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expect.items())
    assert set(result.taken) | {"bn.num_batches_tracked"} == set(state)
    return result


def refused(folder: Path, found: Any, **options: Any) -> str:
    network = made(seed=9)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InvalidValueError) as caught:
        load_weights(network, saved(folder, found), **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line.removeprefix(f"weights {folder / 'checkpoint.pt'}: ")


class Config(dict):  # type: ignore[type-arg]
    """Like the configurations of Lightning and yacs."""


class Phase(enum.Enum):
    WARM_UP = 1


def own_function() -> None: ...


def training_state() -> dict[str, Any]:
    network = made()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    metrics: defaultdict[str, float] = defaultdict(float)
    metrics["top1"] = 91.2
    return {
        "epoch": 3,
        "best_acc1": torch.tensor(91.0),
        "acc": np.float64(91.0),
        "losses": np.arange(3.0),
        "rng": np.random.RandomState(0).get_state(),
        "args": argparse.Namespace(lr=0.1, out=Path("runs"), main=own_function, dtype=np.dtype("float32")),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "config": Config(depth=20),
        "phase": Phase.WARM_UP,
        "metrics": metrics,
    }


KEYS = ("net", "model", "state_dict", "network", "params", "weights", "model_state_dict", "teacher", "their_own")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", KEYS)
def test_a_state_dict_under_any_key_beside_training_state(tmp_path: Path, key: str, legacy: bool) -> None:
    result = loaded(tmp_path, training_state() | {key: trained()}, legacy=legacy)
    assert result.passed_over == tuple(training_state())
    assert result.lines == (
        f"'{key}' is taken; passed over: epoch, best_acc1, acc, losses, rng, args, optimizer, scheduler and 3 more",
    )


def test_the_file_is_the_state_dict_with_an_epoch_in_it(tmp_path: Path) -> None:
    result = loaded(tmp_path, {**trained(), "epoch": 3})
    assert (result.passed_over, result.lines) == (("epoch",), ("passed over: epoch",))
    assert loaded(tmp_path, trained()).lines == loaded(tmp_path, {"state_dict": trained()}).lines == ()


@pytest.mark.parametrize("nested", [("model", "state_dict"), ("checkpoint", "net", "weights"), ("a", "b")])
def test_nested_wrappers(tmp_path: Path, nested: tuple[str, ...]) -> None:
    found: Any = trained()
    for key in reversed(nested):
        found = {key: found, "version": 1}
    result = loaded(tmp_path, found)
    assert result.lines[0].startswith(f"'{'.'.join(nested)}' is taken; passed over: version, {nested[0]}.version")


def test_numpy_1_wrote_other_names(tmp_path: Path) -> None:
    file = saved(tmp_path, {"acc": np.float64(91.0), "net": trained()}, legacy=True)
    content = file.read_bytes()
    name = b"cnumpy._core.multiarray\nscalar\n" if b"numpy._core" in content else b"cnumpy.core.multiarray\nscalar\n"
    assert content.count(name) == 1
    for other in (b"cnumpy.core.multiarray\nscalar\n", b"cnumpy._core.multiarray\nscalar\n"):
        file.write_bytes(content.replace(name, other))
        assert load_weights(made(seed=9), file).passed_over == ("acc",)


def test_no_code_of_a_file_is_run_or_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    theirs = types.ModuleType("their_code")
    exec("class Settings:\n    def __setstate__(self, state):\n        print('run')", theirs.__dict__)
    settings = theirs.Settings()
    settings.depth = 20
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "their_code", theirs)
        file = saved(tmp_path, {"evil": Evil(), "settings": settings, "net": trained()})
    before = set(torch.serialization.get_safe_globals())  # torch has a set, whose order may change
    assert load_weights(made(seed=9), file).passed_over == ("evil", "settings")
    assert capsys.readouterr().out == ""
    assert "their_code" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == before


def test_the_users_own_allow_list_stays(tmp_path: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded(tmp_path, {"args": argparse.Namespace(lr=0.1), "net": trained()})
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_a_pickled_network_is_refused_with_what_helps(tmp_path: Path) -> None:
    line = refused(tmp_path, {"epoch": 3, "model": made()})
    assert line.startswith("has a pickled network under 'model', whose code is not run; load it with its code,")
    assert refused(tmp_path, made()).startswith("is a pickled network, whose code is not run")


@pytest.mark.parametrize("kind", ["TorchScript", "torch.export"])
def test_a_program_is_no_file_of_weights(tmp_path: Path, kind: str) -> None:
    file, network, images = tmp_path / "program.pt", made().eval(), torch.zeros(1, 3, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        if kind == "TorchScript":
            torch.jit.save(torch.jit.trace(network, images), str(file))
        else:
            torch.export.save(torch.export.export(network, (images,)), file)
    with pytest.raises(InvalidValueError, match=r"cannot be read \(a pickle of code, a TorchScript program, or not a"):
        load_weights(made(), file)


# Several state dicts


@pytest.mark.parametrize("averaged", ["model_ema", "ema", "state_dict_ema", "params-ema", "swa_model", "shadow"])
def test_raw_weights_are_taken_before_averaged_ones_and_a_key_chooses(tmp_path: Path, averaged: str) -> None:
    found = {averaged: trained(2), "net": trained(1), "epoch": 3}
    remedy = f"choose one, like weights_key={averaged} (--weights-key {averaged}; in Python key='{averaged}')"
    assert loaded(tmp_path, found).lines == (
        f"'net' is taken; passed over: epoch; there too: {averaged}; to take another, {remedy}",
    )
    result = loaded(tmp_path, found, key=averaged, expect=trained(2))
    assert result.passed_over == ("net", "epoch")
    assert result.lines[0].startswith(f"'{averaged}' is taken; passed over: epoch; there too: net; ")
    del found["net"]
    assert loaded(tmp_path, found, expect=trained(2)).lines == (f"'{averaged}' is taken; passed over: epoch",)


def test_the_averages_of_torch(tmp_path: Path) -> None:
    result = loaded(tmp_path, {"model_ema": AveragedModel(made()).state_dict()})
    assert result.passed_over == ("n_averaged",)
    assert result.lines == ("names are taken without the prefix 'module.'; passed over: the counters n_averaged",)


def test_of_equally_good_state_dicts_one_must_be_chosen(tmp_path: Path) -> None:
    found = {"left": trained(1), "right": trained(2), "small": {"weight": torch.zeros(1)}}
    count = len(trained())
    assert refused(tmp_path, found) == (
        f"has several state dicts: left ({count} tensors), right ({count} tensors); choose one, like weights_key=left "
        "(--weights-key left; in Python key='left')"
    )
    loaded(tmp_path, found, key="right", expect=trained(2))
    del found["right"]
    loaded(tmp_path, found, expect=trained(1))


@pytest.mark.parametrize("key", ["model_em", "conv.weight", "model.fc.weight", "epoch"])
def test_a_key_that_the_file_does_not_have(tmp_path: Path, key: str) -> None:
    line = refused(tmp_path, {"model": trained(), "ema": trained(), "epoch": 3}, key=key)
    assert line == (f"has no state dict and no prefix of names weights_key = '{key}'; it has: model, ema, bn, conv, fc")


def test_a_key_may_lead_into_nested_dicts(tmp_path: Path) -> None:
    found = {"model": {"state_dict": trained(1), "ema": {"weights": trained(2)}}}
    loaded(tmp_path, found)
    loaded(tmp_path, found, key="model")
    for key in ("model.ema", "model.ema.weights"):
        loaded(tmp_path, found, key=key, expect=trained(2))


# Prefixes of names


PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "backbone.", "_orig_mod.module.", "module.model.net.", "a.b.c.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_dropped_and_reported(tmp_path: Path, prefix: str) -> None:
    result = loaded(tmp_path, {"state_dict": under(prefix, trained())})
    assert result.lines == (f"names are taken without the prefix '{prefix}'",)


@pytest.mark.parametrize("added", ["net.", "module.body."])
def test_a_prefix_that_only_the_network_has_is_added(tmp_path: Path, added: str) -> None:
    network: nn.Module = made(seed=9)
    for name in reversed(added.removesuffix(".").split(".")):
        network = nn.ModuleDict({name: network})
    result = load_weights(network, saved(tmp_path, under("module.", trained())))
    state = network.state_dict()
    assert all(torch.equal(state[f"{added}{name}"], tensor) for name, tensor in trained().items())
    assert result.lines == (f"names are taken without the prefix 'module.'; names get the network's prefix '{added}'",)


def test_what_a_lightning_module_has_beside_the_network_is_passed_over(tmp_path: Path) -> None:
    tensors = under("net.", trained()) | {"loss.weight": torch.ones(4), "train_acc.total": torch.zeros(())}
    callbacks = {"EarlyStopping": {"wait_count": 0, "best_score": torch.tensor(0.9)}}
    found = {"state_dict": tensors, "callbacks": callbacks, "hyper_parameters": Config(lr=0.1)}
    result = loaded(tmp_path, found)
    assert result.lines == (
        "'state_dict' is taken; passed over: callbacks, hyper_parameters",
        "names are taken without the prefix 'net.'; passed over: 2 tensors beside the network (loss.weight, "
        "train_acc.total)",
    )
    assert result.passed_over == ("callbacks", "hyper_parameters", "loss.weight", "train_acc.total")


def test_averaged_names_beside_raw_ones(tmp_path: Path) -> None:
    tensors = under("ema_model.module.", trained(2)) | under("model.", trained(1))
    (line,) = loaded(tmp_path, tensors).lines
    assert "without the prefix 'model.'" in line
    assert "the names under ema_model.module fit too; to take others, " in line
    result = loaded(tmp_path, {"state_dict": tensors}, key="ema_model.module", expect=trained(2))
    assert set(result.passed_over) == set(under("model.", trained()))


def test_a_student_beside_its_teacher_must_be_chosen(tmp_path: Path) -> None:
    tensors = under("student.", trained(1)) | under("teacher.", trained(2))
    assert refused(tmp_path, tensors).startswith(
        "the names under student, teacher all fit; choose one, like weights_key=student"
    )
    loaded(tmp_path, tensors, key="teacher", expect=trained(2))


def test_a_prefix_after_which_only_a_part_fits_is_another_network(tmp_path: Path) -> None:
    tensors = under("features.", trained() | {"conv2.weight": torch.zeros(2)})
    assert "1 unexpected (conv2.weight)" in refused(tmp_path, tensors)
    del tensors["features.conv2.weight"], tensors["features.conv.bias"]
    line = refused(tmp_path, tensors)
    assert "1 missing (conv.bias); closest, its and ours: bn.bias (6,) and conv.bias (6,)" in line
    other = {"stage.conv.weight": torch.zeros(2), "stage.gain": torch.zeros(2), "stem.kernel": torch.zeros(2)}
    assert "3 unexpected (stage.conv.weight, stage.gain, stem.kernel)" in refused(tmp_path, other)  # one of 8 fits


# Counters


def test_counters_of_a_profiler_are_passed_over(tmp_path: Path) -> None:
    network = made()
    for module in network.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    result = loaded(tmp_path, {"net": under("module.", network.state_dict())})
    assert len(result.passed_over) == 8
    assert result.lines == (
        "names are taken without the prefix 'module.'; passed over: the counters module.total_ops, "
        "module.total_params, module.conv.total_ops and 5 more",
    )
    assert len(load_weights(network, tmp_path / "checkpoint.pt").passed_over) == 0  # this one has them


def test_the_counters_of_batch_norm_may_be_missing_or_too_many(tmp_path: Path) -> None:
    old = {name: tensor for name, tensor in trained().items() if not name.endswith("num_batches_tracked")}
    result = loaded(tmp_path, old)
    assert result.lines == ("batch-norm's counters num_batches_tracked are missing, and are not needed",)
    result = loaded(tmp_path, trained() | {"conv.num_batches_tracked": torch.tensor(3)})
    assert result.passed_over == ("conv.num_batches_tracked",)


# Another network


def test_another_networks_closest_names_are_told_with_both_shapes(tmp_path: Path) -> None:
    renamed = {name.replace("conv", "stem.conv").replace("fc", "head"): tensor for name, tensor in trained().items()}
    renamed["extra.weight"] = torch.zeros(7, 7)
    assert refused(tmp_path, renamed) == (
        "belong to another network: 4 missing (conv.weight, conv.bias, fc.weight, ...); 5 unexpected "
        "(stem.conv.weight, stem.conv.bias, head.weight, ...); closest, its and ours: stem.conv.weight (6, 3, 3, 3) "
        "and conv.weight (6, 3, 3, 3), stem.conv.bias (6,) and conv.bias (6,), head.weight (4, 6) and fc.weight "
        "(4, 6); name the model that they were trained in"
    )
    wide = refused(tmp_path, trained(channels=8))
    assert "of another shape (conv.weight (8, 3, 3, 3), not (6, 3, 3, 3), conv.bias (8,), not (6,), " in wide


# Another number of classes


def test_a_classifier_for_other_classes_begins_anew_if_the_network_is_trained_on(tmp_path: Path) -> None:
    network = made(seed=9)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    file = saved(tmp_path, {"net": under("module.", trained(num_classes=10))})
    with pytest.raises(InvalidValueError) as caught:
        load_weights(network, file)
    assert str(caught.value) == (
        f"weights {file}: classifier 'fc' would begin anew: the file has 10 classes, the data 4; only a network that "
        "is then trained on may have a new classifier, and this one is not: bring weights for as many classes as the "
        "data have"
    )
    result = load_weights(network, file, new_classifier=True)
    assert result.lines[-1] == "classifier 'fc' begins anew: the file has 10 classes, the data 4"
    for name, tensor in network.state_dict().items():
        source = before if name.startswith("fc.") else trained(num_classes=10)
        assert torch.equal(tensor, source[name])
    assert not {"fc.weight", "fc.bias"} & set(result.taken)
    same = load_weights(network, saved(tmp_path, trained()), new_classifier=True)
    assert same.lines == () and {"fc.weight", "fc.bias"} <= set(same.taken)


class Two(nn.Module):
    """A 1x1 convolution as the classifier, and a second one beside, whose weight is normalised."""

    def __init__(self, num_classes: int, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, width, 3)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(width, num_classes, 1))
        self.auxiliary = nn.utils.parametrizations.weight_norm(nn.Linear(width, num_classes))


def test_classifiers_of_other_kinds(tmp_path: Path) -> None:
    network, expected = Two(4), Two(9).state_dict()
    file = saved(tmp_path, expected)
    (line,) = load_weights(network, file, new_classifier=True).lines
    assert line == "classifiers 'classifier.1', 'auxiliary' begin anew: the file has 9 classes, the data 4"
    assert torch.equal(network.state_dict()["body.weight"], expected["body.weight"])


@pytest.mark.parametrize("theirs", [Two(4, width=8), nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(6, 4))])
def test_no_other_layer_begins_anew(tmp_path: Path, theirs: nn.Module) -> None:
    ours = Two(4) if isinstance(theirs, Two) else nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(6, 4))
    with pytest.raises(InvalidValueError, match="belong to another network: .* of another shape"):
        load_weights(ours, saved(tmp_path, theirs.state_dict()), new_classifier=True)


def test_safetensors_have_prefixes_and_counters_too(tmp_path: Path) -> None:
    tensors = under("module.", trained(num_classes=10)) | {"n_averaged": torch.tensor(1)}
    save_file(tensors, tmp_path / "w.safetensors")
    result = load_weights(made(seed=9), tmp_path / "w.safetensors", new_classifier=True)
    assert result.passed_over == ("n_averaged",) and len(result.lines) == 2
