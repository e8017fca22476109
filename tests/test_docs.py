import importlib
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import gross_ray

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


@pytest.mark.parametrize("name", [*names_of("docs/method.md"), *names_of("CONTRIBUTING.md")])
def test_names_in_the_documents_exist(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", "docs/cluster.md", "docs/method.md"])
def test_paths_in_the_documents_exist(page: str) -> None:
    missing = [path for path in named_paths((ROOT / page).read_text(encoding="utf-8")) if not (ROOT / path).exists()]
    assert missing == []


def test_the_checks_above_can_fail() -> None:
    text = "`gross_ray.space.Nothing`, `pipelines.nowhere`, `gross_ray/no.py`, `RUN/tables/a`, `runs/b`, `a b/c.py`"
    assert dotted_names(text) == ["gross_ray.space.Nothing", "pipelines.nowhere"]
    assert not any(exists(name) for name in dotted_names(text))
    assert exists("gross_ray.decomposition.btd.BlockTerms.core")
    assert named_paths(text) == ["gross_ray/no.py"]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def test_cluster_file_is_lawful_for_ray(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize("change", [{"setup_comands": []}, {"head_node_type": "heads"}, {"max_workers": -1}])
def test_the_cluster_check_can_fail(cluster: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=next(iter(change)) + "|heads|minimum"):
        validate_config(prepare_config(deepcopy(cluster) | change))


def test_cluster_file_fits_this_project(cluster: dict[str, Any]) -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{pinned['ray']}-")
    folder = next(there for there, here in cluster["file_mounts"].items() if here == ".")
    assert cluster["setup_commands"] == [f"pip install --quiet --constraint {folder}/constraints.txt {folder}"]
    workers = cluster["available_node_types"]["gpu_worker"]
    assert 0 == workers["min_workers"] < workers["max_workers"] <= cluster["max_workers"]
