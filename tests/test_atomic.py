"""A file is written completely or not at all, also by two writers at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from gross_ray.atomic import whole_or_not_at_all


def test_two_writers_of_one_file_do_not_write_into_each_others(tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    with whole_or_not_at_all(path) as second:
        second.write_text("half of the sec")
        with whole_or_not_at_all(path) as first:
            assert first.name == second.name == path.name
            first.write_text("the first")
        assert path.read_text() == "the first"
        second.write_text("the second")
    assert path.read_text() == "the second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    path.write_text("before")
    with pytest.raises(ValueError, match="in between"), whole_or_not_at_all(path) as partial:
        partial.write_text("half")
        raise ValueError("in between")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
