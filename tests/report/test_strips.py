"""Strips of text: laws for any configuration, and the terminal's tables that have them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import deep_run

from gross_ray.report.results import ResultTable
from gross_ray.report.strips import (
    BLOCKS,
    LEAST_LAYERS,
    PLAIN,
    configuration_in,
    frame_text,
    strip_column,
    text_strip,
    uniform_name,
)
from gross_ray.report.terminal import as_text, results
from gross_ray.space import DENSE, Configuration

SIZES = st.one_of(st.just(DENSE), st.integers(1, 2048))
CONFIGURATIONS = st.lists(SIZES, min_size=1, max_size=60).map(Configuration)
ALPHABETS = st.sampled_from([BLOCKS, PLAIN])


@given(CONFIGURATIONS, ALPHABETS)
def test_a_strip_of_text_has_one_character_for_each_layer(configuration: Configuration, characters: str) -> None:
    strip = text_strip(configuration, characters)
    assert len(strip) == len(configuration)
    levels = {size: characters.index(character) for size, character in zip(configuration, strip, strict=True)}
    ascending = [levels[size] for size in sorted(levels, key=lambda size: (size == DENSE, size))]
    assert ascending == sorted(ascending)
    assert [size for size in levels if levels[size] == len(characters) - 1] == [DENSE] * (DENSE in levels)


@pytest.mark.parametrize("characters", [BLOCKS, PLAIN])
def test_powers_of_two_have_a_character_each(characters: str) -> None:
    assert text_strip([*(2**power for power in range(7)), DENSE], characters) == characters
    assert len(set(characters)) == 8
    assert PLAIN.isascii()


@given(CONFIGURATIONS, st.sampled_from(["{}", "fixed {}", "{} (fixed)"]))
def test_the_configuration_in_a_cell_is_found(configuration: Configuration, cell: str) -> None:
    assert configuration_in(cell.format(configuration)) == configuration


@pytest.mark.parametrize("cell", ["", "full network", "-", "dense", "1-", "0-4", "4.5", "2026-01-02"])
def test_other_cells_have_none(cell: str) -> None:
    assert configuration_in(cell) is None


@given(CONFIGURATIONS)
def test_uniform_configurations_have_a_name_and_no_others(configuration: Configuration) -> None:
    alike = len(configuration) > 1 and all(size == configuration[0] for size in configuration)
    named = "dense" if configuration[0] == DENSE else configuration[0]
    assert uniform_name(configuration) == (f"all {named}" if alike else "")


@given(st.lists(CONFIGURATIONS, min_size=1, max_size=8))
def test_a_column_is_shown_for_many_layers_and_its_head_explains_every_character(found: list[Configuration]) -> None:
    column = strip_column([*map(str, found), "full network"])
    if max(map(len, found)) < LEAST_LAYERS:
        assert column is None
        return
    assert column is not None
    head, cells = column
    assert cells.pop() == ""
    meaning = {part[0]: part[1:].split(",") for part in head.split(" ")}
    for configuration, cell in zip(found, cells, strict=True):
        strip = cell.removeprefix(uniform_name(configuration)).strip()
        for size, character in zip(str(configuration).split("-"), strip, strict=True):
            assert size in meaning[character]


@pytest.mark.parametrize(("encoding", "characters"), [("utf-8", BLOCKS), ("cp1252", PLAIN), ("ascii", PLAIN)])
def test_an_output_that_lacks_the_blocks_gets_ascii(
    monkeypatch: pytest.MonkeyPatch, encoding: str, characters: str
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    column = strip_column(["1-2-4-8-16-32-64-d"])
    assert column is not None and column[1] == [characters]


def test_the_terminals_tables_have_a_column_after_the_configurations() -> None:
    rows = [["1", "4-4-4-4-4-4-4", "9.00"], ["2", "1-d-16-16-16-1-4", "8.00"]]
    table = ResultTable("Best", ["rank", "configuration", "M MACs"], rows)
    assert as_text(table).splitlines() == [
        "Best",
        "  rank     configuration   ▁1 ▃4 ▅16 █d  M MACs",
        "  1        4-4-4-4-4-4-4  all 4 ▃▃▃▃▃▃▃    9.00",
        "  2     1-d-16-16-16-1-4        ▁█▅▅▅▁▃    8.00",
    ]
    assert "▃" not in as_text(table, markdown=True) and "all 4" not in as_text(table, markdown=True)


def test_a_stored_table_has_it_too_and_keeps_its_columns() -> None:
    frame = pd.DataFrame({"budget": ["a"], "configuration": ["4-4-4-4-4-4-4"], "macs": [5]})
    head, row = frame_text(frame).splitlines()
    assert head.split() == ["budget", "configuration", "▃4", "macs"]
    assert row.split() == ["a", "4-4-4-4-4-4-4", "all", "4", "▃▃▃▃▃▃▃", "5"]
    assert list(frame.columns) == ["budget", "configuration", "macs"]
    for short in (frame.assign(configuration="4-4-4"), frame.drop(columns="configuration")):
        assert frame_text(short) == short.to_string(index=False)


def test_the_results_on_the_terminal_have_strips(tmp_path: Path) -> None:
    deep = deep_run(tmp_path / "run")
    lines = results(deep).splitlines()
    (fixed,) = [line for line in lines if "fixed 4-4-4-4-4-4-4-4" in line]
    assert "all 4 ▃▃▃▃▃▃▃▃" in fixed
    assert sum("▃4" in line for line in lines) == 2
    assert "▃" not in results(deep, markdown=True)
