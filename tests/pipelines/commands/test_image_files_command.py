"""`gross data`: files of images are listed, verified and deleted; and what is shown while they are read."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cli import main
from gross_ray.data import reading
from gross_ray.data.image_files import ImageFiles, all_files
from gross_ray.data.images import load_dataset
from gross_ray.experiment import DataOptions
from pipelines import watching
from pipelines.commands import terminal
from pipelines.driver import DataSource


def gross(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["data", *arguments, "--data-root", str(root)], prog_name="gross")


def lines(root: Path, *arguments: str) -> list[str]:
    result = gross(root, *arguments)
    assert result.exit_code == 0
    assert result.stderr in ("", f"files of images in {root / 'images'}:\n")
    return result.stdout.splitlines()


def mistake(root: Path, *arguments: str, status: int = 2) -> str:
    result = gross(root, *arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == status
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in this process: forking others takes time."""
    monkeypatch.setattr(reading, "processes", lambda: 0)


def pictures(path: Path) -> DataOptions:
    generator = np.random.default_rng(0)
    for number in range(20):
        (path / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / "ab"[number % 2] / f"{number:02}.png")
    return DataOptions(name=f"folder:{path}", memory=1)


@pytest.fixture
def two(tmp_path: Path) -> list[ImageFiles]:
    """The files of two datasets in tmp_path, in the order of their keys."""
    for name in ("one", "other"):
        load_dataset(pictures(tmp_path / name), root=tmp_path)
    return all_files(str(tmp_path))


def change(files: ImageFiles) -> None:
    """Change a pixel."""
    content = bytearray((files.folder / "train.u8").read_bytes())
    content[0] ^= 1
    (files.folder / "train.u8").write_bytes(content)


def test_nothing_to_list_verify_or_delete(tmp_path: Path) -> None:
    for words in ([], ["--verify"], ["all"], ["all", "--clear"]):
        assert lines(tmp_path, *words) == [f"no files of images in {tmp_path / 'images'}"]
    assert list(tmp_path.iterdir()) == []


def test_datasets_are_listed(two: list[ImageFiles], tmp_path: Path) -> None:
    for line, files in zip(lines(tmp_path), two, strict=True):
        name = files.progress()[0]
        assert re.fullmatch(
            rf"{files.key} +\d+\.\d MB  20 images of \d+x\d+, 20\d\d-\d\d-\d\d \d\d:\d\d  {re.escape(name)}", line
        )
    assert lines(tmp_path, two[1].key) == lines(tmp_path)[1:]


def test_changed_images_are_found(two: list[ImageFiles], tmp_path: Path) -> None:
    assert [line.split()[-1] for line in lines(tmp_path, "--verify")] == ["verified", "verified"]
    change(two[0])
    result = gross(tmp_path, "--verify")
    assert [line.split()[-1] for line in result.stdout.splitlines()] == ["CHANGED", "verified"]
    assert result.exit_code == 1
    rule = "their images are not those that were read; delete them with --clear, and they are read again"
    assert result.stderr.splitlines()[1:] == [f"Error: {two[0].key}: {rule}"]
    assert lines(tmp_path, two[1].key, "--verify")[0].endswith("verified")


@pytest.mark.parametrize("words", [["KEY", "--clear"], ["--clear", "KEY"]])
def test_one_dataset_is_deleted(words: list[str], two: list[ImageFiles], tmp_path: Path) -> None:
    (line,) = lines(tmp_path, *(two[0].key if word == "KEY" else word for word in words))
    assert line.startswith(two[0].key) and line.endswith("  deleted")
    assert all_files(str(tmp_path)) == two[1:]


def test_all_datasets_are_deleted(two: list[ImageFiles], tmp_path: Path) -> None:
    change(two[0])
    assert [line.split()[-1] for line in lines(tmp_path, "all", "--clear")] == ["deleted", "deleted"]
    assert all_files(str(tmp_path)) == []
    assert {*(path.name for path in tmp_path.iterdir())} == {"images", "one", "other"}  # no image of the user's


def test_mistakes_are_one_line_and_delete_nothing(two: list[ImageFiles], tmp_path: Path) -> None:
    known = f"known keys: {two[0].key}, {two[1].key}"
    assert mistake(tmp_path, "abc") == f"Error: KEY = 'abc': there are no such files in {tmp_path / 'images'}; {known}"
    assert "KEY = 'abc'" in mistake(tmp_path, two[0].key, "abc", "--clear")
    assert mistake(tmp_path, "--clear").startswith("Error: --clear: name the KEYs whose files are deleted, or all: ")
    assert mistake(tmp_path, "all", "--clear", "--verify") == "Error: --clear with --verify: choose one of them"
    assert all_files(str(tmp_path)) == two


@pytest.mark.parametrize("stop", ["read", "finish", "description"])
def test_what_is_not_complete_is_listed_not_verified_and_deleted(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading that is interrupted, at once or after the last part; and files whose description is damaged."""
    options, state = pictures(tmp_path / "one"), "20 of 20 images, not complete"
    if stop == "description":
        load_dataset(options, root=tmp_path)
        (files,) = all_files(str(tmp_path))
        (files.folder / "complete.json").write_text("{")
        state = "0 of 0 images, not complete  unknown"
    else:

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        owner = ImageFiles if stop == "finish" else reading.Reader
        monkeypatch.setattr(owner, stop, fail)
        with pytest.raises(KeyboardInterrupt):
            load_dataset(options, root=tmp_path)
        (files,) = all_files(str(tmp_path))
        state = state if stop == "finish" else "0 of 20 images, not complete"
    (line,) = lines(tmp_path)
    assert line.startswith(f"{files.key}  ") and state in line
    assert lines(tmp_path, "--verify") == [line]  # nothing has changed: it is read on, or refused, when it is loaded
    assert lines(tmp_path, files.key, "--clear") == [f"{line}  deleted"]
    assert all_files(str(tmp_path)) == []


# --- while images are read


def test_reading_prints_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", -1.0)
    source, options = DataSource(root=str(tmp_path), reading=terminal.reading), pictures(tmp_path / "one")
    monkeypatch.setattr("gross_ray.data.folders.FILES_A_PART", 4)
    try:
        source.load(options)
        first, *others, last = out.getvalue().splitlines()
        assert first == "more images than data.memory: reading them into files, once (gross data lists them)"
        counts = [f"reading: images {count} of 20" for count in (0, 4, 8, 12, 16, 20)]
        assert others == ["reading: 20 images", *counts]
        assert last.startswith("reading: finished after ")
        source.forget()
        out.truncate(0)
        source.load(options)
        assert out.getvalue() == ""
    finally:
        source.forget()


def test_the_time_left_is_that_of_this_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that an earlier reading read took no time in this one."""
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", -1.0)
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    for module in (terminal, watching):
        monkeypatch.setattr(module, "time", clock)
    with terminal.reading() as (_, progress):
        for done, minutes in ((9000, 0), (9100, 1), (9500, 5)):
            clock.now = 100 + 60 * minutes
            progress(done, 10_000)
    assert [line for line in out.getvalue().splitlines() if "images 9" in line] == [
        "reading: images 9,000 of 10,000",
        "reading: images 9,100 of 10,000, about 9 minutes left",
        "reading: images 9,500 of 10,000, about 5 minutes left",
    ]
