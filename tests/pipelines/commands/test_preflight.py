"""What is wrong with an experiment is found before a run folder is made."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from miniature import invoke
from torch import nn

from gross_ray.data.image_set import Splits
from gross_ray.data.images import load_dataset
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import DataOptions
from gross_ray.models import MODELS
from gross_ray.presets import preset
from pipelines.commands.preflight import check_experiment
from pipelines.commands.run_folders import run_folder
from pipelines.driver import DataSource

SMALL = DataOptions(name="sample", limit_train=4, limit_validation=4, limit_test=4)
WRONG = [
    (['decomposition.layers=["conb*"]'], "layers 'conb*': matches no convolution .* known names: conv2, conv3, conv4"),
    (['decomposition.layers=["conv9"]'], "'conv9' is not a dense convolution of this network"),
    (["decomposition.group_sizes=[5]"], "none of the group-sizes 5 divides its 32 input channels"),
    (
        ['decomposition.layer_group_sizes=["conv2=4,6"]'],
        r"search.budgets = \(16, 4\): group-size 16 is not among those of conv2: 4; name such as every layer has: 4$",
    ),
    (
        ['decomposition.layer_group_sizes=["conv2=2","conv3=4,8"]'],
        r"no group-size of all layers is left; have search.limits, .*search.budgets=\[\], validation.fixed=\[\] and",
    ),
    (["search.budgets=[16,3]"], r"search.budgets = \(16, 3\): group-size 3 is not .*; name such as every layer has"),
    (["validation.fixed=[5]"], r"validation.fixed = \(5,\): group-size 5 is not among"),
    (
        ["search.budgets=[16,1]"],
        r"search.budgets = \(16, 1\): 1-1-1 is the cheapest configuration, nothing else fits under it; name .* 2, 4,",
    ),
    (
        ["decomposition.group_sizes=[1]", 'decomposition.layer_group_sizes=["conv2=1,2"]'],
        r"search.budgets = \(16, 4\): group-size 16 is not .*; no group-size .* is left; have search.limits",
    ),
    (['search.limits=["macs=1M"]'], "budget macs=1M: nothing fits; the smallest is macs=1.9.*M at 1-1-1"),
    (['search.limits=["parameters=1G,macs=1M"]'], "budget macs=1M: nothing fits"),
    (['search.limits=["macs=20%"]'], "budget macs=1.01632M, 20 % of the full network's: nothing fits; the smallest is"),
    (
        ["decomposition.keep_dense=true", "search.budgets=[32]"],
        r"group-size 32 is not among .* conv2: 1, 2, 4, 8, 16, d \(group-sizes 32: no fewer MACs or parameters than",
    ),
    (['search.limits=["macs_paper=60%"]'], "only macs, parameters, latency_ms may be limited in percent of the full"),
    (["model=vgg16"], "the space has .* configurations; let a strategy choose"),
    (["model=vgg16", "weights=WEIGHTS", "training.seeds=1"], "belong to another network: .* missing"),
]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_dataset(SMALL)


@pytest.mark.parametrize(("settings", "told"), WRONG, ids=[" ".join(settings) for settings, _ in WRONG])
def test_what_is_wrong_is_told(splits: Splits, tmp_path: Path, settings: list[str], told: str) -> None:
    torch.save(MODELS["four-conv"](10, 32).state_dict(), tmp_path / "own.pt")
    named = [setting.replace("WEIGHTS", str(tmp_path / "own.pt")) for setting in settings]
    with pytest.raises(InvalidValueError, match=told.replace("*'", "[*]'")) as refused:
        check_experiment(preset("quickstart").override(named), splits)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["quickstart", "fashion", "vgg16-short"])
def test_nothing_is_wrong_with_the_presets(splits: Splits, name: str) -> None:
    check_experiment(preset(name), splits)


def test_a_limit_in_milliseconds_is_left_to_the_search(splits: Splits) -> None:
    check_experiment(
        preset("quickstart").override(['search.limits=["latency_ms=0.001,macs=2.5M","latency_ms=1%"]']), splits
    )


def test_layers_without_a_common_group_size_have_limits_alone(splits: Splits) -> None:
    apart = ['decomposition.layer_group_sizes=["conv2=2","conv3=4,8"]', 'search.limits=["macs=2.2M"]']
    none = ["search.budgets=[]", "validation.fixed=[]", "sweep.alphas=[]"]
    check_experiment(preset("quickstart").override([*apart, *none]), splits)


class Addressed(nn.Module):
    """A module that prints differently each time it is made."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))

    def extra_repr(self) -> str:
        return hex(id(self))


DRAWN: list[tuple[nn.Module, ...]] = []
"""What each of the next calls of `drawn` puts first into its network."""


def drawn(num_classes: int) -> nn.Module:
    return nn.Sequential(*DRAWN.pop(0), nn.Conv2d(4, 4, 3), Addressed(), nn.Linear(4, num_classes))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (nn.Conv2d(3, 4, 3), None),
        (
            nn.Conv2d(3, 4, 3, stride=2),
            r"0: Conv2d\(3, 4, .* stride=\(1, 1\)\), then with 0: .* stride=\(2, 2\)\); let",
        ),
        (nn.Conv2d(3, 4, 3, bias=False), r"0: Conv2d\(.*\), then with 0: Conv2d\(.*bias=False\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"0: Conv2d\(.*\), then with 0: Sequential\(\)"),
    ],
)
def test_a_factory_whose_result_changes_is_named(splits: Splits, other: nn.Module, named: str | None) -> None:
    DRAWN[:] = [(nn.Conv2d(3, 4, 3),), (other,)]
    experiment = preset("quickstart").override(
        [f"model={__name__}:drawn", "search.budgets=[2]", "validation.fixed=[2]"]
    )
    line = f"model '{__name__}:drawn': its factory returns another network at each call, first with {named}"
    with pytest.raises(InvalidValueError, match=line) if named else nullcontext():
        check_experiment(experiment, splits)


def test_images_that_do_not_fit_the_network_are_named(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(num_classes: int, image_size: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, num_classes))

    monkeypatch.setitem(MODELS, "four-conv", small)
    with pytest.raises(InvalidValueError, match="the network cannot run an image of 3x32x32: RuntimeError: .*mat1"):
        check_experiment(preset("quickstart"), splits)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(4 * 28 * 28, 5)),
            r"gives \(1, 5\) for an image of 3x32x32; must",
        ),
        (nn.Identity(), r"gives \(1, 4, 28, 28\) for an image"),
    ],
)
def test_an_output_that_is_no_logits_is_told(
    splits: Splits, monkeypatch: pytest.MonkeyPatch, head: nn.Module, told: str
) -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), head)
    monkeypatch.setitem(MODELS, "four-conv", lambda num_classes, image_size: body)
    with pytest.raises(InvalidValueError, match=told):
        check_experiment(preset("quickstart"), splits)


class Fussy(nn.Module):
    """A network that runs an image, and has something wrong with its training."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
        )

    def forward(self, images: torch.Tensor) -> object:
        logits = self.layers(images)
        if self.fault == "several outputs" and self.training:
            return logits, logits
        return logits.detach() if self.fault == "no gradient" else logits

    def get_extra_state(self) -> object:
        return {"a": 1} if self.fault == "extra state" else torch.zeros(1)

    def set_extra_state(self, state: object) -> None:
        pass


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("several outputs", "cannot be trained: TypeError: .*tuple"),
        ("no gradient", "cannot be trained: RuntimeError: .*does not require grad"),
        ("extra state", "_extra_state of its state dict is no tensor"),
        ("double", "cannot run an image of 3x32x32: RuntimeError: .*type"),
    ],
)
def test_what_a_training_would_meet_is_told(
    splits: Splits, monkeypatch: pytest.MonkeyPatch, fault: str, told: str
) -> None:
    network = Fussy(fault).double() if fault == "double" else Fussy(fault)
    monkeypatch.setitem(MODELS, "four-conv", lambda num_classes, image_size: network)
    state = torch.get_rng_state()
    with pytest.raises(InvalidValueError, match=told) as refused:
        check_experiment(preset("quickstart"), splits)
    assert len(str(refused.value).splitlines()) == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("images", "refused"), [(0, True), (3, False)])
def test_a_last_batch_of_one_image_is_told_where_the_network_cannot_take_it(
    splits: Splits, monkeypatch: pytest.MonkeyPatch, images: int, refused: bool
) -> None:
    def network(num_classes: int, image_size: int) -> nn.Module:
        pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*pooled, nn.BatchNorm1d(4), nn.Linear(4, num_classes))

    monkeypatch.setitem(MODELS, "four-conv", network)
    settings = ["training.batch_size=3", f"training.images={images}", "search.budgets=[2]", "validation.fixed=[2]"]
    told = "training.batch_size = 3: the last of 4 images is a batch by itself, .*; set another training.batch_size"
    with pytest.raises(InvalidValueError, match=told) if refused else nullcontext():
        check_experiment(preset("quickstart").override(settings), splits)


@pytest.mark.parametrize(
    ("setting", "refused"), [("engine.parallel_seeds=2", True), ("engine.parallel_seeds=1", False)]
)
def test_supernets_that_cannot_be_stacked_are_told(
    splits: Splits, monkeypatch: pytest.MonkeyPatch, setting: str, refused: bool
) -> None:
    def network(num_classes: int, image_size: int) -> nn.Module:
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Dropout2d(), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, num_classes))

    monkeypatch.setitem(MODELS, "four-conv", network)
    with pytest.raises(InvalidValueError, match=r"\(engine.parallel_seeds=1\)$") if refused else nullcontext():
        check_experiment(preset("quickstart").override([setting, "search.budgets=[2]", "validation.fixed=[2]"]), splits)


def test_what_has_no_effect_is_told_when_a_folder_is_made(
    splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Source(DataSource):
        def load(self, _options: DataOptions) -> Splits:
            return splits

    for _ in range(2):
        run_folder(str(tmp_path / "run"), "quickstart", ("training.epochs=2",), Source())
    assert capsys.readouterr().err == "without effect: training.milestones = [3]: 2 epochs do not reach 3\n"


def test_no_folder_is_made(tmp_path: Path) -> None:
    words = ["--preset", "quickstart", "--set", 'decomposition.layers=["conb2"]']
    for command in (["run", "--out", tmp_path / "run"], ["train", tmp_path / "run"]):
        refused = invoke(*command, *words)
        assert refused.exit_code == 2, refused.stderr
        assert refused.stderr.startswith("Error: 'conb2' is not a dense convolution")
        assert len(refused.stderr.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []
