"""Strips of coloured cells: laws for any configuration, and the page that has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parsed_page import ParsedPage
from runs import DEEP, deep_run, new_run, write_decompositions

from gross_ray.report.page import html_page
from gross_ray.report.page_strips import Strips, colours
from gross_ray.report.strips import uniform_name
from gross_ray.space import DENSE, Configuration

SIZES = st.one_of(st.just(DENSE), st.integers(1, 2048))
SHARES = st.lists(st.floats(1e-4, 0.3), min_size=2, max_size=40)


@st.composite
def strips_and_configuration(draw: st.DrawFn) -> tuple[Strips, Configuration]:
    shares = draw(SHARES)
    few = draw(st.sets(SIZES, min_size=1, max_size=12))
    sizes = draw(st.lists(st.sampled_from(sorted(few)), min_size=len(shares), max_size=len(shares)))
    by_layer = {f"layer{place}": share for place, share in enumerate(shares)}
    return Strips(by_layer, True, colours(few)), Configuration(sizes)


@given(strips_and_configuration())
def test_a_strip_has_a_cell_for_each_layer_as_wide_as_its_share(drawn: tuple[Strips, Configuration]) -> None:
    strips, configuration = drawn
    strip = strips.strip(f"{configuration} (fixed)")
    assert strip is not None and strip.name == str(configuration)
    assert strip.uniform == uniform_name(configuration)
    assert len(strip.cells) == len(configuration)
    widths, shares = [cell.width for cell in strip.cells], list(strips.shares.values())
    assert sum(widths) == pytest.approx(1)
    assert [width for _, width in sorted(zip(shares, widths, strict=True))] == sorted(widths)
    for cell, (layer, share), size in zip(strip.cells, strips.shares.items(), configuration, strict=True):
        words = "dense" if size == DENSE else f"group-size {size}"
        assert cell.title == f"{layer}: {words}, {100 * share:.1f} % of the full network's MACs"
        for other, its_size in zip(strip.cells, configuration, strict=True):
            assert (cell.colour == other.colour) == (size == its_size)
    counts = map(int, re.findall(r" in (\d+)", strip.summary))
    assert sum(counts) == len(configuration)


@given(st.sets(SIZES, min_size=1, max_size=12))
def test_a_larger_group_size_is_darker_and_a_dense_layer_has_no_colour(sizes: set[int]) -> None:
    found = colours(sizes)
    assert found.keys() == sizes
    assert (found.pop(DENSE, "") == "") and all(found.values())
    levels = []
    for colour in found.values():
        red, green, blue = map(float, re.findall(r"[\d.]+", colour))
        levels.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    assert levels == sorted(levels, reverse=True) and len(set(levels)) == len(levels)
    assert list(found) == sorted(found)


def test_cells_that_name_no_configuration_of_the_layers_have_no_strip() -> None:
    strips = Strips({"a": 0.5, "b": 0.2}, True, colours([1, 4, DENSE]))
    assert strips.strip("1-d") is not None
    assert [strips.strip(cell) for cell in ("1-4-4", "4", "full network", "")] == [None] * 4
    assert strips.strip("1-4", "on") is None
    assert Strips({"a": 0.5}, True, colours([4])).strip("4") is None


def test_the_page_has_a_strip_beside_each_configuration_of_its_tables(tmp_path: Path) -> None:
    deep = deep_run(tmp_path / "run")
    text = html_page(deep)
    page = ParsedPage(text)
    cells = [cell for table in page.tables.values() for row in table.rows for cell in row]
    named = [cell for cell in cells if re.search(r"[14d](-[14d]){7}", cell)]
    assert len(named) > 5
    assert page.strips.keys() == {re.sub(r"^fixed | \(fixed\)$", "", cell) for cell in named}
    assert {name: short for name, short in page.uniform.items() if short} == {
        "1-1-1-1-1-1-1-1": "all 1: ",
        "4-4-4-4-4-4-4-4": "all 4: ",
    }
    for name, cells in page.strips.items():
        sizes = zip(DEEP, name.split("-"), strict=True)
        words = [f"{layer}: {'dense' if size == 'd' else f'group-size {size}'}" for layer, size in sizes]
        assert [cell["title"] for cell in cells] == words
        assert ["class" in cell for cell in cells] == ["background" not in cell["style"] for cell in cells]
        assert {cell["style"].partition(";")[0] for cell in cells} == {"flex-grow: 12.500"}
    assert page.strips["d-4-4-4-4-4-4-4"][0]["class"] == "dense"
    assert "all of equal width because the MACs of the layers are not stored (<code>gross decompose</code>" in text
    assert text.count('<p class="scale">') == 1
    write_decompositions(deep, DEEP)
    text = html_page(deep)
    page = ParsedPage(text)
    assert "as wide as its share of the full network's MACs" in text
    (macs,) = set(deep.read_table("networks")["macs"])
    for row, cell in zip(deep.read_table("layers").itertuples(), page.strips["4-4-4-4-4-4-4-4"], strict=True):
        share = f"{100 * row.dense_macs / macs:.1f} % of the full network's MACs"
        assert cell["title"] == f"{row.layer}: group-size 4, {share}"


def test_the_page_of_a_run_without_configurations_has_no_legend(tmp_path: Path) -> None:
    assert '<p class="scale">' not in html_page(new_run(tmp_path / "run"))
