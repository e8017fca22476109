import ast
import dataclasses
import importlib
import inspect
import pickle
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import gross_ray
from gross_ray import BlockTerms, Bottleneck, BTDOptions, Configuration, SearchSpace, SeriesConv2d
from gross_ray.version import VERSION

NONE, ANY = inspect.Parameter.empty, object()
"""No default, and a default that the design leaves open."""
# Parameters before "*" may be positional; those after it are keyword-only.
FUNCTIONS: dict[str, list[Any]] = {
    "block_term_decomposition": [
        ("weight", NONE),
        ("group_size", NONE),
        "*",
        ("options", BTDOptions()),
        ("start", None),
        ("seed", 0),
    ],
    "expand_grouped_weight": [("weight", NONE), ("target_group_size", NONE)],
    "decompose_model": [
        ("model", NONE),
        "*",
        ("layers", None),
        ("group_sizes", None),
        ("options", BTDOptions()),
        ("nested", ANY),
        ("seed", 0),
    ],
    "set_configuration": [("supernet", NONE), ("configuration", NONE)],
    "extract": [("supernet", NONE), ("configuration", NONE)],
    "evaluate_configurations": [
        ("supernet", NONE),
        ("images", NONE),
        ("labels", NONE),
        ("configurations", None),
        "*",
        ("batch_size", ANY),
    ],
    "sampling_probabilities": [("num_group_sizes", NONE), ("alpha", NONE), "*", ("scaling", ANY)],
    "response_error": [("response", NONE), ("target", NONE)],
    "count_macs": [("model", NONE), ("input_shape", NONE)],
    "configuration_macs": [
        ("supernet", NONE),
        ("configuration", NONE),
        ("input_shape", NONE),
        "*",
        ("convention", "actual"),
    ],
    "load_dataset": [("options", NONE)],
    "load_weights": [("network", NONE), ("path", NONE)],
    "read_table": [("run", NONE), ("name", NONE), ("columns", None)],
    "export_onnx": [("model", NONE), ("path", NONE), ("input_shape", NONE)],
}
METHODS: list[tuple[Any, list[Any]]] = [
    (SeriesConv2d.from_bottlenecks, [("conv", NONE), ("bottlenecks", NONE)]),
    (SeriesConv2d.bottleneck, [("self", NONE), ("group_size", NONE)]),
    (BlockTerms.reconstruct, [("self", NONE)]),
    (BlockTerms.to_bottleneck, [("self", NONE)]),
    (Bottleneck.dense_kernel, [("self", NONE)]),
    (Bottleneck.expand, [("self", NONE), ("target_group_size", NONE)]),
    (SearchSpace.of, [("supernet", NONE)]),
    (SearchSpace.index, [("self", NONE), ("configuration", NONE)]),
    (Configuration.parse, [("text", NONE)]),
]


def check_signature(function: Any, expected: list[Any]) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    num_expected = len([one for one in expected if one != "*"])
    for more in parameters[num_expected:]:  # further parameters must not disturb calls that follow the design
        assert (more.kind, more.default is NONE) == (inspect.Parameter.KEYWORD_ONLY, False)
    parameters = parameters[:num_expected]
    num_positional = expected.index("*") if "*" in expected else len(expected)
    named = [one for one in expected if one != "*"]
    assert [parameter.name for parameter in parameters] == [name for name, _ in named]
    kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * num_positional
    kinds += [inspect.Parameter.KEYWORD_ONLY] * (len(named) - num_positional)
    assert [parameter.kind for parameter in parameters] == kinds
    for parameter, (_, default) in zip(parameters, named, strict=True):
        if default is ANY:
            assert parameter.default is not NONE
        else:
            assert parameter.default == default


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_signatures_of_the_design(name: str) -> None:
    check_signature(getattr(gross_ray, name), FUNCTIONS[name])
    assert name in gross_ray.__all__


@pytest.mark.parametrize(("method", "expected"), METHODS, ids=[method.__qualname__ for method, _ in METHODS])
def test_methods_have_the_signatures_of_the_design(method: Any, expected: list[Any]) -> None:
    check_signature(method, expected)


def test_the_check_of_signatures_can_fail() -> None:
    def function(one: int, *, two: int = 2, three: int = 3) -> None: ...

    def demanding(one: int, *, two: int) -> None: ...

    check_signature(function, [("one", NONE), "*", ("two", 2)])
    with pytest.raises(AssertionError):
        check_signature(demanding, [("one", NONE)])
    for other in ([("one", NONE), ("two", 2)], [("one", NONE), "*", ("two", 3)], [("one", NONE), "*", ("zwei", 2)]):
        with pytest.raises(AssertionError):
            check_signature(function, other)


def test_the_default_scaling_is_normalised() -> None:
    default = inspect.signature(gross_ray.sampling_probabilities).parameters["scaling"].default
    assert default == "normalised"


def imports_for_type_checkers() -> dict[str, str]:
    """Return the module of each name that gross_ray imports under TYPE_CHECKING."""
    tree = ast.parse(inspect.getsource(gross_ray))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    found = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in found for alias in node.names}


def test_type_checkers_see_the_names_that_are_loaded_at_first_use() -> None:
    assert imports_for_type_checkers() == gross_ray._MODULES
    assert sorted(gross_ray._MODULES) == gross_ray.__all__ == sorted(gross_ray.__all__)
    for name, module in gross_ray._MODULES.items():
        assert getattr(gross_ray, name) is getattr(importlib.import_module(module), name)


def test_public_names_are_listed_pickled_and_imported_by_a_star() -> None:
    assert set(gross_ray.__all__) <= set(dir(gross_ray))
    scope: dict[str, Any] = {}
    exec("from gross_ray import *", scope)
    for name in gross_ray.__all__:
        assert pickle.loads(pickle.dumps(scope[name])) is getattr(gross_ray, name)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gross_ray' has no attribute 'decompose_modal'"):
        gross_ray.decompose_modal  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'decompose_modal'"):
        exec("from gross_ray import decompose_modal")


def test_everything_listed_can_be_imported() -> None:
    assert all(hasattr(gross_ray, name) for name in gross_ray.__all__)
    classes = {"BTDOptions", "BlockTerms", "Bottleneck", "SeriesConv2d", "SearchSpace", "Configuration"}
    classes |= {"DataOptions", "Schedule"}
    assert classes | set(FUNCTIONS) <= set(gross_ray.__all__)


def test_import_paths_of_existing_scripts_lead_to_the_public_names() -> None:
    experiment = importlib.import_module("gross_ray.experiment")
    assert experiment.DataOptions is gross_ray.DataOptions
    assert experiment.Schedule is gross_ray.Schedule
    assert importlib.import_module("gross_ray.data.images").load_dataset is gross_ray.load_dataset
    assert importlib.import_module("gross_ray.weights").load_weights is gross_ray.load_weights


def test_options_and_results_have_the_fields_of_the_design() -> None:
    options = {one.name: one.default for one in dataclasses.fields(BTDOptions)}
    assert options.keys() == {"tolerance", "max_steps", "restarts", "ridge", "init", "precision"}
    assert (options["tolerance"], options["max_steps"], options["init"]) == (1e-6, 500_000, "greedy")
    terms = gross_ray.block_term_decomposition(torch.randn(6, 4, 3, 2, generator=torch.Generator().manual_seed(0)), 2)
    assert [tuple(one.shape) for one in (terms.core, terms.factor_in, terms.factor_out)] == [
        (2, 2, 2, 3, 2),
        (2, 4, 2),
        (2, 6, 2),
    ]
    assert (terms.group_size, terms.groups, terms.status) == (2, 2, "converged")
    assert 0 < terms.relative_error < 1
    assert terms.steps >= 1
    assert terms.cancellation > 0
    bottleneck = terms.to_bottleneck()
    weights = (bottleneck.pointwise_in, bottleneck.grouped, bottleneck.pointwise_out)
    assert [tuple(one.shape) for one in weights] == [(4, 4, 1, 1), (4, 2, 3, 2), (6, 4, 1, 1)]
    assert bottleneck.group_size == 2
    assert (bottleneck.dense_kernel().shape, terms.reconstruct().shape) == ((6, 4, 3, 2),) * 2


def test_series_has_a_group_size_that_can_be_set() -> None:
    series = SeriesConv2d(torch.nn.Conv2d(4, 6, 3), [1, 2, 4])
    assert series.group_sizes == (1, 2, 4)
    series.group_size = 2
    assert series.group_size == 2


def test_an_unconstrained_decomposition_is_allowed() -> None:
    assert BTDOptions(ridge=0.0).ridge == 0.0
    assert BTDOptions(init="random").init == "random"


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert gross_ray.__version__ == VERSION == project["project"]["version"]
