"""Measured latency as tables and sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import new_run

from gross_ray.report.latency import dominated_sentences, extremes_table, latency_table
from gross_ray.report.results import latency_sentences
from gross_ray.run.latencies import put_in_force, unit_in_force
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel
from gross_ray.space import DENSE


def a_model(**changed: Any) -> LatencyModel:
    about: dict[str, Any] = {
        "runtime": "openvino",
        "version": "2026.4.1",
        "device": "Xeon",
        "host": "here",
        "batch_size": 8,
        "threads": 1,
        "full_ms": 3.9,
        "added_ms": {"a": {1: -2.0, 4: 0.5, DENSE: 0.0}, "b": {1: -1.5, 4: 0.25, DENSE: 0.0}},
        "num_sampled": 20,
        "median_error": 0.034,
        "noise": 0.002,
    }
    return LatencyModel(**about | changed)


def stored(store: RunStore, unit: str, model: LatencyModel) -> None:
    store.write_table("layer_latencies", unit, model.rows())
    store.write_table("runtime_latencies", unit, [model.summary()])


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return new_run(tmp_path / "run")


def test_every_measurement_is_listed_and_the_one_that_counts_is_marked(store: RunStore) -> None:
    assert latency_sentences(store) == [] and unit_in_force(store) is None
    stored(store, "one", a_model())
    stored(store, "two", a_model(runtime="torch", version="2.15", threads=2, median_error=0.1))
    assert unit_in_force(store) is None, "nothing says which was last"
    put_in_force(store, "one")
    table = latency_table(store)
    assert table.heads[:6] == ["runtime", "device", "host", "batch", "threads", "full network, ms"]
    assert table.rows == [
        ["OpenVINO 2026.4.1", "Xeon", "here", "8", "1", "3.9", "3.4 % (20)", "0.2 %", "yes"],
        ["torch 2.15", "Xeon", "here", "8", "2", "3.9", "10.0 % (20)", "0.2 %", ""],
    ]
    (sentence,) = latency_sentences(store)
    assert sentence == (
        "ms: one batch of 8 in OpenVINO 2026.4.1 on Xeon, 1 thread, each layer in its faster form; the full network "
        "takes 3.9 ms; the median error of the predictions is 3.4 %, over 20 networks timed whole"
    )


def test_the_extremes_are_of_the_space_and_in_the_faster_forms() -> None:
    table = extremes_table(a_model(), {"a": (1, 4), "b": (4, DENSE)})
    assert table.rows == [
        ["fastest", "1-4", "1.9", "49 %", "1 of 2"],
        ["slowest", "4-4", "3.9", "100 %", "2 of 2"],
        ["full network", "", "3.9", "100 %", ""],
    ]
    assert "8 in OpenVINO 2026.4.1 on Xeon, 1 thread" in table.title


def test_a_group_size_that_does_not_pay_is_told() -> None:
    assert dominated_sentences(a_model()) == [
        "in OpenVINO 2026.4.1 on Xeon, 1 thread, group-size 4 costs more than the dense layer in 2 of 2 layers"
    ]
    assert dominated_sentences(a_model(added_ms={"a": {1: -2.0, 4: -1.0, DENSE: 0.0}})) == []
