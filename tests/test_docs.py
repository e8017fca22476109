import importlib
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import gross_ray
from gross_ray.models import build_model
from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from gross_ray.search.cost import layer_costs
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.layers import choose_layers, default_group_sizes

ROOT = Path(gross_ray.__file__).parents[1]
FILE_SUFFIXES = (".py", ".md", ".txt", ".toml", ".yaml", ".yml", ".parquet")


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def dotted_names(text: str) -> list[str]:
    found = [re.findall(r"\b(?:gross_ray|pipelines)(?:\.\w+)+", span) for span in in_backticks(text)]
    return sorted({name for names in found for name in names if not name.endswith(FILE_SUFFIXES)})


def named_paths(text: str) -> list[str]:
    """Return what stands alone in backticks and is the path of a file or folder of this repository."""
    paths = [span for span in in_backticks(text) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span)]
    wanted = [path for path in paths if "/" in path or path.endswith(FILE_SUFFIXES) or path == "Makefile"]
    return sorted({path for path in wanted if path.split("/")[0] not in ("RUN", "runs")})


def exists(name: str) -> bool:
    """Return whether a dotted name is a module, or reached from one by attributes or a dataclass's fields."""
    module, *rest = name.split(".")
    found: Any = importlib.import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        if hasattr(found, part):
            found = getattr(found, part)
        elif part in getattr(found, "__dataclass_fields__", ()):
            found = None
        else:
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError:
                return False
    return True


def names_of(page: str) -> Iterator[Any]:
    for name in dotted_names((ROOT / page).read_text(encoding="utf-8")):
        yield pytest.param(name, id=f"{page}-{name}")


@pytest.mark.parametrize(
    "name", [*names_of("docs/method.md"), *names_of("docs/tuning.md"), *names_of("CONTRIBUTING.md")]
)
def test_names_in_the_documents_exist(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", "README.md", "docs/cluster.md", "docs/method.md", "docs/tuning.md"]
)
def test_paths_in_the_documents_exist(page: str) -> None:
    missing = [path for path in named_paths((ROOT / page).read_text(encoding="utf-8")) if not (ROOT / path).exists()]
    assert missing == []


def test_the_checks_above_can_fail() -> None:
    text = "`gross_ray.space.Nothing`, `pipelines.nowhere`, `gross_ray/no.py`, `RUN/tables/a`, `runs/b`, `a b/c.py`"
    assert dotted_names(text) == ["gross_ray.space.Nothing", "pipelines.nowhere"]
    assert not any(exists(name) for name in dotted_names(text))
    assert exists("gross_ray.btd.block_terms.BlockTerms.core")
    assert named_paths(text) == ["gross_ray/no.py"]


class Evaluated(NamedTuple):
    """A configuration of the run below, as plain Python holds it."""

    sizes: Configuration
    macs: int
    by_seed: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        return statistics.median(self.by_seed)


@pytest.fixture(scope="module")
def evaluated() -> dict[str, Evaluated]:
    """The whole space of the four-conv network with its real costs, and accuracies of three supernets."""
    generator = torch.Generator().manual_seed(0)
    network = build_model("four-conv", num_classes=10, generator=generator)
    convs = choose_layers(network, ())
    supernet = empty_supernet(network, {name: default_group_sizes(conv.in_channels) for name, conv in convs.items()})
    space, costs = SearchSpace.of(supernet), layer_costs(supernet, (3, 32, 32), "macs")
    found = {}
    for sizes in space:
        macs, noise = costs.of_one(sizes), torch.randint(0, 200, (3,), generator=generator).tolist()
        found[str(sizes)] = Evaluated(sizes, macs, tuple(min(400 + macs // 10_000 + one, 999) / 1000 for one in noise))
    return found


VALIDATED = {"16-16-16": ("fixed", (0.9, 0.875)), "4-4-4": ("fixed", (0.75,)), "2-8-16": ("selected", (0.8, 0.85))}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, evaluated: dict[str, Evaluated]) -> dict[str, Any]:
    """What the names in the code of docs/tables.md hold after it has run on a run folder of this space."""
    store = RunStore.create(tmp_path_factory.mktemp("queries") / "runs" / "quickstart", preset("quickstart"))
    for alpha, scaling, seed in (
        (0.0, "index", 0),
        (0.0, "index", 1),
        (0.0, "index", 2),
        (4.0, "normalised", 0),
    ):
        unit = f"alpha={alpha:g},scaling={scaling},seed={seed}"
        rows = [
            {"supernet": unit, "alpha": alpha, "scaling": scaling, "seed": seed, "configuration": name}
            | {f"layer conv{place}": size for place, size in enumerate(one.sizes, 2)}
            | {
                "macs": one.macs,
                "macs_paper": one.macs,
                "parameters": one.macs // 100,
                "val_correct": 1,
                "val_total": 1,
            }
            | {"val_accuracy": 1.0 if alpha else one.by_seed[seed], "val_loss": 1.0, "latency_ms": None}
            for name, one in evaluated.items()
        ]
        store.write_table("configurations", unit, rows, layers=["conv2", "conv3", "conv4"])
    for name, (kind, accuracies) in VALIDATED.items():
        for seed, accuracy in enumerate(accuracies):
            row = {"configuration": name, "kind": kind, "seed": seed, "val_accuracy": accuracy, "test_accuracy": 0.5}
            store.write_table("validations", f"{name},{seed}", [row | {"macs": 1, "macs_paper": 1, "parameters": 1}])
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(store.path.parents[1])
        for block in re.findall(
            r"```python\n(.*?)```", (ROOT / "docs" / "tables.md").read_text(encoding="utf-8"), re.S
        ):
            exec(block, names)  # the page's own code: that it runs as it stands is the point
    return names


def test_the_query_within_a_budget(answers: dict[str, Any], evaluated: dict[str, Evaluated]) -> None:
    fitting = [one for one in evaluated.values() if one.sizes[2] <= 16 and one.macs <= 2_660_000]
    assert 5 < len(fitting) < len(evaluated)
    found = answers["small"]
    assert found["val_accuracy"].tolist() == sorted((one.accuracy for one in fitting), reverse=True)[:5]
    assert [evaluated[name] in fitting for name in found["configuration"]] == [True] * 5
    assert [evaluated[name].accuracy for name in found["configuration"]] == found["val_accuracy"].tolist()


def test_the_query_for_each_bracket(answers: dict[str, Any], evaluated: dict[str, Evaluated]) -> None:
    edges = [0, 2e6, 2.5e6, 3e6, 4e6, 6e6]
    best = [
        max(one.accuracy for one in evaluated.values() if low < one.macs <= high)
        for low, high in zip(edges, edges[1:], strict=False)
    ]
    assert answers["best"]["val_accuracy"].tolist() == best
    for name, low, high in zip(answers["best"]["configuration"], edges, edges[1:], strict=False):
        assert low < evaluated[name].macs <= high


def test_the_query_for_a_layers_group_sizes(answers: dict[str, Any], evaluated: dict[str, Evaluated]) -> None:
    assert answers["fares"].index.tolist() == [1, 2, 4, 8, 16, 32, 64]
    for size, row in answers["fares"].iterrows():
        accuracies = [one.accuracy for one in evaluated.values() if one.sizes[2] == size]
        assert row.tolist() == pytest.approx([statistics.mean(accuracies), max(accuracies), len(accuracies)])


def test_the_query_for_the_seeds(answers: dict[str, Any], evaluated: dict[str, Evaluated]) -> None:
    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(other < one for other in values) + sum(other == one for other in values) / 2 for one in values]

    columns = list(zip(*(one.by_seed for one in evaluated.values()), strict=True))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        expected = statistics.correlation(*(ranks(columns[seed]) for seed in (first, second)))
        assert answers["agreement"].loc[first, second] == pytest.approx(expected)
        assert 0 < expected < 1
    widest = sorted((max(one.by_seed) - min(one.by_seed) for one in evaluated.values()), reverse=True)[:5]
    assert answers["disputed"].tolist() == widest
    assert [max(evaluated[name].by_seed) - min(evaluated[name].by_seed) for name in answers["disputed"].index] == widest


def test_the_query_for_the_validated(answers: dict[str, Any], evaluated: dict[str, Evaluated]) -> None:
    rows = answers["joined"].set_index("configuration")
    assert set(rows.index) == set(VALIDATED)
    for name, (kind, accuracies) in VALIDATED.items():
        assert rows.loc[name, "kind"] == kind
        assert rows.loc[name, "macs"] == evaluated[name].macs
        assert rows.loc[name, "gain"] == pytest.approx(statistics.mean(accuracies) - evaluated[name].accuracy)


def test_the_query_for_the_front(answers: dict[str, Any], evaluated: dict[str, Evaluated]) -> None:
    points = {(one.macs, one.accuracy) for one in evaluated.values()}
    front = sorted(
        point
        for point in points
        if not any(other[0] <= point[0] and other[1] >= point[1] and other != point for other in points)
    )
    assert 2 < len(front) < len(points)
    assert list(zip(answers["front"]["macs"], answers["front"]["val_accuracy"], strict=True)) == front


def test_the_protocol_names_the_fields_and_values_of_the_preset_paper() -> None:
    fields = preset("paper").fields()
    rows = [
        line.split("|")[1:-1] for line in (ROOT / "docs/protocol.md").read_text().splitlines() if line.startswith("|")
    ]
    said = {field.strip().strip("`"): value.split("`")[1] for *_, field, value in rows[2:]}
    assert len(said) == len(rows) - 2 >= 40
    assert said == {name: json.dumps(fields[name]) for name in said}
    sections = ("data", "training", "decomposition", "reconstruction", "finetuning", "supernet", "validation", "sweep")
    assert {name for name in fields if name.split(".")[0] in sections} <= said.keys()
