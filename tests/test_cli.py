"""The command line where Ray is not needed: its help, the presets, and what it answers to a user's mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from cli import main
from gross_ray.presets import PRESETS, preset
from gross_ray.results.store import RunStore
from gross_ray.results.tables import TABLES
from pipelines.cluster import ray
from pipelines.networks import new_network

STAGES = ["train", "decompose", "reconstruct", "finetune", "search", "validate", "sweep-alpha"]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", refuse)


def gross(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], prog_name="gross")


def mistake(*arguments: str | Path) -> str:
    """Return the one line on stderr with which a user's mistake ends."""
    result = gross(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "Traceback" not in line
    return line


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder in which nothing is done yet."""
    return RunStore.create(tmp_path / "run", preset("quickstart").override(["training.seeds=2"])).path


@pytest.fixture
def trained(run: Path) -> Path:
    """A run folder in which the base networks are stored."""
    store = RunStore.open(run)
    network = new_network(store, 10, 32, torch.Generator().manual_seed(0))
    for seed in range(2):
        row = {"seed": seed, "val_correct": 9, "val_total": 10, "val_accuracy": 0.9, "test_accuracy": 0.9}
        store.save_checkpoint("train", f"seed={seed}", network.state_dict(), {"num_classes": 10, "image_size": 32})
        store.write_table("networks", f"seed={seed}", [{**row, "macs": 1, "parameters": 1}])
    return run


@pytest.mark.parametrize("name", [None, *main.commands])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_help_has_an_example(name: str | None, flag: str) -> None:
    result = gross(*([name] if name else []), flag)
    assert result.exit_code == 0
    assert "Example:" in result.stdout
    assert f"gross {name or 'run'} " in result.stdout.partition("Example:")[2] or name == "presets"
    assert result.stderr == ""


def test_the_commands_are_listed_in_the_order_of_the_stages() -> None:
    result = gross()
    assert result.exit_code == 0
    places = [result.stdout.index(f"\n  {name} ") for name in ["run", *STAGES, "presets", "report", "export"]]
    assert places == sorted(places)


def test_the_presets_are_listed_with_their_cost() -> None:
    result = gross("presets")
    assert result.exit_code == 0
    for name, entry in PRESETS.items():
        assert name in result.stdout
        assert entry.description in result.stdout
        assert f"Cost: {entry.cost}." in result.stdout


@pytest.mark.parametrize("name", PRESETS)
def test_the_printed_fields_of_a_preset_set_the_same_experiment(tmp_path: Path, name: str) -> None:
    lines = gross("presets", name).stdout.splitlines()
    assert len(lines) == len(preset(name).fields())
    other = "paper" if name == "quickstart" else "quickstart"
    run = tmp_path / "run"
    line = mistake("search", run, "--preset", other, *(part for line in lines for part in ("--set", line)))
    assert "gross train" in line  # the folder is made, the search finds nothing in it
    assert RunStore.open(run).experiment == preset(name) != preset(other)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--preset", "nonesuch"], ["'nonesuch'", *PRESETS]),
        (["--preset", "quickstart", "--set", "training.epoch=3"], ["'training.epoch'", *preset("quickstart").fields()]),
        (["--preset", "quickstart", "--set", "training.epochs=0"], ["training.epochs = 0", "1 or more"]),
        (["--preset", "quickstart", "--set", "validation.finetuning.lr=-1"], ["validation.finetuning.lr = -1.0"]),
        (["--preset", "quickstart", "--set", "training.epochs=many"], ["training.epochs = 'many'", "type int"]),
        (["--preset", "quickstart", "--set", "training.epochs"], ["'training.epochs'", "FIELD=VALUE"]),
        (["--preset", "quickstart", "--set", "data.name=mnist"], ["data.name", "'mnist'", "cifar10"]),
        (["--preset", "quickstart", "--set", "model=alexnet"], ["'alexnet'", "four-conv"]),
        (["--preset", "quickstart", "--device", "tpu"], ["--device", "'tpu'", "'auto', 'cpu', 'cuda'"]),
        (["--preset", "quickstart", "--num-cpus", "0"], ["num_cpus = 0"]),
        (["--preset", "quickstart", "--num-cpus", "2", "--address", "10.0.0.1:6379"], ["num_cpus = 2", "10.0.0.1"]),
        (["--preset", "quickstart", "--gpus-per-unit", "0"], ["gpus_per_unit = 0.0"]),
        ([], ["Missing option '--preset'"]),
    ],
)
def test_a_wrong_experiment_or_place_of_work_leaves_nothing_behind(
    tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    line = mistake("run", "--out", tmp_path / "run", *arguments)
    for part in parts:
        assert part in line
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nonesuch"], ["No such command 'nonesuch'", "gross"]),
        (["run", "--preset", "quickstart"], ["Missing option '--out'"]),
        (["train"], ["Missing argument 'RUN'"]),
        (["report", "--mark"], ["No such option", "--markdown"]),
        (["presets", "nonesuch"], ["'nonesuch'", *PRESETS]),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(arguments: list[str], parts: list[str]) -> None:
    line = mistake(*arguments)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "arguments",
    [
        *([stage] for stage in STAGES),
        ["status"],
        ["report"],
        ["show", "networks"],
        ["export", "--configuration", "16-16-16", "--to", "model.onnx"],
    ],
)
def test_a_missing_run_folder_is_told(tmp_path: Path, arguments: list[str]) -> None:
    command, *rest = arguments
    line = mistake(command, tmp_path / "missing", *rest)
    assert f"{tmp_path / 'missing'} is not a run folder" in line
    assert listing(tmp_path) == []


@pytest.mark.parametrize("command", [["run", "--out"], ["train"]])
def test_the_folder_of_another_experiment_is_refused_by_its_first_field(run: Path, command: list[str]) -> None:
    before = listing(run)
    epochs = preset("quickstart").training.epochs
    settings = ["--set", f"training.epochs={epochs + 1}", "--set", "search.top=9"]
    line = mistake(*command, run, "--preset", "quickstart", *settings)
    assert str(run) in line
    assert f"training.epochs ({epochs + 1}, not {epochs})" in line
    assert listing(run) == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "'thesis.tex'" in mistake("run", "--out", tmp_path, "--preset", "quickstart")
    assert listing(tmp_path) == ["thesis.tex"]


def test_settings_need_a_preset(run: Path) -> None:
    assert "--set search.top=2 without --preset" in mistake("search", run, "--set", "search.top=2")


def test_an_unknown_table_lists_those_there_are(run: Path) -> None:
    line = mistake("show", run, "accuracies")
    for name in ("'accuracies'", *TABLES):
        assert name in line


@pytest.mark.parametrize("stage", ["decompose", "reconstruct", "search", "validate", "sweep-alpha"])
def test_a_stage_before_train_names_train(run: Path, stage: str) -> None:
    assert "run `gross train` on it first" in mistake(stage, run)
    assert [file for file in listing(run) if not file.startswith(".lock")] == ["experiment.json"]


@pytest.mark.parametrize(
    ("stage", "earlier"),
    [
        ("reconstruct", "decompose"),
        ("finetune", "reconstruct"),
        ("search", "finetune"),
        ("validate", "search"),
        ("sweep-alpha", "decompose"),
    ],
)
def test_a_stage_too_early_names_the_one_to_run(trained: Path, stage: str, earlier: str) -> None:
    before = listing(trained)
    assert f"run `gross {earlier}` on it first" in mistake(stage, trained)
    assert [file for file in listing(trained) if file != ".lock"] == before


@pytest.mark.parametrize(
    ("configuration", "part"),
    [
        ("16-16-16", "16-16-16,seed=0 is not validated"),
        ("16-16", "has 2 group-sizes"),
        ("16-16-3", "group-size 3 is not among"),
        ("16,16,16", "'16,16,16'"),
    ],
)
def test_only_a_validated_configuration_is_exported(trained: Path, configuration: str, part: str) -> None:
    target = trained.parent / "model.onnx"
    before = listing(trained.parent)
    assert part in mistake("export", trained, "--configuration", configuration, "--to", target)
    assert listing(trained.parent) == before


def test_show_prints_a_table_and_says_how_much_is_left(trained: Path) -> None:
    assert gross("show", trained, "selections").stdout == "selections: no rows yet\n"
    shown = gross("show", trained, "networks", "--rows", "1").stdout.splitlines()
    assert len(shown) == 3
    assert shown[-1] == "... 1 more rows (--rows 0 for all)"
    assert len(gross("show", trained, "networks", "--rows", "0").stdout.splitlines()) == 3
    csv = gross("show", trained, "networks", "--csv").stdout.splitlines()
    assert csv[0].split(",") == [column.name for column in TABLES["networks"].columns]
    assert len(csv) == 3
    assert "--rows" in mistake("show", trained, "networks", "--rows", "-1")


def test_status_and_report_of_a_run_under_way(trained: Path) -> None:
    status = gross("status", trained)
    assert status.exit_code == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in status.stdout.splitlines()[1:]}
    assert list(lines) == STAGES
    assert lines["train"] == "2 of 2 units"
    assert lines["decompose"] == "0 of 19 units"
    assert lines["validate"] == "waits for an earlier stage"
    report = gross("report", trained)
    assert report.exit_code == 0
    assert "missing: run `gross search`" in report.stdout
