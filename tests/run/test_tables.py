import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy
import pyarrow as pa
import pytest
import torch

from gross_ray.errors import InvalidValueError
from gross_ray.run.tables import SCHEMA_VERSION, TABLES, table

ROOT = Path(__file__).resolve().parents[2]
describe = runpy.run_path(str(ROOT / "scripts" / "make_tables_doc.py"))["describe"]

SELECTION = {
    "budget": "4-4",
    "budget_macs": 1000,
    "rank": 1,
    "configuration": "2-8",
    "macs": 900,
    "supernet_accuracy": 0.75,
}
EPOCH = {
    "stage": "train",
    "unit": "seed=0",
    "seed": 0,
    "epoch": 1,
    "lr": 0.1,
    "train_loss": 2.3,
    "val_accuracy": 0.1,
    "seconds": 1.5,
    "gradient_norm": 1.0,
    "images_per_second": 100.0,
}


def test_the_tables_of_the_design_are_there():
    assert list(TABLES) == [
        "runs",
        "history",
        "range_tests",
        "networks",
        "layers",
        "decompositions",
        "configurations",
        "layer_latencies",
        "runtime_latencies",
        "alpha_sweep",
        "scores",
        "selections",
        "validations",
    ]


@pytest.mark.parametrize("name", TABLES)
def test_every_column_says_what_it_means(name):
    for field in table(name).schema():
        assert field.metadata[b"meaning"]
        assert field.metadata.keys() == {b"meaning", b"unit", b"range"}
    assert table(name).schema().metadata == {b"gross_ray.schema_version": str(SCHEMA_VERSION).encode()}


def test_a_column_of_one_name_has_one_type_and_unit_in_every_table():
    found: dict[str, set[tuple[str, bytes]]] = {}
    for name in TABLES:
        for field in table(name).schema():
            found.setdefault(field.name, set()).add((str(field.type), field.metadata[b"unit"]))
    assert {name: kinds for name, kinds in found.items() if len(kinds) > 1} == {}


def test_configurations_have_one_column_for_each_layer_between_configuration_and_macs():
    names = table("configurations").schema(layers=("conv2", "features.3")).names
    assert names[names.index("configuration") : names.index("macs") + 1] == [
        "configuration",
        "layer conv2",
        "layer features.3",
        "macs",
    ]
    assert not [name for name in table("configurations").schema().names if name.startswith("layer")]


def test_layers_are_refused_where_a_table_has_no_columns_for_them():
    with pytest.raises(ValueError, match="'selections' has no columns for layers"):
        table("selections").schema(layers=("conv2",))


def test_an_unknown_table_is_refused_with_the_names_there_are():
    with pytest.raises(InvalidValueError, match="unknown table 'configs'; known tables: runs, history, .*validations"):
        table("configs")


def test_rows_become_the_schema():
    arrow = table("selections").to_arrow([SELECTION, SELECTION | {"rank": 2}])
    assert arrow.schema.equals(table("selections").schema(), check_metadata=True)
    assert arrow.to_pylist() == [SELECTION, SELECTION | {"rank": 2}]


def test_numbers_of_numpy_and_torch_are_taken():
    row = SELECTION | {"macs": torch.tensor(900), "rank": numpy.int32(1), "supernet_accuracy": numpy.float64(0.75)}
    assert table("selections").to_arrow([row]).to_pylist() == [SELECTION]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": 1.0}, "'accuracy' is unknown; its columns: budget, budget_macs, rank"),
        ({"macs": 3.7}, "'macs': values must be of type int64"),
        ({"macs": True}, "'macs': values must be of type int64"),
        ({"macs": "900"}, "'macs': values must be of type int64"),
        ({"macs": None}, "'macs': a value is missing"),
        ({"macs": -1}, "'macs': -1 to -1 is outside 0 or more"),
        ({"rank": 0}, "'rank': 0 to 0 is outside 1 or more"),
        ({"configuration": (2, 8)}, "'configuration': values must be of type string"),
        ({"supernet_accuracy": 75.0}, r"'supernet_accuracy': 75.0 to 75.0 is outside \[0, 1\]"),
    ],
)
def test_a_wrong_value_is_refused_by_its_column(change, message):
    with pytest.raises(ValueError, match=message):
        table("selections").to_arrow([SELECTION | change])


def test_a_missing_column_is_refused_by_its_name():
    for name in SELECTION:
        short = {key: value for key, value in SELECTION.items() if key != name}
        with pytest.raises(ValueError, match=f"'selections': column '{name}' is missing"):
            table("selections").to_arrow([SELECTION, short])


def test_a_text_outside_its_choices_is_refused():
    row = {
        "configuration": "2-8",
        "kind": "chosen",
        "seed": 0,
        "val_accuracy": 0.5,
        "test_accuracy": 0.5,
        "macs": 1,
        "macs_paper": 1,
        "parameters": 1,
    }
    with pytest.raises(ValueError, match=r"'kind': \['chosen'\] must be fixed or selected"):
        table("validations").to_arrow([row])
    assert table("validations").to_arrow([row | {"kind": "fixed"}]).num_rows == 1


def test_an_accuracy_that_was_not_measured_is_null_and_a_diverged_loss_is_refused():
    assert table("history").to_arrow([EPOCH | {"val_accuracy": None}])["val_accuracy"].to_pylist() == [None]
    with pytest.raises(ValueError, match="column 'train_loss': nan is not a finite number"):
        table("history").to_arrow([EPOCH | {"train_loss": math.nan}])


def test_no_rows_are_a_table_too():
    assert table("history").to_arrow([]).schema.equals(table("history").schema())


def test_the_page_in_docs_is_made_from_the_schemas():
    page = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    assert page == describe(), "run python scripts/make_tables_doc.py"


def test_the_page_names_every_table_and_column():
    lines = describe().splitlines()
    for each in TABLES.values():
        assert f"## {each.name}" in lines
        for column in each.columns:
            assert any(line.startswith(f"| `{column.name}` | ") for line in lines)
    cells = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert cells == {6}


def test_importing_the_store_leaves_the_pipeline_s_libraries_out():
    program = (
        "import sys, gross_ray.run.store\n"
        "print([name for name in ('ray', 'click', 'rich') if name in sys.modules], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_types_are_only_those_that_pandas_reads_without_loss():
    kinds = {str(column.type) for each in TABLES.values() for column in each.columns}
    assert kinds == {str(pa.string()), str(pa.int64()), str(pa.float64()), str(pa.bool_())}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", TABLES)
def test_no_column_takes_a_number_that_is_not_finite(name, value):
    per_layer = any(column.per_layer for column in TABLES[name].columns)
    columns = TABLES[name].expand(["a"] if per_layer else [])
    reals = [(text, column) for text, column in columns.items() if pa.types.is_floating(column.type)]
    for text, column in reals:
        with pytest.raises(ValueError, match=f"column '{text}': {value} is not a finite number"):
            column.array([0.5, value], text)
        assert column.array([0.5], text).to_pylist() == [0.5]
        if column.nullable:
            assert column.array([None], text).null_count == 1
