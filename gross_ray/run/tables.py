"""The tables of a run: their columns with type, unit, range and meaning. docs/tables.md is made from this file."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gross_ray.errors import InvalidValueError

SCHEMA_VERSION = 3
"""Increases when a column is added or removed; a column's name never changes its meaning."""
VERSION_KEY = b"gross_ray.schema_version"
"""Key of the schema version in the metadata of a schema, and so of each Parquet file."""
LAYER = "<layer>"
"""Placeholder for the layer's name in the name of a column that exists once for each decomposed layer."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table."""

    name: str
    """If it contains `LAYER`, the column exists once for each decomposed layer."""
    type: pa.DataType
    meaning: str
    """One line for docs/tables.md and the field's metadata."""
    unit: str = ""
    """Unit of the values; empty if they have none."""
    low: float = -math.inf
    """Smallest value that may be stored."""
    high: float = math.inf
    """Largest value that may be stored."""
    choices: tuple[str, ...] = ()
    """The only texts that may be stored; empty: any text."""
    nullable: bool = False
    """Whether a value may be missing."""

    @property
    def per_layer(self) -> bool:
        """Whether the column exists once for each decomposed layer."""
        return LAYER in self.name

    def range_text(self) -> str:
        """Return the range as docs/tables.md prints it, like ``[0, 1]`` or ``1 or more``; empty for any value."""
        if self.choices:
            return " or ".join(self.choices)
        if self.low == -math.inf:
            return ""
        return f"{self.low:g} or more" if self.high == math.inf else f"[{self.low:g}, {self.high:g}]"

    def field(self, name: str) -> pa.Field:
        """Return the Arrow field, called `name`, with unit, range and meaning in its metadata."""
        about = {"meaning": self.meaning, "unit": self.unit, "range": self.range_text()}
        return pa.field(name, self.type, nullable=self.nullable, metadata=about)

    def array(self, values: list[Any], name: str) -> pa.Array:
        """Return `values` as an Arrow array; raises ValueError naming the column and the rule that a value breaks."""
        try:  # Arrow refuses a bool in a column of integers, but silently cuts 3.7 to 3
            if pa.types.is_integer(self.type):
                values = [
                    value if value is None or isinstance(value, bool) else operator.index(value) for value in values
                ]
            array = pa.array(values, self.type)
        except (pa.ArrowException, TypeError) as error:
            raise ValueError(f"column {name!r}: values must be of type {self.type}: {error}") from None
        if array.null_count and not self.nullable:
            raise ValueError(f"column {name!r}: a value is missing (None); this column needs one in each row")
        if pa.types.is_floating(self.type):
            infinite = [value for value in array.to_pylist() if value is not None and not math.isfinite(value)]
            if infinite:
                missing = "; None stands for a value that was not measured" if self.nullable else ""
                raise ValueError(f"column {name!r}: {infinite[0]} is not a finite number{missing}")
        if self.low != -math.inf:
            found = pc.min_max(array).as_py()
            if found["min"] is not None and (found["min"] < self.low or found["max"] > self.high):
                raise ValueError(f"column {name!r}: {found['min']} to {found['max']} is outside {self.range_text()}")
        unknown = set(array.to_pylist()) - set(self.choices) if self.choices else ()
        if unknown:
            raise ValueError(f"column {name!r}: {sorted(unknown)} must be {self.range_text()}")
        return array


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table: a folder of Parquet files, one for each completed unit of work."""

    name: str
    """Also the name of its folder."""
    meaning: str
    """What a row is, in one line."""
    columns: tuple[Column, ...]

    def expand(self, layers: Sequence[str] = ()) -> dict[str, Column]:
        """Return the columns by their stored names; a column per layer appears once for each of `layers`."""
        if layers and not any(column.per_layer for column in self.columns):
            raise ValueError(f"table {self.name!r} has no columns for layers, got layers {list(layers)}")
        expanded: dict[str, Column] = {}
        for column in self.columns:
            names = [column.name.replace(LAYER, layer) for layer in layers] if column.per_layer else [column.name]
            expanded |= dict.fromkeys(names, column)
        return expanded

    def schema(self, layers: Sequence[str] = ()) -> pa.Schema:
        """Return the Arrow schema, with the version in its metadata."""
        fields = [column.field(name) for name, column in self.expand(layers).items()]
        return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION)})

    def to_arrow(self, rows: Sequence[Mapping[str, Any]], layers: Sequence[str] = ()) -> pa.Table:
        """Return `rows` as an Arrow table.

        Raises ValueError naming a column that is missing or unknown, or that has a value of the wrong type or outside
        its range. A nullable column must not be left out: None says that a value is missing.
        """
        columns = self.expand(layers)
        for row in rows:
            for name in row.keys() ^ columns.keys():
                fault = "is unknown" if name in row else "is missing"
                raise ValueError(f"table {self.name!r}: column {name!r} {fault}; its columns: {', '.join(columns)}")
        arrays = [column.array([row[name] for row in rows], name) for name, column in columns.items()]
        return pa.Table.from_arrays(arrays, schema=self.schema(layers))


def _text(name: str, meaning: str, *, unit: str = "", choices: tuple[str, ...] = (), nullable: bool = False) -> Column:
    return Column(name=name, type=pa.string(), meaning=meaning, unit=unit, choices=choices, nullable=nullable)


def _count(name: str, meaning: str, unit: str = "", low: float = 0, *, nullable: bool = False) -> Column:
    return Column(name=name, type=pa.int64(), meaning=meaning, unit=unit, low=low, nullable=nullable)


def _real(name: str, meaning: str, unit: str = "", low: float = 0, *, nullable: bool = False) -> Column:
    return Column(name=name, type=pa.float64(), meaning=meaning, unit=unit, low=low, nullable=nullable)


def _accuracy(name: str, meaning: str, *, low: float = 0, nullable: bool = False) -> Column:
    return Column(name=name, type=pa.float64(), meaning=meaning, unit="fraction", low=low, high=1, nullable=nullable)


_CONFIGURATION = _text("configuration", "Group-sizes in layer order, like 2-32-64; d for the original layer")
_SCALING = _text("scaling", "How Eq. 8 is read: exp(-alpha i) or exp(-alpha i / N)", choices=("index", "normalised"))
_ALPHA = _real("alpha", "Temperature of the sampling of group-sizes (Eq. 8); 0 is uniform")
_MACS = _count("macs", "Multiply-accumulates of one image's forward pass, as the network runs", "MACs an image")
_MACS_PAPER = _count(
    "macs_paper",
    "As macs, but counted the paper's way: stride and padding on the first 1x1; missing where that leaves no response",
    "MACs an image",
    nullable=True,
)
_PARAMETERS = _count("parameters", "Trainable parameters of the network", "parameters")
_VAL_CORRECT = _count("val_correct", "Images of the validation split classified correctly", "images")
_VAL_TOTAL = _count("val_total", "Images of the validation split", "images", low=1)
_VAL_ACCURACY = _accuracy("val_accuracy", "Accuracy on the validation split")
_TEST_ACCURACY = _accuracy("test_accuracy", "Accuracy on the test split; it never chooses anything")
_SECONDS = _real("seconds", "Wall-clock time of the row's work", "s")


def _seed(meaning: str) -> Column:
    return _count("seed", meaning)


_CONDITIONS = (
    _text("runtime", "What ran the networks: onnxruntime, openvino, torch or compiled"),
    _text("version", "Its version"),
    _text("device", "Name of the processor or GPU that was timed"),
    _text("host", "Name of the machine"),
    _count("batch_size", "Images of a batch", "images", low=1),
    _count("threads", "CPU threads", "threads", low=1),
)

_TABLES = (
    Table(
        name="runs",
        meaning="One start of the command on this run folder.",
        columns=(
            _text("started", "When it started, in UTC", unit="ISO 8601"),
            _text("gross_ray", "Version of gross_ray"),
            _text("python", "Version of Python"),
            _text("torch", "Version of torch"),
            _text("torchvision", "Version of torchvision"),
            _text("ray", "Version of Ray"),
            _text("host", "Name of the machine that ran the driver"),
            _text("device", "What the workers computed on, like cpu or the name of the GPU"),
            _count("num_cpus", "CPU cores of the cluster", "cores", low=1),
            _text("preset", "Preset from which the experiment was made"),
            _text("experiment", "The whole experiment", unit="JSON"),
            _text("fingerprint", "16 hexadecimal digits, equal for equal experiments"),
        ),
    ),
    Table(
        name="history",
        meaning="One epoch of one training.",
        columns=(
            _text("stage", "Stage that the training belongs to"),
            _text("unit", "Unit of work within the stage, like seed=0"),
            _seed("Which repeat"),
            _count("epoch", "Epoch, from 1", low=1),
            _real("lr", "Learning rate of the epoch"),
            _real(
                "train_loss", "Mean training loss of the epoch: cross-entropy in nats, or the response error (Eq. 9)"
            ),
            _real("gradient_norm", "Mean over the epoch's steps of the L2 norm of all gradients together"),
            _accuracy("val_accuracy", "Accuracy on the validation split; missing if not measured", nullable=True),
            _SECONDS,
            _real("images_per_second", "Training images a second", "images/s"),
        ),
    ),
    Table(
        name="range_tests",
        meaning="One learning rate of a range test, which finds the rate of a schedule whose lr is 0.",
        columns=(
            _text("schedule", "Field of the experiment, like finetuning or validation.finetuning"),
            _real("lr", "Learning rate that was tried"),
            _real(
                "train_loss",
                "Mean training loss of its last steps (see history); missing if it diverged",
                nullable=True,
            ),
            Column(name="chosen", type=pa.bool_(), meaning="Whether the schedule is trained with this rate"),
        ),
    ),
    Table(
        name="networks",
        meaning="One trained base network; the network of median validation accuracy is decomposed.",
        columns=(
            _seed("Which base network"),
            _VAL_CORRECT,
            _VAL_TOTAL,
            _VAL_ACCURACY,
            _TEST_ACCURACY,
            _MACS,
            _PARAMETERS,
        ),
    ),
    Table(
        name="layers",
        meaning="One decomposed layer, in layer order.",
        columns=(
            _text("layer", "Name of the convolution in the base network"),
            _count("dense_macs", "Multiply-accumulates of the original convolution for one image", "MACs an image"),
        ),
    ),
    Table(
        name="decompositions",
        meaning="One layer's block term decomposition at one group-size.",
        columns=(
            _text("layer", "Name of the convolution in the base network"),
            _count("group_size", "Input channels of each group", "channels", low=1),
            _count("groups", "Groups: the layer's input channels / group_size; the number of block terms", low=1),
            _seed("Which repeat"),
            Column(
                name="nested",
                type=pa.bool_(),
                meaning="Whether it started from the next smaller group-size's expansion",
            ),
            _real("relative_error", "||weight - reconstruction|| / ||weight||, Frobenius norms"),
            _real("cancellation", "sqrt(sum of ||term||^2) / ||weight||: at most 1 if orthogonal, large if degenerate"),
            _count("steps", "Steps of the solver from the best start", "steps"),
            _text("status", "Why the solver stopped"),
            _SECONDS,
        ),
    ),
    Table(
        name="configurations",
        meaning="One configuration evaluated in one supernet.",
        columns=(
            _text("supernet", "Unit that trained the supernet"),
            _ALPHA,
            _SCALING,
            _seed("Which supernet"),
            _CONFIGURATION,
            _count(
                f"layer {LAYER}",
                "Group-size of this layer, 0 for the original layer; a column for each layer",
                "channels",
            ),
            _MACS,
            _MACS_PAPER,
            _PARAMETERS,
            _VAL_CORRECT,
            _VAL_TOTAL,
            _VAL_ACCURACY,
            _real("val_loss", "Mean cross-entropy on the validation split", "nats"),
            _real(
                "latency_ms",
                "Predicted time of one batch's forward pass (see runtime_latencies); missing if not measured",
                "ms",
                nullable=True,
            ),
        ),
    ),
    Table(
        name="layer_latencies",
        meaning="What one layer adds to the time of a batch as a bottleneck, in one runtime.",
        columns=(
            *_CONDITIONS,
            _text("layer", "Name of the decomposed layer"),
            _count("group_size", "Group-size of the bottleneck, 0 for the dense convolution", "channels"),
            Column(
                name="added_ms",
                type=pa.float64(),
                meaning="Time that it adds to a batch in place of the dense convolution; negative: it saves",
                unit="ms",
            ),
        ),
    ),
    Table(
        name="runtime_latencies",
        meaning="How a configuration's time is predicted in one runtime: full_ms, and for each layer the added_ms of "
        "its group-size, or 0 if that is less.",
        columns=(
            *_CONDITIONS,
            _real("full_ms", "Median time of a batch of the full network", "ms"),
            _count("num_sampled", "Whole networks that were timed", "networks", low=1),
            _real("median_error", "Median relative error of a timed network, predicted from the others", "fraction"),
            _real("noise", "Median relative error of a network's own time", "fraction"),
        ),
    ),
    Table(
        name="alpha_sweep",
        meaning="One fixed configuration: in one supernet of the sweep over alpha, and trained on its own.",
        columns=(
            _ALPHA,
            _SCALING,
            _seed("Which supernet"),
            _CONFIGURATION,
            _accuracy("supernet_accuracy", "Accuracy in the supernet, validation split"),
            _accuracy("fixed_accuracy", "Accuracy when trained on its own, validation split"),
            _accuracy("difference", "supernet_accuracy - fixed_accuracy", low=-1),
        ),
    ),
    Table(
        name="scores",
        meaning="One evaluated configuration, with the value by which the search ranks it.",
        columns=(
            _CONFIGURATION,
            _real("score", "By search.score: accuracy, or minus the loss, over the supernets", low=-math.inf),
            _real("standard_error", "Standard error of a score that is smoothed over several supernets", nullable=True),
        ),
    ),
    Table(
        name="selections",
        meaning="One configuration selected under one budget: the search.top of the highest score, and then the "
        "cheapest within one standard error of the best, if it is not among these.",
        columns=(
            _text("budget", "Fixed configuration whose MACs are the budget, like 16-16-16"),
            _count("budget_macs", "MACs of that configuration", "MACs an image"),
            _count("rank", "Rank by score among the configurations selected under this budget, from 1", low=1),
            _CONFIGURATION,
            _MACS,
            _accuracy("supernet_accuracy", "Median over the supernets of the accuracy on the validation split"),
        ),
    ),
    Table(
        name="validations",
        meaning="One configuration decomposed, reconstructed and fine-tuned on its own.",
        columns=(
            _CONFIGURATION,
            _text(
                "kind",
                "fixed: its MACs are a budget, or the experiment names it; drawn: validation.drawn; selected: others",
                choices=("fixed", "selected", "drawn"),
            ),
            _seed("Which repeat"),
            _VAL_ACCURACY,
            _TEST_ACCURACY,
            _MACS,
            _MACS_PAPER,
            _PARAMETERS,
        ),
    ),
)

TABLES: dict[str, Table] = {table.name: table for table in _TABLES}
"""Every table by its name, in the order of the stages."""


def table(name: str) -> Table:
    """Return the table called `name`; raises InvalidValueError, listing the known names, for an unknown one."""
    if name not in TABLES:
        raise InvalidValueError(f"unknown table {name!r}; known tables: {', '.join(TABLES)}")
    return TABLES[name]
