"""A whole run on images of another size than theirs, with a margin for the crops."""

from __future__ import annotations

import json
from pathlib import Path

from miniature import do, invoke, run_words, tables

from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore

PREPARATION = (
    "resized (bilinear, antialiased) until it just covers 28x28 pixels (height x width); then its centre of 24x24"
)
SETTINGS = [
    "data.image_size=24",
    "data.resize=28",
    "training.augment=crop",
    "finetuning.augment=resized-crop",
    "search.budgets=[4]",
    "sweep.alphas=[]",
    "validation.fixed=[4]",
]


def test_images_are_resized_cropped_and_described(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = do(*run_words(run, *(word for setting in SETTINGS for word in ("--set", setting))))
    assert (
        "resized 320 images to 28x28 pixels, of which networks take 24x24; 320 of them were smaller" not in ended.stderr
    )
    assert "resized 320 images to 28x28 pixels, of which networks take 24x24" in ended.stderr
    base = Run(RunStore.open(run)).base
    assert (base.input_shape, base.preparation) == ((3, 24, 24), PREPARATION)
    assert "4-4-4" in set(tables(run)["validations"]["configuration"])
    ended = invoke("export", run, "--configuration", "4-4-4", "--to", tmp_path / "a.onnx", "--check")
    assert ended.exit_code == 0, ended.stderr
    card = json.loads((tmp_path / "a.onnx.json").read_text())
    assert card["input"]["each image"] == PREPARATION
    assert card["input"]["shape"] == ["N", 3, 24, 24]
