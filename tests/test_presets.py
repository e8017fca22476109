import pytest

from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Experiment, Schedule
from gross_ray.models import four_conv
from gross_ray.presets import PRESETS, preset
from gross_ray.space import SearchSpace
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.layers import choice_of


def steps(schedule: Schedule) -> tuple[int, float, tuple[int, ...]]:
    return schedule.epochs, schedule.lr, schedule.milestones


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_an_experiment_of_its_name(name: str) -> None:
    experiment = preset(name)
    assert isinstance(experiment, Experiment)
    assert experiment.name == name
    assert PRESETS[name].description
    assert "\n" not in PRESETS[name].description
    assert PRESETS[name].cost


def test_presets_differ() -> None:
    assert {"quickstart", "fashion", "paper"} <= set(PRESETS)
    assert len({preset(name).fingerprint() for name in PRESETS}) == len(PRESETS)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidValueError) as caught:
        preset("papers")
    assert str(caught.value) == f"unknown preset 'papers'; known presets: {', '.join(PRESETS)}"


def test_paper_has_the_papers_numbers() -> None:
    paper = preset("paper")
    assert (paper.model, paper.data.name) == ("four-conv", "cifar10")
    assert (paper.data.limit_train, paper.data.limit_validation, paper.data.limit_test) == (0, 0, 0)
    assert steps(paper.training) == (100, 0.1, (50, 75))  # section 4.2
    assert steps(paper.reconstruction) == (30, 1e-4, (20,))  # section 4.3
    assert steps(paper.finetuning) == (150, 1e-4, (80, 120))  # section 4.4
    assert steps(paper.validation.reconstruction) == (30, 0.01, (20,))  # section 4.5
    assert steps(paper.validation.finetuning) == (100, 0.001, (80,))
    schedules = [paper.training, paper.reconstruction, paper.finetuning]
    schedules += [paper.validation.reconstruction, paper.validation.finetuning]
    for schedule in schedules:
        assert (schedule.momentum, schedule.gamma, schedule.augment) == (0.9, 0.1, "crop")
        assert (schedule.batch_size, schedule.weight_decay) == (256, 1e-3)  # from the released experiment files
    parts = [paper.training, paper.supernet, paper.sweep, paper.validation]
    assert [part.seeds for part in parts] == [5] * 4
    assert (paper.decomposition.tolerance, paper.decomposition.max_steps) == (1e-6, 500_000)
    assert (paper.supernet.alpha, paper.supernet.scaling) == (4.0, "index")  # section 3.3.1, Eq. 8 as printed
    assert (paper.sweep.alphas, paper.sweep.scalings) == ((0.0, 2.0, 4.0, 8.0), ("index",))
    assert paper.validation.fixed == (32, 16, 4, 1)
    assert (paper.search.budgets, paper.search.top) == ((16, 4), 2)


@pytest.mark.parametrize("name", ["paper", "fashion"])
def test_search_space_is_the_papers(name: str) -> None:
    options = preset(name).decomposition
    assert (options.layers, options.group_sizes) == ((), ())
    network = four_conv()
    space = SearchSpace.of(empty_supernet(network, choice_of(network, options.layers).group_sizes))
    assert space.group_sizes == {
        "conv2": (1, 2, 4, 8, 16, 32),
        "conv3": (1, 2, 4, 8, 16, 32),
        "conv4": (1, 2, 4, 8, 16, 32, 64),
    }
    assert len(space) == 252


def test_fashion_differs_from_the_paper_only_in_the_documented_fields() -> None:
    changed = {name for name, value in preset("fashion").fields().items() if value != preset("paper").fields()[name]}
    assert changed == {"name", "data.name", "training.lr", "supernet.alpha", "supernet.scaling", "sweep.scalings"}
