"""One process opens a run once: its base network is read and built for all stages together."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from miniature import do, run_words
from torch import nn

from gross_ray import models
from gross_ray.run import opened
from gross_ray.run.store import RunStore


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often networks are built, and the checkpoints of each stage are read."""
    calls: Counter[str] = Counter()
    build, load = models.build_model, RunStore.load_checkpoint

    def counting_build(*arguments: Any, **named: Any) -> nn.Module:
        calls["build"] += 1
        return build(*arguments, **named)

    def counting_load(store: RunStore, stage: str, unit: str) -> Any:
        calls[stage] += 1
        return load(store, stage, unit)

    for module in (models, opened):
        monkeypatch.setattr(module, "build_model", counting_build)
    monkeypatch.setattr(RunStore, "load_checkpoint", counting_load)
    return calls


def test_a_whole_run_builds_its_base_network_once(run: Path, counted: Counter[str]) -> None:
    for stored in ("checkpoints", "tables"):
        shutil.rmtree(run / stored)
    do(*run_words(run))
    seeds = RunStore.open(run).experiment.training.seeds
    assert counted["build"] == seeds + 1  # each is trained, and one is decomposed by all later stages
    assert counted["train"] == 1
    assert counted["search-plan"] < 16  # after a search stored something, and not once for each of the 16 shards


def test_a_finished_run_is_not_even_opened_for_its_images(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.driver import DataSource

    monkeypatch.setattr(DataSource, "load", lambda *_: pytest.fail("the images are loaded"))
    do(*run_words(run))
