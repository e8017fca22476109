"""Options of the command line that change nothing are reported."""

from pathlib import Path

import pytest
from miniature import invoke

from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from pipelines.driver import DataSource, Session
from pipelines.resources import Resources


class Notes:
    """A Progress that only keeps notes; no stage is begun."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def stage(self, name: str, total: int, done: int) -> None:
        raise AssertionError


@pytest.mark.parametrize(("device", "expected"), [("cpu", 1), ("cuda:0", 0)])
def test_gpus_per_unit_has_no_effect_on_a_cpu(device: str, expected: int) -> None:
    assert len(Resources(gpus_per_unit=0.5).without_effect(device)) == expected
    assert Resources().without_effect(device) == []


@pytest.mark.parametrize(
    ("name", "expected"), [("sample", 2), ("folder:/data/a", 1), ("a.b:c", 1), ("fashion-mnist", 0), ("stl10", 0)]
)
def test_a_dataset_without_files_is_not_downloaded(name: str, expected: int) -> None:
    assert len(DataSource(root="/data", download=True).without_effect(name)) == expected
    assert DataSource().without_effect(name) == []


def test_a_preset_for_a_gpu_is_reported_on_a_cpu_in_one_line_and_works(tmp_path: Path) -> None:
    experiment = preset("quickstart").override(["engine.capture=true"])
    store, notes = RunStore.create(tmp_path / "run", experiment), Notes()
    resources = Resources(device="cpu", num_cpus=1)
    with Session.opened(store, resources, DataSource(), notes, in_process=True) as session:
        assert session.capacity.device == "cpu"
        assert session.capacity.num_cpus == 1  # asked for twice: reported once
    assert notes.lines == [
        "without effect: engine.capture = True: trainings run on cpu, and only a GPU has CUDA graphs"
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "a", "--set", "model=b"], "--model a and --set model=b both set the field model"),
        (["--data", "a", "--set", 'data.name="b"'], '--data a and --set data.name="b" both set the field data.name'),
        (["--weights", "/a", "--set", "weights=/b"], "--weights /a and --set weights=/b both set the field weights"),
        (
            ["--set", "training.epochs=2", "--set", "seed=1", "--set", "training.epochs = 3"],
            "--set training.epochs=2 and --set training.epochs = 3 both set the field training.epochs",
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "train"])
def test_a_field_that_is_set_twice_is_refused(command: str, words: list[str], told: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    place = ["--out", str(run)] if command == "run" else [str(run)]
    ended = invoke(command, *place, "--preset", "quickstart", *words)
    assert ended.exit_code == 2
    assert ended.stderr.strip().splitlines()[-1] == f"Error: {told}: leave one of them out (see gross {command} --help)"
    assert not run.exists()
