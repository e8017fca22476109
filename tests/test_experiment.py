import dataclasses
import hashlib
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gross_ray.data.names import is_place
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import (
    DataOptions,
    DecompositionOptions,
    Experiment,
    FinetuningOptions,
    Schedule,
    SearchOptions,
    SweepOptions,
    TrainingOptions,
    ValidationOptions,
)
from gross_ray.presets import PRESETS, preset
from gross_ray.run.experiment_file import experiment_of
from gross_ray.run.store import RunStore
from gross_ray.run.tables import SCHEMA_VERSION
from gross_ray.training.sampling import sampling_probabilities

FIELDS = Experiment().fields()
# Valid values for every kind of field. 0.0 and -0.0, 1 and 1.0 are equal, so their fingerprints must be equal.
VALID: dict[str, list[str]] = {
    "seed": ["0", "1", "-0"],
    "name": ["a", "b", '"a"', "12", "true", "null", "[1]"],
    "model": ["four-conv", "resnet18"],
    "weights": ["", "/home/a/w.pt", "w.safetensors"],
    "data.name": ["sample", "cifar10", "stl10", "folder:/data/a=b", "folder:elsewhere", "parquet:a", "hf:me/a@b"],
    "data.limit_train": ["0", "10"],
    "training.epochs": ["1", "3"],
    "training.lr": ["1", "1.0", "0.5", "5e-1"],
    "training.milestones": ["[]", "2", "[2]", "[2, 3]"],
    "training.augment": ["true", "false", "crop", "none", "resized-crop", '"crop"'],
    "validation.finetuning.augment": ["true", "none"],
    "decomposition.ridge": ["0", "-0.0", "0.01"],
    "decomposition.layers": ["conv2", '["conv2"]', "[]"],
    "decomposition.nested": ["true", "false"],
    "supernet.scaling": ["index", "normalised", '"index"'],
    "search.budgets": ["16", "[16]", "[4, 16]"],
    "sweep.alphas": ["[]", "0", "-0.0", "[0.0]", "[0, 2]", "[0.0, 2.0]"],
    "sweep.scalings": ["index", '["index"]', "[]"],
    "validation.finetuning.lr": ["1", "1.0", "2"],
    "validation.finetuning.momentum": ["0", "-0.0", "0.9"],
}
experiments = st.builds(
    # With one training seed: `weights` allows no more.
    lambda chosen: Experiment().override(["training.seeds=1", *(f"{name}={value}" for name, value in chosen.items())]),
    st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in VALID.items()}),
)


def refused(name: str, text: str) -> str:
    with pytest.raises(InvalidValueError) as caught:
        Experiment().override([f"{name}={text}"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def invalid_values(value: Any) -> list[str]:
    """Return texts that a field of this value's type must refuse."""
    wrong_type = ["null", '{"a": 1}']
    if isinstance(value, bool):
        return [*wrong_type, "1", "yes", "[true]"]
    if isinstance(value, int):
        return [*wrong_type, "-1", "1.5", "1.0", "true", "x", "", "NaN", "Infinity", "[1]", "1" * 5000]
    if isinstance(value, float):
        return [*wrong_type, "-1", "NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "true", "x", "", "[1.0]"]
    if isinstance(value, str):
        return [""] if value else []  # a text that is empty by default may be empty
    return [*wrong_type, "[null]", "[[1]]", "[-1]", '[""]', "[1, 1]", '["index", "index"]', "[NaN]", "[true]"]


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_what_its_type_forbids(name: str) -> None:
    for text in invalid_values(FIELDS[name]):
        assert name in refused(name, text)


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("training.epochs", "0", "must be 1 or more"),
        ("training.seeds", "0", "must be 1 or more"),
        ("training.batch_size", "0", "must be 1 or more"),
        ("reconstruction.images", "-1", "must be 0 (all images) or more"),
        ("training.lr", "-1", "must be above 0, or 0: found by a range test"),
        ("training.start", "old", "must be one of new, weights"),
        ("training.augment", "flip", "must be one of none, crop, resized-crop"),
        ("validation.finetuning.augment", "1", "must be one of none, crop, resized-crop"),
        ("training.start", "weights", "needs weights to begin from"),
        ("data.validation_from", "half", "must be one of train, test"),
        ("training.momentum", "1", "must be in [0, 1)"),
        ("training.gamma", "0", "must be in (0, 1]"),
        ("training.gamma", "1.1", "must be in (0, 1]"),
        ("training.weight_decay", "-0.1", "must be 0 or more"),
        ("reconstruction.epochs", "0", "must be 1 or more"),
        ("finetuning.milestones", "[3, 2]", "must be positive and ascending"),
        ("finetuning.milestones", "[2, 2]", "must be positive and ascending"),
        ("finetuning.milestones", "0", "must be positive and ascending"),
        ("validation.finetuning.lr", "-1", "must be above 0"),
        ("validation.reconstruction.milestones", "[20, 10]", "must be positive and ascending"),
        ("validation.fixed", "[4, 0]", "must be group-sizes of 1 or more"),
        ("validation.seeds", "0", "must be 1 or more"),
        ("decomposition.ridge", "-1", "must be 0.0 (none) or more"),
        ("decomposition.max_steps", "0", "must be 1 or more"),
        ("decomposition.restarts", "-1", "must be 0 (chosen by the weight's size) or more"),
        ("decomposition.init", "zeros", "must be 'greedy' or 'random'"),
        ("decomposition.group_sizes", "[0, 4]", "must be group-sizes of 1 or more"),
        ("decomposition.layers", '["conv2", "conv2"]', "each named once"),
        ("supernet.alpha", "-1", "must be 0 or more"),
        ("supernet.seeds", "0", "must be 1 or more"),
        ("supernet.scaling", "linear", "must be one of index, normalised"),
        ("search.top", "0", "must be 1 or more"),
        ("search.form", "sparse", "must be one of auto, dense, bottleneck"),
        ("search.precision", "float16", "must be one of float32, tf32, bfloat16"),
        ("search.memory_budget", "-1", "must be 0 "),
        ("search.budgets", "[]", "must name a group-size or more"),
        ("search.budgets", "0", "must be group-sizes of 1 or more"),
        ("sweep.alphas", "[0, -2]", "must be 0 or more"),
        ("sweep.alphas", "[0, -0.0]", "each named once"),
        ("sweep.scalings", "linear", "must be among index, normalised"),
        ("sweep.seeds", "0", "must be 1 or more"),
        ("data.name", "mnist", "must be sample, fashion-mnist, cifar10, cifar100, svhn, stl10, folder:PATH"),
        ("data.limit_test", "-1", "must be 0 (all images) or more"),
        ("seed", "-1", "must be 0 or more"),
    ],
)
def test_values_out_of_range_are_refused_by_name_and_rule(name: str, text: str, rule: str) -> None:
    message = refused(name, text)
    assert message.startswith(f"{name} = ")
    assert rule in message


@pytest.mark.parametrize("stacked", ["engine.parallel_seeds=2", "engine.compile=true", "engine.capture=true"])
def test_stacks_in_bfloat16_are_refused(stacked: str) -> None:
    with pytest.raises(InvalidValueError) as refused_:
        preset("quickstart").override([stacked, "engine.precision=bfloat16"])
    message, name = str(refused_.value), stacked.partition("=")[0]
    assert message.startswith(f"engine.precision = 'bfloat16': must be float32 or tf32 with {name} = ")
    assert f"set {name}=" in message
    assert "\n" not in message
    remedy = message.partition("set ")[2].partition(",")[0]
    assert preset("quickstart").override([stacked, "engine.precision=bfloat16", remedy]).engine.precision == "bfloat16"


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    assert refused("model", "resnet50") == (
        "unknown model 'resnet50'; known models: four-conv, vgg16, resnet18, resnet20, resnet32, resnet56; "
        "or package.module:factory, like torchvision.models:resnet50"
    )


@pytest.mark.parametrize(
    "name", ["training.epoch", "epochs", "training", "validation.finetuning", "Training.epochs", ""]
)
def test_an_unknown_field_is_refused_with_all_known_ones(name: str) -> None:
    message = refused(name, "3")
    assert message.startswith(f"unknown field {name!r}; known fields: ")
    assert message.split("known fields: ")[1].split(", ") == list(FIELDS)


def test_setting_without_a_value_shows_how_to_write_it() -> None:
    with pytest.raises(InvalidValueError, match="'training.epochs': write FIELD=VALUE, like training.epochs=3"):
        Experiment().override(["training.epochs"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("training.epochs=3", 3),
        (" training.epochs = 3 ", 3),
        ("training.lr=1", 1.0),
        ("training.lr=5e-2", 0.05),
        ("training.augment=none", "none"),
        ("training.augment=false", "none"),
        ("finetuning.augment=true", "crop"),
        ("training.milestones=[2, 3]", [2, 3]),
        ("training.milestones=2", [2]),
        ("training.milestones=[]", []),
        ("search.budgets=8", [8]),
        ("sweep.alphas=[0, 2]", [0.0, 2.0]),
        ("sweep.scalings=index", ["index"]),
        ("decomposition.layers=features.7", ["features.7"]),
        ('decomposition.layers=["2", "4"]', ["2", "4"]),
        ("data.name=folder:/data/a=b", "folder:/data/a=b"),
        ('name="quoted"', "quoted"),
        ("name=2024", "2024"),
        ("name=true", "true"),
        ("validation.finetuning.weight_decay=0", 0.0),
    ],
)
def test_override_sets_one_field_and_no_other(setting: str, value: Any) -> None:
    changed = Experiment().override([setting])
    name = setting.partition("=")[0].strip()
    assert changed.fields()[name] == value
    assert type(changed.fields()[name]) is type(value)
    assert changed.fields() == FIELDS | {name: value}
    assert Experiment().fields() == FIELDS


def test_the_last_setting_of_a_field_counts() -> None:
    changed = Experiment().override(["training.epochs=3", "seed=1", "training.epochs=4"])
    assert (changed.training.epochs, changed.seed) == (4, 1)
    assert Experiment().override([]) == Experiment()


@pytest.mark.parametrize("name", PRESETS)
def test_json_gives_every_preset_back(name: str) -> None:
    experiment = preset(name)
    loaded = Experiment.from_json(experiment.to_json())
    assert loaded == experiment
    assert loaded.fingerprint() == experiment.fingerprint()
    assert pickle.loads(pickle.dumps(experiment)) == experiment


@given(experiments)
def test_json_gives_any_experiment_back(experiment: Experiment) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(experiment.to_json(), parse_constant=refuse)
    assert Experiment.from_json(experiment.to_json()) == experiment


def without_paths(experiment: Experiment) -> Experiment:
    """The same experiment with one path in place of any."""
    weights = "w.pt" if experiment.weights else ""
    name = "folder:f" if is_place(experiment.data.name) else experiment.data.name
    return dataclasses.replace(experiment, weights=weights, data=dataclasses.replace(experiment.data, name=name))


@given(experiments, experiments)
def test_fingerprints_and_first_difference_leave_paths_out(one: Experiment, other: Experiment) -> None:
    same = without_paths(one) == without_paths(other)
    assert (one.fingerprint() == other.fingerprint()) == same
    assert (one.first_difference(other) is None) == same
    assert (one.first_difference(other, paths=["weights", "data.name"]) is None) == (one == other)


@pytest.mark.parametrize("weights", ["", "/home/a/w.pt"])
@pytest.mark.parametrize("name", ["sample", "folder:/data/a", "parquet:a", "hf:a"])
def test_a_hash_counts_in_a_fingerprint_only_with_a_path(name: str, weights: str) -> None:
    experiment = Experiment().override(["training.seeds=1", f"weights={weights}", f"data.name={name}"])
    plain = experiment.fingerprint(weights="a", data="a")
    assert (experiment.fingerprint(weights="b", data="a") != plain) == bool(weights)
    assert (experiment.fingerprint(weights="a", data="b") != plain) == is_place(name)


@given(experiments)
def test_equal_experiments_have_equal_fingerprints(experiment: Experiment) -> None:
    again = Experiment().override([f"{name}={json.dumps(value)}" for name, value in experiment.fields().items()])
    assert again == experiment
    assert again.fingerprint() == experiment.fingerprint()


@given(experiments, experiments)
def test_first_difference_names_the_first_field_that_differs(one: Experiment, other: Experiment) -> None:
    theirs = other.fields()
    differing = [(name, value, theirs[name]) for name, value in one.fields().items() if value != theirs[name]]
    expected = "{} ({!r}, not {!r})".format(*differing[0]) if differing else None
    assert one.first_difference(other, paths=["weights", "data.name"]) == expected


def test_first_difference_reads_as_a_sentence() -> None:
    changed = Experiment().override(["training.epochs=5", "validation.seeds=2"])
    assert changed.first_difference(Experiment()) == "training.epochs (5, not 100)"


def test_python_values_are_converted_like_those_of_settings() -> None:
    written = Experiment(
        training=TrainingOptions(lr=1, milestones=[5], momentum=-0.0),  # type: ignore[arg-type]
        sweep=SweepOptions(alphas=[0, 2]),  # type: ignore[arg-type]
        validation={"seeds": 2},  # type: ignore[arg-type]
    )
    settings = ["training.lr=1.0", "training.milestones=5", "training.momentum=0", "sweep.alphas=[0.0, 2.0]"]
    read = Experiment().override([*settings, "validation.seeds=2"])
    assert written == read
    assert written.fingerprint() == read.fingerprint()
    assert math.copysign(1, written.training.momentum) == 1
    assert hash(written) == hash(read)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingOptions(epochs="3"), "epochs = '3': must be of type int"),
        (lambda: Schedule(epochs=0, lr=1), "epochs = 0: must be 1 or more"),
        (lambda: Schedule(epochs=1, lr=math.nan), "lr = nan: must be a finite number"),
        (lambda: DecompositionOptions(ridge=None), "decomposition.ridge = None: must be of type float"),
        (lambda: DataOptions(name="mnist"), "data.name = 'mnist': must be sample"),
        (lambda: SearchOptions(budgets=(16, 16)), r"search.budgets = \(16, 16\): must be group-sizes of 1 or more"),
        (lambda: Experiment(training=3), "training = 3: is a group of fields; set one of them, like training.epochs"),
        # It would be read back as a Schedule, which is equal to no FinetuningOptions.
        (lambda: ValidationOptions(finetuning=FinetuningOptions()), "finetuning = .* is a group of fields"),
    ],
)
def test_python_values_are_checked_like_those_of_settings(make: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the JSON of an experiment"),
        ("", "not the JSON of an experiment"),
        ("[1]", "a JSON object of fields"),
        ("3", "a JSON object of fields"),
        ('{"seeds": 3}', "unknown field 'seeds'; known fields: name, seed, model"),
        ('{"training": {"epoch": 3}}', "unknown field 'training.epoch'; known fields: training.epochs"),
        ('{"training": null}', "training = None: is a group of fields; set one of them, like training.epochs"),
        ('{"validation": {"finetuning": {"lr": 1}}}', "validation.finetuning.epochs is missing"),
        ('{"validation": {"finetuning": {"epochs": 0, "lr": 1}}}', "validation.finetuning.epochs = 0: must be 1"),
        ('{"seed": NaN}', "seed = nan: must be of type int"),
    ],
)
def test_other_text_than_an_experiment_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        Experiment.from_json(text)
    assert message in str(caught.value)


def test_milestones_that_no_epoch_reaches_are_without_effect() -> None:
    """Epochs count from 0: of 30 epochs, a milestone at 29 lowers the rate of the last, and one at 30 lowers none."""
    settings = ["finetuning.milestones=[29,30,40]", "finetuning.epochs=30", "validation.reconstruction.epochs=20"]
    assert preset("paper").override(settings).without_effect() == [
        "finetuning.milestones = [29, 30, 40]: 30 epochs do not reach 30, 40",
        "validation.reconstruction.milestones = [20]: 20 epochs do not reach 20",
    ]
    schedule = preset("paper").override(settings).finetuning
    assert schedule.lr_at(28) > schedule.lr_at(29)


@pytest.mark.parametrize(
    ("settings", "started", "but_not"),
    [
        (["finetuning.gamma=0.5", "finetuning.milestones=[]"], ["finetuning.gamma = 0.5"], "finetuning.milestones=[9]"),
        (["validation.drawn_seeds=3"], ["validation.drawn_seeds = 3"], "validation.drawn=1"),
        (["training.gamma=1"], ["training.milestones = [50, 75]"], "training.gamma=0.5"),
        (["supernet.scaling=index"], ["supernet.scaling = 'index'"], "supernet.alpha=1"),
        (["sweep.scalings=index", "sweep.alphas=0"], ["sweep.scalings = ['index']"], "sweep.alphas=[0, 1]"),
        (
            ["sweep.alphas=[]", "sweep.seeds=3", "sweep.scalings=index"],
            ["sweep.scalings = ['index']", "sweep.seeds = 3"],
            "sweep.alphas=[0, 1]",
        ),
        (
            ["sweep.scalings=[]", "sweep.alphas=[1]"],
            ["sweep.alphas = [1.0]"],
            "sweep.scalings=index",
        ),
        (
            ["engine.parallel_seeds=6", "supernet.seeds=5", "sweep.alphas=[0]", "sweep.seeds=2"],
            ["engine.parallel_seeds = 6"],
            "sweep.seeds=6",
        ),
        (
            ["weights=a.pt", "training.seeds=1", "training.epochs=3", "training.lr=0.5", "training.milestones=[9]"],
            ["training.epochs, training.lr, training.milestones: the base network has the weights a.pt"],
            "weights=",
        ),
        (
            ["weights=a.pt", "training.seeds=1", "training.lr=0.5"],
            ["training.lr: the base network has the weights a.pt and is not trained"],
            "training.start=weights",
        ),
        (["data.skip_damaged=true"], ["data.skip_damaged = True: the images are sample"], "data.name=folder:a"),
        (
            ["data.name=folder:a", "data.image_column=photo", "data.label_column=kind"],
            ["data.image_column = 'photo': the images are folder:a", "data.label_column = 'kind'"],
            "data.name=parquet:a",
        ),
        (
            ["decomposition.nested=true", "decomposition.group_sizes=4"],
            ["decomposition.nested = True"],
            "decomposition.group_sizes=[4, 8]",
        ),
    ],
)
def test_a_setting_that_others_cancel_is_without_effect(settings: list[str], started: list[str], but_not: str) -> None:
    found = Experiment().override(settings).without_effect()
    assert len(found) == len(started)
    for line, start in zip(found, started, strict=True):
        assert line.startswith(start)
        assert "\n" not in line
    other = Experiment().override([*settings, but_not]).without_effect()
    assert not set(other) & set(found)


def test_both_scalings_draw_alike_if_scaling_is_reported_without_effect() -> None:
    for line_expected, alpha in ((True, 0.0), (False, 1.0)):
        experiment = Experiment().override(["supernet.scaling=index", f"supernet.alpha={alpha}"])
        index, other = (sampling_probabilities(4, alpha, scaling=scaling) for scaling in ("index", "normalised"))
        assert bool(experiment.without_effect()) == line_expected == bool(index.equal(other))


def test_settings_without_effect_on_a_device_or_a_number_of_images_are_reported() -> None:
    experiment = Experiment().override(["engine.capture=true", "finetuning.images=100"])
    assert experiment.without_effect() == []
    assert experiment.without_effect(device="cuda:0", num_images=100) == []
    (line,) = experiment.without_effect(device="cpu")
    assert line.startswith("engine.capture = True: trainings run on cpu")
    (line,) = experiment.without_effect(num_images=99)
    assert line.startswith("finetuning.images = 100: the training split has only 99 images")


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_of_a_preset_has_an_effect(name: str) -> None:
    assert preset(name).without_effect() == []


def test_every_part_is_frozen() -> None:
    parts: list[Any] = [Experiment()]
    for part in parts:
        for one in dataclasses.fields(part):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, one.name, getattr(part, one.name))
            if dataclasses.is_dataclass(getattr(part, one.name)):
                parts.append(getattr(part, one.name))
    assert len(parts) == 13  # the experiment, its ten groups, and the two schedules of one of them


@given(
    st.floats(1e-5, 10),
    st.floats(0.01, 1),
    st.lists(st.integers(1, 25), max_size=4, unique=True).map(sorted),
)
def test_learning_rates_are_those_of_multi_step_lr(lr: float, gamma: float, milestones: list[int]) -> None:
    schedule = Schedule(epochs=25, lr=lr, gamma=gamma, milestones=tuple(milestones))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma)
    for epoch in range(25):
        assert schedule.lr_at(epoch) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


LATER = {"decomposition.keep_dense": "true", "training.start": "weights"}
LATER |= {"data.validation_from": "test", "data.channels": "1", "data.skip_damaged": "true"}
LATER |= {"data.image_column": "picture", "data.label_column": "kind"}
LATER |= {"data.image_size": "224", "data.resize": "256", "data.memory": "1000"}
LATER |= {"validation.trainable": "all", "validation.drawn": "3", "validation.drawn_seeds": "1"}
LATER |= {"search.score": "mean", "engine.kernels": '["fused-sgd"]'}
"""Fields that the first version did not have, each with a value that is not its default."""


def as_first_written(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as the first version wrote it, before LATER and with augmentation either on or off."""
    earlier = json.loads(experiment.to_json())
    for group, _, field in (name.partition(".") for name in LATER):
        del earlier[group][field]
    del earlier["weights_key"]
    for group in (earlier, earlier["validation"]):
        for schedule in (value for value in group.values() if isinstance(value, dict) and "augment" in value):
            schedule["augment"] = {"crop": True, "none": False}[schedule["augment"]]
    return earlier


@pytest.mark.parametrize("name", PRESETS)
def test_an_experiment_of_the_first_version_is_the_same_and_keeps_its_fingerprint(name: str, tmp_path: Path) -> None:
    now = preset(name).override(["search.score=median"])  # as the first version ranked
    now = now.override(["validation.drawn=0"])
    earlier = as_first_written(now)
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps({"gross_ray": {"version": "0.1.0", "schema": SCHEMA_VERSION}, **earlier}))
    for read in (experiment_of(file), RunStore.open(tmp_path).experiment):
        assert read == now and read.first_difference(now) is None
    file.write_text(json.dumps(earlier))  # not written by a run: today's defaults
    assert experiment_of(file) == now.override(["search.score=smoothed-mean"])
    canonical = json.dumps(earlier, sort_keys=True, separators=(",", ":"))
    assert now.fingerprint() == hashlib.sha256(canonical.encode()).hexdigest()[:16]


def test_a_field_that_came_later_counts_in_a_fingerprint() -> None:
    one = preset("quickstart").override(["training.seeds=1", "weights=net.pt"])
    for name, value in LATER.items():
        assert one.override([f"{name}={value}"]).fingerprint() != one.fingerprint()


@pytest.mark.parametrize(("earlier", "now"), [(True, "crop"), (False, "none")])
def test_augment_of_earlier_versions_in_python(earlier: Any, now: str) -> None:
    assert Schedule(epochs=1, lr=1, augment=earlier) == Schedule(epochs=1, lr=1, augment=now)
    changed = dataclasses.replace(Experiment(), training=TrainingOptions(augment=earlier))
    assert changed.fields()["training.augment"] == now
    assert dataclasses.replace(changed.training, augment=now) == changed.training


def test_fingerprints_tell_augmentations_apart() -> None:
    names = ("none", "crop", "resized-crop")
    for field in (name for name in FIELDS if name.endswith(".augment")):
        assert len({Experiment().override([f"{field}={name}"]).fingerprint() for name in names}) == 3


@pytest.mark.parametrize("wrong", [1, 0, None, 1.0, [True]])
def test_augment_takes_no_other_type(wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match="augment = .*: must be of type str"):
        Schedule(epochs=1, lr=1, augment=wrong)
