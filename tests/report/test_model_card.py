"""The card of a configuration that was validated, searched or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import finished_run
from torch import nn

from gross_ray.data.identity import identity_of
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.report.model_card import model_card, predicted_entry, timed_entry
from gross_ray.report.sections import sections
from gross_ray.run.pins import pin
from gross_ray.search.latency import LatencyModel, Timing
from gross_ray.space import DENSE, Configuration

LAYERS = ("conv2", "conv3", "conv4")


def test_a_latency_comes_with_its_conditions(tmp_path: Path) -> None:
    store = finished_run(tmp_path / "run")
    name = store.read_table("validations")["configuration"].iloc[0]
    added = {layer: {size: size / 100 - 0.2 for size in (1, 2, 4, 8, 16, 32, 64)} | {DENSE: 0.0} for layer in LAYERS}
    where = {"runtime": "openvino", "version": "3", "device": "a chip", "host": "there", "batch_size": 8, "threads": 2}
    model = LatencyModel(
        **where, full_ms=1.5, added_ms=added, num_sampled=3, median_error=0.01, noise=0.02
    )  # fmt: skip
    for unit in store.units("configurations"):  # validated by name, say, and never searched
        store.delete_unit("configurations", unit)
    network, shape = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, 2)), (3, 3, 3)
    sizes = dict(zip(LAYERS, Configuration.parse(name), strict=True))
    latency = predicted_entry(model, sizes | {"conv2": DENSE})
    card = model_card(store, name, 0, network, shape, ["a"] * 10, layers=LAYERS, latency=latency)
    assert (card["macs"], card["parameters"], card["activations"]) == (2 * 27 + 4, 2 * 27 + 2 + 6, 27 + 2)
    assert card["layers"] == sizes
    assert card["latency_ms"] == pytest.approx(1.5 + sum(sizes[layer] / 100 - 0.2 for layer in LAYERS[1:]))
    predicted = {"timed": "predicted", "median_error": 0.01, "full network, ms": 1.5}
    assert card["latency of"] == where | predicted
    timing = Timing(latency_ms=3.25, **where)
    latency = timed_entry(timing, "file", 4.0)
    timed = model_card(store, name, 0, network, shape, ["a"] * 10, layers=LAYERS, latency=latency)
    assert timed["latency_ms"] == 3.25
    assert timed["latency of"] == where | {"timed": "file", "full network, ms": 4.0}
    without = model_card(store, name, 0, network, shape, ["a"] * 10, layers=LAYERS)
    assert without["latency_ms"] is None and without["latency of"] is None


def test_the_hashes_of_the_images_are_in_the_card_and_on_the_page(tmp_path: Path) -> None:
    store = finished_run(tmp_path / "run")
    name = store.read_table("validations")["configuration"].iloc[0]
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, 2))

    def card() -> dict[str, object]:
        return model_card(store, name, 0, network, (3, 3, 3), ["a"] * 10, layers=LAYERS)

    assert card()["dataset hash"] is None
    sets = [ImageSet(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), torch.zeros(count).long()) for count in (3, 2, 1)]
    splits = Splits("sample", *sets, ("a",))
    pin(store, splits)
    identity = identity_of(splits)
    assert card()["dataset hash"] == identity.hash
    (times,) = [section for section in sections(store) if section.name == "time"]
    (table,) = [table for table in times.tables if table.title.startswith("The images of ")]
    assert table.rows == [
        ["train", "3", identity.train.hash[:12]],
        ["validation", "2", identity.validation.hash[:12]],
        ["test", "1", identity.test.hash[:12]],
    ]


def test_the_card_of_grey_images_says_what_of_their_colours_counts(tmp_path: Path) -> None:
    store = finished_run(tmp_path / "run")
    name = store.read_table("validations")["configuration"].iloc[0]
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))

    def takes() -> dict[str, object]:
        return model_card(store, name, 0, network, (1, 3, 3), ["a"] * 10, layers=LAYERS)["input"]

    assert "of colours" not in takes()
    store.experiment = store.experiment.override(["data.channels=1"])
    assert takes()["of colours"] == "x = 0.299 red + 0.587 green + 0.114 blue"
