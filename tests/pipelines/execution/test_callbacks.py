"""The user's callbacks, found by name; a wrong name is refused in one line before anything starts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from ray.tune import Callback

from cli import main
from gross_ray.errors import InvalidValueError
from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from pipelines.execution import cluster
from pipelines.execution.callbacks import load_callbacks

MODULE = """
from ray.tune import Callback

class Mine(Callback):
    def __init__(self, place="here"):
        self.place = place

class Needy(Callback):
    def __init__(self, url):
        self.url = url

class Holder:
    Inner = Mine

def make():
    return Mine("made")

def wrong():
    return 3

ready = Mine("ready")
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user in the current folder, which is not where Python looks by itself."""
    (tmp_path / "users_callbacks.py").write_text(MODULE)
    (tmp_path / "users_broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield "users_callbacks"
    for name in ("users_callbacks", "users_broken"):
        sys.modules.pop(name, None)


def test_a_class_a_function_and_a_ready_one_are_taken_in_order(module: str) -> None:
    names = ["ready", "Mine", "make", "Holder.Inner", "Mine"]
    found = load_callbacks([f"{module}:{name}" for name in names])
    assert all(isinstance(one, Callback) for one in found)
    assert [one.place for one in found] == ["ready", "here", "made", "here", "here"]
    assert found[1] is not found[4]


def test_those_of_ray_itself_are_found() -> None:
    (found,) = load_callbacks(["ray.tune.logger:JsonLoggerCallback"])
    assert isinstance(found, Callback)


WRONG = {
    "users_callbacks": "write MODULE:NAME",
    ":Mine": "write MODULE:NAME",
    "users_callbacks:": "write MODULE:NAME",
    "no_such_module:Mine": "no module 'no_such_module'",
    "users_callbacks.inner:Mine": "no module 'users_callbacks.inner'",
    "users_callbacks:Miner": "has no 'Miner'",
    "users_callbacks:number": "is 3; name a ray.tune.Callback",
    "users_callbacks:wrong": "makes 3, which is no ray.tune.Callback",
    "users_callbacks:Needy": "missing 1 required positional argument",
    "users_broken:Mine": "importing 'users_broken' fails: ModuleNotFoundError: No module named 'no_such_package'",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_name_is_refused(module: str, name: str) -> None:
    with pytest.raises(InvalidValueError) as found:
        load_callbacks([f"{module}:Mine", name])
    assert repr(name) in str(found.value)
    assert WRONG[name] in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("command", ["run", "validate", "sweep-alpha"])
def test_the_command_refuses_it_in_one_line_before_anything_starts(
    module: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "connected", refuse)
    run = Path("run").resolve()
    if command == "run":
        arguments = ["--preset", "quickstart", "--out", str(run)]
    else:
        arguments = [str(RunStore.create(run, preset("quickstart")).path)]
    ended = CliRunner().invoke(main, [command, *arguments, "--callback", f"{module}:Miner"])
    assert ended.exit_code == 2
    assert ended.stderr == f"Error: callback '{module}:Miner': '{module}' has no 'Miner'; look at the spelling\n"
    assert not run.exists() or [file.name for file in run.iterdir()] == ["experiment.json"]
