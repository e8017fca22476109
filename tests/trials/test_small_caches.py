"""Where one image needs more memory than the automatic budget of the search, images are evaluated one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from cli import main
from gross_ray.errors import InvalidValueError
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search import evaluator
from gross_ray.search.evaluator import evaluate_configurations
from pipelines.stages import search


class Branching(nn.Module):
    """A network that torch.fx cannot trace."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features if features.sum() > -1e9 else -features


@pytest.mark.filterwarnings("ignore::gross_ray.search.traceability.NotTraceableWarning")
@pytest.mark.parametrize("body", [nn.Identity(), Branching()])
def test_an_automatic_budget_fits_one_image(
    body: nn.Module, monkeypatch: pytest.MonkeyPatch, random_supernet: Callable[..., nn.Module]
) -> None:
    convolutions = (nn.Conv2d(3, 4, 3), body, nn.Conv2d(4, 4, 3))
    network = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    supernet = random_supernet(network, {"2": (1, 4)}).double()
    images = torch.randn(5, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5) % 3
    expected = evaluate_configurations(supernet, images, labels, form="dense")
    monkeypatch.setattr(evaluator, "default_memory_budget", lambda _: 1)
    found = evaluate_configurations(supernet, images, labels, form="dense")
    pd.testing.assert_frame_equal(found, expected)
    with pytest.raises(InvalidValueError, match="memory_budget = 1 bytes: 1 image need"):
        evaluate_configurations(supernet, images, labels, form="dense", memory_budget=1)


def test_a_run_on_a_machine_with_a_small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "default_memory_budget", lambda _: 2)
    monkeypatch.setattr(search, "LEAST_BUDGET", 1)
    settings = ["data.limit_train=20", "data.limit_validation=20", "data.limit_test=20", "training.epochs=1"]
    settings += ["training.milestones=[]", "training.seeds=1", "supernet.seeds=1", "sweep.alphas=[]"]
    settings += ["reconstruction.epochs=1", "finetuning.epochs=1", "decomposition.max_steps=1", "search.form=dense"]
    settings += ["decomposition.group_sizes=[4,16]", "search.budgets=[16]"]
    words = [word for setting in settings for word in ("--set", setting)]
    place = [str(tmp_path / "run"), "--in-process", "--num-cpus", "1"]
    commands = [["train", *place, "--preset", "quickstart", *words]]
    commands += [[stage, *place] for stage in ("decompose", "reconstruct", "finetune", "search")]
    for command in commands:
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.stderr
    run = Run(RunStore.open(tmp_path / "run"))
    assert search.load_plan(run).memory_budget > 2
    assert len(run.store.read_table("configurations")) == run.space.size
