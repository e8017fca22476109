"""The command line where Ray is not needed: its help, the presets, and what it answers to a user's mistakes."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result

from cli import main
from gross_ray.presets import PRESETS, preset
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.run.tables import TABLES
from gross_ray.search.budgets import Budget
from gross_ray.search.selection import best_under, pareto_front
from pipelines.commands.terminal import Reporter
from pipelines.driver import DataSource, Session
from pipelines.resources import Resources
from pipelines.stages import rounds, search, supernets
from pipelines.stages.pipeline import STAGES as PIPELINE

STAGES = ["train", "decompose", "reconstruct", "finetune", "search", "validate", "sweep-alpha"]


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
    network = Run(store).new_network(10, 32, torch.Generator().manual_seed(0))
    for seed in range(2):
        row = {"seed": seed, "val_correct": 9, "val_total": 10, "val_accuracy": 0.9, "test_accuracy": 0.9}
        about = {"num_classes": 10, "image_size": 32, "input_shape": [3, 32, 32], "classes": list("abcdefghij")}
        store.save_checkpoint("train", f"seed={seed}", network.state_dict(), about)
        store.write_table("networks", f"seed={seed}", [{**row, "macs": 1, "parameters": 1}])
        store.write_table("history", f"train,seed={seed}", [])
    return run


def test_group_sizes_are_named_once() -> None:
    line = mistake("inspect", "--model", "four-conv", "--group-sizes", "1,4,1")
    assert "--group-sizes 1,4,1: must name each number once" in line


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
    RunStore.create(run, preset(name))
    line = mistake("search", run, "--preset", other, *(part for line in lines for part in ("--set", line)))
    assert "gross train" in line  # it is the folder's experiment; the search finds nothing in it
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
        ([], ["Missing option '--preset' or '--experiment'"]),
        (["--preset", "quickstart", "--experiment", "a.json"], ["--experiment a.json with --preset quickstart"]),
        (["--experiment", "none.json"], ["experiment none.json: FileNotFoundError"]),
        (["--experiment", __file__], ["test_cli.py: JSONDecodeError"]),
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
        (["search"], ["Missing argument 'RUN'"]),
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
        ("16-16-3", "group-size 3 must be one of those of conv4"),
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
    assert "leave one of them out" in mistake("show", trained, "networks", "--rows", "1", "--csv")


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
    assert report.stderr == f"page: {trained / 'report.html'}\n"
    assert "run <code>gross search</code>" in (trained / "report.html").read_text(encoding="utf-8")
    assert gross("status", trained).stdout == status.stdout


def test_the_page_goes_where_it_is_told_to(trained: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    printed = gross("report", trained, "--markdown")
    assert printed.exit_code == 0
    assert "| full |" in printed.stdout
    assert (printed.stderr, listing(tmp_path)) == ("", before)  # the tables alone
    line = mistake("report", trained, "--to", tmp_path / "none" / "a.html")
    assert f"{tmp_path / 'none' / 'a.html'}: there is no folder {tmp_path / 'none'}" in line
    assert "which writes no page" in mistake("report", trained, "--markdown", "--to", tmp_path / "a.html")
    assert "is a directory" in mistake("report", trained, "--to", tmp_path)
    assert listing(tmp_path) == before
    written = gross("report", trained, "--to", tmp_path / "a.html")
    assert (written.exit_code, written.stderr) == (0, f"page: {tmp_path / 'a.html'}\n")
    assert listing(tmp_path) == sorted([*before, "a.html"])
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_tables_are_printed_even_where_no_page_can_be_made(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = gross("report", trained)
    assert result.exit_code == 2
    assert "Table 2" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: the HTML page needs plotly: pip install plotly")


@pytest.fixture
def did(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `gross search` has the pipelines do, in order; they find three configurations."""
    done: list[Any] = []
    accuracies = pd.DataFrame(
        {
            "configuration": ["16-16-16", "4-4-4", "2-4-8"],
            "macs": [3_000_000, 1_500_000, 1_400_000],
            "macs_paper": [3_100_000, 1_600_000, 1_500_000],
            "parameters": [30_000, 12_000, 14_000],
            "latency_ms": [3.0, 1.5, 2.0],
            "score": [0.9, 0.8, 0.7],
            "standard_error": [math.nan] * 3,
        }
    )

    def best(run: Run, budgets: tuple[Budget, ...], top: int) -> pd.DataFrame:
        done.append(("best", run.store.path, budgets, top))
        return best_under(accuracies, budgets, top)

    def front(run: Run, costs: list[str]) -> pd.DataFrame:
        done.append(("front", run.store.path, *costs))
        return pareto_front(accuracies, cost=costs)

    monkeypatch.setattr(search, "do", lambda driver: done.append(("search", driver.run.store.path)))
    for function in (best, front):
        monkeypatch.setattr(search, function.__name__, function)
    monkeypatch.setattr(search, "accuracies", lambda run: iter([accuracies]))
    return done


def printed(*arguments: str | Path) -> list[list[str]]:
    """Return what was printed, in words; an empty line between tables is an empty list."""
    result = gross(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return [line.split() for line in result.stdout.splitlines()]


def test_search_prints_the_best_under_all_budgets(run: Path, did: list[Any]) -> None:
    lines = printed("search", run, "--budget", "macs=2.66M", "--budget", "latency_ms=1.75", "--top", "3")
    assert did == [("best", run, [Budget("macs", 2.66e6), Budget("latency_ms", 1.75)], 3)]
    assert lines[0] == ["Most", "accurate", "within", "macs=2.66M", "and", "latency_ms=1.75"]
    assert lines[2:] == [["1", "4-4-4", "1.50", "12000", "1.500", "80.00"]]
    lines = printed("search", run, "--budget", "parameters=20k")
    assert did[-1] == ("best", run, [Budget("parameters", 20_000)], 5)
    assert [line[:2] for line in lines[2:]] == [["1", "4-4-4"], ["2", "2-4-8"]]


def test_search_without_budgets_prints_the_stored_selections(run: Path, did: list[Any]) -> None:
    assert printed("search", run) == [["nothing", "stored"]]
    row = {"budget": "4-4-4", "budget_macs": 9, "rank": 1, "configuration": "2-4-8", "macs": 8}
    RunStore.open(run).write_table("selections", "budget=4-4-4", [row | {"supernet_accuracy": 0.7}])
    assert printed("search", run)[1] == ["4-4-4", "9", "1", "2-4-8", "8", "0.7"]
    assert did == [("search", run)] * 2


def test_search_prints_the_front_of_the_first_budgets_cost(run: Path, did: list[Any]) -> None:
    lines = printed("search", run, "--pareto")
    assert did == [("front", run, "macs")]
    assert [line[0] for line in lines[2:]] == ["2-4-8", "4-4-4", "16-16-16"]
    lines = printed("search", run, "--pareto", "--budget", "parameters=13k", "--budget", "macs=2M")
    assert did[-1] == ("front", run, "parameters")
    gap = lines.index([])
    assert [line[1] for line in lines[2:gap]] == ["4-4-4"]
    assert [line[0] for line in lines[gap + 3 :]] == ["4-4-4", "16-16-16"]  # of the whole space: 2-4-8 is dominated
    lines = printed("search", run, "--pareto", "--costs", "parameters, macs", "--budget", "macs=2M")
    assert did[-1] == ("front", run, "parameters", "macs")
    assert [line[0] for line in lines[-3:]] == ["4-4-4", "2-4-8", "16-16-16"]
    assert "parameters, macs" in " ".join(lines[-5])


def test_search_says_the_smallest_where_nothing_fits(run: Path, did: list[Any]) -> None:
    line = mistake("search", run, "--budget", "macs=1M", "--budget", "parameters=1G")
    assert "macs=1M and parameters=1G: nothing fits" in line
    assert "macs=1.4M at 2-4-8, parameters=12k at 4-4-4" in line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--budget", "macs=2.66m"], ["'macs=2.66m'", "macs=2.66M"]),
        (["--budget", "macs=2M", "--budget", "flops=2M"], ["'flops'", "macs, macs_paper, parameters, latency_ms"]),
        (["--budget", "macs=0"], ["macs=0", "above 0"]),
        (["--budget", "macs=2M", "--top", "0"], ["--top", "0"]),
        (["--top", "3"], ["--top 3 without --budget"]),
        (["--costs", "macs"], ["--costs macs without --pareto"]),
        (["--pareto", "--costs", "macs,flops"], ["--costs macs,flops: 'flops' is none of macs, macs_paper,"]),
        (["--pareto", "--num-cpus", "2"], ["--num-cpus 2 with --pareto, which only answers: leave one of them out"]),
        (["--budget", "macs=2M", "--in-process"], ["--in-process with --budget, which only answers"]),
        (["--pareto", "--preset", "quickstart"], ["--preset quickstart with --pareto"]),
        (["--pareto", "--set", "seed=1", "--set", "name=a"], ["--set seed=1 name=a with --pareto"]),
    ],
)
def test_a_wrong_search_is_refused_before_any_work(
    run: Path, did: list[Any], arguments: list[str], parts: list[str]
) -> None:
    line = mistake("search", run, *arguments)
    for part in parts:
        assert part in line
    assert did == []
    assert listing(run) == ["experiment.json"]


def test_a_sweep_says_by_what_trials_are_compared() -> None:
    shown = " ".join(gross("sweep-alpha", "--help").stdout.split())
    assert "supernet_accuracy: the mean accuracy of the fixed configurations in the supernet" in shown


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How sessions are opened; none of them does anything."""
    asked: list[dict[str, Any]] = []

    @contextmanager
    def record(store: RunStore, resources: Resources, *_: Any, **how: Any) -> Iterator[Session]:
        asked.append(how)
        yield Session(Run(store), resources, DataSource(), Reporter(io.StringIO()), (), how["in_process"])

    monkeypatch.setattr(Session, "opened", record)
    for stage in PIPELINE.values():
        monkeypatch.setattr(stage, "do", lambda driver: None)
    return asked


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_done_in_this_process_if_that_is_asked_for(
    run: Path, opened: list[dict[str, Any]], stage: str
) -> None:
    assert gross(stage, run, "--in-process").exit_code == 0
    assert gross(stage, run).exit_code == 0
    assert [how["in_process"] for how in opened] == [True, False]


@pytest.mark.parametrize("command", [["run", "--preset", "quickstart", "--out"], *([stage] for stage in STAGES)])
@pytest.mark.parametrize("option", [("--address", "10.0.0.1:6379"), ("--gpus-per-unit", "0.25")])
def test_in_this_process_there_is_no_cluster_to_choose(
    run: Path, opened: list[dict[str, Any]], command: list[str], option: tuple[str, str]
) -> None:
    before = listing(run)
    line = mistake(*command, run, "--in-process", *option)
    assert f"{' '.join(option)} with --in-process" in line
    assert (opened, listing(run)) == ([], before)


def test_in_this_process_a_unit_may_have_fewer_cores_whatever_cluster_is_named(
    run: Path, opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "num_cpus = 1 with the running cluster 10.0.0.1:6379" in mistake("train", run, "--num-cpus", "1")
    assert gross("train", run, "--in-process", "--num-cpus", "1").exit_code == 0
    assert [how["in_process"] for how in opened] == [True]


@pytest.mark.parametrize("command", [["run", "--preset", "quickstart", "--out"], ["validate"], ["sweep-alpha"]])
def test_callbacks_of_ray_tune_need_ray(run: Path, opened: list[dict[str, Any]], command: list[str]) -> None:
    line = mistake(*command, run, "--in-process", "--callback", "no_such:Callback")
    assert "--callback no_such:Callback with --in-process" in line
    assert opened == []


@pytest.mark.parametrize("question", [["--budget", "macs=2M"], ["--pareto"]])
def test_a_question_about_an_unfinished_search_names_the_search(run: Path, trained: Path, question: list[str]) -> None:
    before = listing(run)
    assert mistake("search", run, *question).endswith(f"is not finished: run `gross search {run}` first")
    assert listing(run) == before  # no lock either


@pytest.mark.parametrize("strategy", ["exhaustive", "random"])
def test_a_search_is_finished_when_all_its_shards_are_stored(tmp_path: Path, strategy: str) -> None:
    settings = [f"search.strategy={strategy}", f"search.evaluations={4 if strategy == 'random' else 0}"]
    store = RunStore.create(tmp_path / "run", preset("quickstart").override(settings))
    supernet = supernets.searched(Run(store))[0].name
    if strategy == "exhaustive":
        store.save_checkpoint("search-plan", "plan", {}, {"shards": [[0, 1], [1, 2]], "forms": {}, "memory_budget": 1})
        units = [f"{supernet},start=0,stop=1", f"{supernet},start=1,stop=2"]
    else:
        store.save_checkpoint("search-plan", "plan", {}, {"shards": [], "forms": {}, "memory_budget": 1})
        store.save_checkpoint(rounds.ROUNDS, "round=0", {}, {"configurations": ["1-1-1", "2-2-2"]})
        units = [f"{supernet},round=0,part={part}" for part in range(2)]
    for number, unit in enumerate(units):
        row = {"supernet": supernet, "alpha": 4.0, "scaling": "normalised", "seed": 0, "latency_ms": None}
        row |= {f"layer conv{layer}": number + 1 for layer in (2, 3, 4)}
        row |= {"configuration": f"{number + 1}-{number + 1}-{number + 1}", "macs": 1000 + number, "macs_paper": 900}
        row |= {"parameters": 10, "val_correct": 5 + number, "val_total": 10, "val_loss": 1.0}
        row |= {"val_accuracy": (5 + number) / 10}
        assert "is not finished" in mistake("search", store.path, "--pareto")
        store.write_table(
            "configurations",
            unit,
            [row | {"val_accuracy": row["val_correct"] / 10}],
            layers=["conv2", "conv3", "conv4"],
        )
    if strategy == "random":
        assert "is not finished" in mistake("search", store.path, "--pareto")  # its strategy may go on
        rounds.end(Run(store))
    before = listing(store.path)
    assert [line[0] for line in printed("search", store.path, "--pareto")[2:]] == ["1-1-1", "2-2-2"]
    assert printed("search", store.path, "--budget", "macs=1k")[2][:2] == ["1", "1-1-1"]
    assert listing(store.path) == before


def test_inspect_prints_layers_the_space_and_what_is_left_alone() -> None:
    told = gross(
        "inspect", "--model", "vgg16", "--group-sizes", "1,4,16,32", "--layers", "features.1*", "--layers", "features.3"
    )
    assert "Decomposed: 4 layers, for images of 3x32x32" in told.stdout
    assert "The space: 256 configurations" in told.stdout
    assert "Left alone: 9 convolutions" in told.stdout
    assert "features.0   the network's first convolution" in told.stdout


def test_inspect_takes_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n\ndef small():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten())\n"
    )
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    told = gross("inspect", "--model", "own_networks:small", "--image-size", "9")
    assert "for images of 3x9x9" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--group-sizes", "1,a"], "--group-sizes 1,a: must be whole numbers above 0 with commas between"),
        (["--layers", "fc*"], "layers 'fc*': matches no convolution that can be decomposed"),
        (["--image-size", "20", "--group-sizes", "5"], "none of the group-sizes 5 divides its 32 input channels"),
    ],
)
def test_inspect_refuses_in_a_line(arguments: list[str], line: str) -> None:
    assert line in mistake("inspect", "--model", "four-conv", *arguments)
