"""`compress`: one call from a trained network and images to a smaller network."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gross_ray import BTDOptions, Compressed, compress, compression, decompose_model
from gross_ray.compression import Data
from gross_ray.data.image_set import ImageSet
from gross_ray.data.normalisation import Normalisation
from gross_ray.defaults import GROUP_SIZES, LEAST_STEPS, augmentation_for, compression_experiment, mirrored_alike
from gross_ray.efforts import EFFORTS
from gross_ray.errors import DatasetError, GrossRayError, InvalidValueError
from gross_ray.search.latency import LatencyModel
from gross_ray.search.operations import count_operations
from gross_ray.space import DENSE, SearchSpace
from gross_ray.supernet.configure import check_plain, series_layers
from gross_ray.training import rates

FEW = ["decomposition.max_steps=5", "search.top=2", "finetuning.epochs=1", "finetuning.milestones=[]"]


def small(channels: int = 16) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, channels, 3, stride=2),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 4),
        )
        network(torch.randn(32, 3, 16, 16))  # statistics
    return network


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    noise = torch.randint(80, (count, 3, 16, 16), generator=generator)
    return (noise + 40 * labels[:, None, None, None]).to(torch.uint8), labels


@pytest.fixture(scope="module")
def few() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "STEPS", 2)
        patch.setattr(rates.find_rate, "__defaults__", ((1e-3, 1e-2),))
        yield


@pytest.fixture(scope="module")
def compressed(few: object) -> tuple[Compressed, nn.Module, list[tuple[str, float]]]:
    network, steps = small(), []

    def on_progress(step: str, share: float) -> None:
        steps.append((step, share))

    found = compress(
        network,
        pictures(200, 0),
        pictures(80, 1),
        budget=["macs=60%", "parameters=95%"],
        effort="quick",
        settings=FEW,
        on_progress=on_progress,
    )
    return found, network, steps


def test_the_network_is_plain_within_the_budgets_and_as_accurate_as_the_table_says(
    compressed: tuple[Compressed, nn.Module, list[tuple[str, float]]],
) -> None:
    found, network, _ = compressed
    check_plain(found.network, "the test")
    assert not found.network.training
    full, *candidates = found.table.to_dict("records")
    assert full["network"] == "full network" and full["macs"] == count_operations(network, (3, 16, 16)).macs
    assert len(candidates) == 2
    for row in candidates:
        assert row["macs"] <= 0.6 * full["macs"] and row["parameters"] <= 0.95 * full["parameters"]
    best = max(candidates, key=lambda row: row["val_accuracy"])
    assert best["network"] == str(found.configuration)
    images, labels = pictures(80, 1)
    with torch.no_grad():
        logits = found.network(Normalisation()(images))
    assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(best["test_accuracy"], abs=1e-6)
    assert json.loads(json.dumps(found.card))["configuration"] == str(found.configuration)
    assert (found.card["macs"], found.card["parameters"]) == (best["macs"], best["parameters"])
    assert found.card["classes"] == ["0", "1", "2", "3"]
    assert not any(name in found.card["experiment"] for name in ("model", "weights", "data.name"))
    found_rates = found.card["learning rates"]
    own = [f"{name}: {stage}" for name in found.table["network"][1:] for stage in ("reconstruct", "finetune")]
    assert [*found_rates] == ["reconstruct", "finetune", *own] and {*found_rates.values()} <= {1e-3, 1e-2}


def test_the_given_network_stays_as_it_was_and_its_layers_are_chosen_once(
    few: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gross_ray.supernet.build.choice_of", lambda *_, **__: pytest.fail("chosen again"))
    network = small()
    before, mode = copy.deepcopy(network.state_dict()), network.training
    words = {"budget": "macs=70%", "effort": "quick", "adapt": 1, "settings": [*FEW, "search.top=1"]}
    compress(network, pictures(120, 0), pictures(40, 1), on_progress=lambda *_: None, **words)  # type: ignore[arg-type]
    assert network.training == mode
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_progress_names_each_step_in_order_and_never_goes_back(
    compressed: tuple[Compressed, nn.Module, list[tuple[str, float]]],
) -> None:
    found, _, steps = compressed
    names = list(dict.fromkeys(step for step, _ in steps))
    assert names[:7] == [
        *("latency in onnxruntime", "decompose", "reconstruct: learning rate", "reconstruct"),
        *("finetune: learning rate", "finetune", "search"),
    ]
    assert f"{found.configuration}: finetune" in names
    for name in names:
        shares = [share for step, share in steps if step == name]
        assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1


@pytest.mark.parametrize("nested", [False, True])
def test_candidates_start_from_the_decompositions_not_from_the_trained_supernet(
    few: object, monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    started: list[Any] = []
    alone = compression._alone
    monkeypatch.setattr(compression, "_alone", lambda *given: (started.append(given[2]), alone(*given))[1])
    settings = [*FEW, "search.top=1", "finetuning.lr=0.1", "reconstruction.lr=0.1"]
    settings += [f"decomposition.nested={str(nested).lower()}"]
    words = {"budget": "macs=70%", "effort": "quick", "settings": settings, "on_progress": lambda *_: None}
    compress(small(), pictures(120, 0), pictures(40, 1), **words)  # type: ignore[arg-type]
    sizes = {"3": (1, 4), "6": (1, 4)}
    options = BTDOptions(tolerance=1e-4, max_steps=5)
    oracle = series_layers(decompose_model(small(), group_sizes=sizes, options=options, nested=nested))
    assert {name: tuple(each) for name, each in started[0].items()} == sizes
    for name, layer in oracle.items():
        for size in sizes[name]:
            torch.testing.assert_close(started[0][name][size].dense_kernel(), layer.bottleneck(size).dense_kernel())


def test_faster_forms_stay_within_a_budget_of_macs(few: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(supernet: nn.Module, *_: object) -> LatencyModel:
        sizes = SearchSpace.of(supernet).group_sizes
        added = {layer: {DENSE: 0.0} | dict.fromkeys(each, 0.1) for layer, each in sizes.items()}
        return LatencyModel(
            runtime="onnxruntime", version="1", device="a", host="b", batch_size=1, threads=1, full_ms=9.0,
            added_ms=added, num_sampled=3, median_error=0.1, noise=0.1,
        )  # fmt: skip

    monkeypatch.setattr(compression, "_measured", slower)
    words = {"budget": "macs=60%", "effort": "quick", "settings": FEW, "on_progress": lambda *_: None}
    found = compress(small(), pictures(120, 0), pictures(40, 1), **words)  # type: ignore[arg-type]
    full, *candidates = found.table.to_dict("records")
    (row,) = [one for one in candidates if one["network"] == str(found.configuration)]
    assert count_operations(found.network, (3, 16, 16)).macs == row["macs"] <= 0.6 * full["macs"]
    assert row["latency_ms"] == pytest.approx(9.0 + 0.1 * sum(size != DENSE for size in found.configuration))


@pytest.mark.parametrize(
    ("kind", "image_size"),
    [(lambda images, labels: (images, labels), ""), (TensorDataset, ""), (TensorDataset, (16, 16))],
)
def test_tensors_and_datasets_are_the_same_images(
    kind: Callable[[Tensor, Tensor], Data], image_size: str | tuple[int, int], few: object
) -> None:
    train, test = (kind(*pictures(count, seed)) for count, seed in ((120, 0), (40, 1)))
    found = compress(
        small(),
        train,
        test,
        validation=kind(*pictures(60, 2)),
        budget="macs=70%",
        effort="quick",
        settings=[*FEW, "search.top=1", "search.form=dense"],
        on_progress=lambda *_: None,
        image_size=image_size,
    )
    assert ("each image" in found.card["input"]) == (image_size != "")
    rows = found.table[["val_accuracy", "test_accuracy", "macs"]].to_numpy()
    _SEEN.append(rows)
    assert (rows == _SEEN[0]).all()


_SEEN: list[object] = []


@pytest.mark.parametrize(
    ("words", "error", "line"),
    [
        ({"budget": []}, InvalidValueError, "no budget: name one or more, like macs=40%"),
        ({"budget": "macs=0.1%"}, InvalidValueError, "nothing fits; the smallest is"),
        ({"budget": "macs=40%", "effort": "some"}, InvalidValueError, "effort = 'some': must be one of quick, normal"),
        ({"budget": "macs=40%", "runtime": "tflite"}, InvalidValueError, "latency.runtime = 'tflite'"),
        ({"budget": "macs=40%", "settings": ["search.tops=1"]}, InvalidValueError, "unknown field 'search.tops'"),
        ({"budget": "macs=40%", "test": (torch.zeros(4, 3, 8, 8), torch.zeros(4))}, DatasetError, "set the size"),
    ],
)
def test_what_cannot_be_is_one_line(words: dict[str, object], error: type[GrossRayError], line: str) -> None:
    given = {"train": pictures(40, 0), "test": pictures(20, 1), "on_progress": lambda *_: None, **words}
    with pytest.raises(error) as refused:
        compress(small(), **given)  # type: ignore[arg-type]
    assert line in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("num_images", [17, 129, 257, 6401, 12_801, 50_000])
@pytest.mark.parametrize("effort", EFFORTS)
def test_no_epoch_ends_with_a_batch_of_one_image(num_images: int, effort: str) -> None:
    found = compression_experiment(small(), (3, 16, 16), budgets=["macs=40%"], num_images=num_images, effort=effort)
    for schedule in (found.training, found.reconstruction, found.finetuning, found.validation.finetuning):
        assert schedule.images_of(num_images) % schedule.batch_size != 1
        assert schedule.lr == 0
        steps = schedule.images_of(num_images) / schedule.batch_size
        assert steps >= LEAST_STEPS or schedule.batch_size <= 16


def test_choices_that_do_not_pay_are_left_out() -> None:
    found = compression_experiment(small(), (3, 16, 16), budgets=["macs=40%"], num_images=100)
    assert found.decomposition.group_sizes == GROUP_SIZES and found.decomposition.keep_dense
    # The second convolution has 8 input channels, which 16 does not divide; in the third, 16 groups nothing.
    assert found.decomposition.layer_group_sizes == ("6=1,4",)
    assert found.search.strategy == "exhaustive" and found.search.limits == ("macs=40%",)


def test_images_are_mirrored_only_for_a_network_that_does_not_mind() -> None:
    class Left(nn.Module):
        """Tells images that are bright on the left from those that are bright on the right, or on top, or nowhere."""

        def forward(self, x: Tensor) -> Tensor:
            halves = x.mean(1).unflatten(2, (2, 8)).mean((1, 3))
            return torch.cat([halves, x.new_zeros(len(x), 2)], dim=1)

    images = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    images[:20, :, :, :8], images[20:, :, :, 8:] = 200, 200
    sides = torch.arange(40) // 20
    assert not mirrored_alike(Left(), ImageSet(images, sides))
    assert mirrored_alike(Left(), ImageSet(images.flip(3), sides))  # no better than chance: it tells nothing
    bright = ImageSet(torch.full_like(images, 200), torch.zeros(40, dtype=torch.int64))
    assert mirrored_alike(Left(), bright)
    assert [augmentation_for(Left(), ImageSet(each, sides)) for each in (images, images.flip(3))] == ["none", "crop"]
    for augment in ("none", "crop"):
        words = {"budgets": ["macs=40%"], "num_images": 100, "augment": augment}
        found = compression_experiment(small(), (3, 16, 16), **words)  # type: ignore[arg-type]
        assert {found.finetuning.augment, found.reconstruction.augment, found.training.augment} == {augment}


def test_epochs_change_the_candidates_in_proportion() -> None:
    found = compression_experiment(small(), (3, 16, 16), budgets=["macs=40%"], num_images=100, epochs=12)
    assert (found.finetuning.epochs, found.validation.finetuning.epochs) == (12, 8)
