"""The model card beside an exported network's file: what a user needs to know of it, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import nn

from gross_ray.run.pins import fingerprint, stored_data
from gross_ray.run.store import RunStore
from gross_ray.search.cost import count_macs, count_parameters, peak_activations
from gross_ray.search.folding import Folding
from gross_ray.search.latency import CONDITIONS, LatencyModel, Timing
from gross_ray.space import Configuration


def model_card(
    store: RunStore,
    configuration: str,
    seed: int,
    network: nn.Module,
    input_shape: Sequence[int],
    classes: Sequence[str],
    *,
    layers: Sequence[str],
    preparation: str = "",
    latency: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the card of a validated configuration: accuracies, costs, expected input, and origin.

    Costs are those of `network`, the exported form of the configuration, for an input of `input_shape` (C, H, W).
    `layers` names the decomposed layers in order; `preparation` says how images are resized; `latency` is a
    `predicted_entry` or a `timed_entry`.
    """
    repeats = store.read_table("validations").query("configuration == @configuration")
    row = repeats.query("seed == @seed").iloc[0]
    sizes = Configuration.parse(configuration)
    starts = store.read_table("runs", ["gross_ray", "python", "torch", "torchvision", "ray"]).to_dict("records")
    data, images = store.experiment.data, stored_data(store)
    return {
        "configuration": configuration,
        "layers": {layer: size or "dense" for layer, size in zip(layers, sizes, strict=True)},
        "accuracy": {
            "validation": float(row["val_accuracy"]),
            "test": float(row["test_accuracy"]),
            "test of all repeats": _spread(repeats["test_accuracy"]),
        },
        "macs": count_macs(network, input_shape),
        "parameters": count_parameters(network),
        "activations": peak_activations(network, input_shape),
        **(latency or {"latency_ms": None, "latency of": None}),
        "input": {
            **({"each image": preparation} if preparation else {}),
            "shape": ["N", *input_shape],
            "dtype": "float32",
            "from pixels 0 to 255": f"(x / 255 - {_text(data.mean)}) / {_text(data.std)}",
            **({"of colours": "x = 0.299 red + 0.587 green + 0.114 blue"} if data.channels == 1 else {}),
        },
        "classes": list(classes),
        "dataset": data.name,
        "dataset hash": None if images is None else images.hash,
        "seed": seed,
        "experiment": store.experiment.fields(),
        "fingerprint": fingerprint(store),
        "versions": starts[-1] if starts else None,
    }


def foldings_text(objective: str, foldings: Sequence[Folding]) -> str:
    """Return one line for each layer: its cost in both forms, and the form in which it is written."""
    if not foldings:
        return "no layer is decomposed: nothing to fold"
    return "\n".join(
        f"{layer.layer} (group-size {layer.group_size}): {objective} {layer.bottleneck:.6g} as a bottleneck, "
        f"{layer.dense:.6g} dense: {'folded' if layer.folded else 'kept'}"
        for layer in foldings
    )


def most_accurate_seed(store: RunStore, configuration: str) -> int | None:
    """Return the seed that is most accurate on the validation split; None if the configuration is not validated."""
    repeats = store.read_table("validations").query("configuration == @configuration")
    if repeats.empty:
        return None
    return int(repeats.sort_values(["val_accuracy", "seed"], ascending=[False, True])["seed"].iloc[0])


def predicted_entry(model: LatencyModel, forms: Mapping[str, int]) -> dict[str, Any]:
    """Return the predicted time of a batch of a network whose layers have these forms, and how it was measured."""
    about = {"timed": "predicted", "median_error": model.median_error, "full network, ms": model.full_ms}
    return {"latency_ms": model.predict_forms(forms), "latency of": _conditions(model) | about}


def timed_entry(timing: Timing, what: str, full_ms: float) -> dict[str, Any]:
    """Return the time of a batch, and how it was measured; `what` is the file or the network."""
    return {
        "latency_ms": timing.latency_ms,
        "latency of": _conditions(timing) | {"timed": what, "full network, ms": full_ms},
    }


def _conditions(latency: LatencyModel | Timing) -> dict[str, Any]:
    return {name: getattr(latency, name) for name in CONDITIONS}


def _text(values: Sequence[float]) -> str:
    """Return one number for all channels, or a list with one number for each channel."""
    return str(values[0] if len(values) == 1 else list(values))


def _spread(accuracies: pd.Series) -> dict[str, float | int | None]:
    std = None if len(accuracies) < 2 else float(accuracies.std())
    return {"mean": float(accuracies.mean()), "std": std, "n": len(accuracies)}
