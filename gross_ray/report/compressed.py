"""The results of `gross compress`: its plan before, and the full network beside the candidates after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from gross_ray.data.image_set import Splits
from gross_ray.errors import MissingStageError
from gross_ray.experiment import Experiment
from gross_ray.report.results import ResultTable, candidates, latency_sentences, millions, near_candidates
from gross_ray.report.searched import Searched
from gross_ray.run.limits import full_costs
from gross_ray.run.pins import stored_data
from gross_ray.run.store import RunStore
from gross_ray.space import SearchSpace, listed
from gross_ray.training.options import CROP, NONE, RESIZED_CROP, Schedule

_AUGMENTED = {NONE: "no augmentation", CROP: "crops and flips", RESIZED_CROP: "resized crops and flips"}
_WRITTEN = "written"


def plan_lines(experiment: Experiment, space: SearchSpace, splits: Splits) -> list[str]:
    """Return the choices of an experiment as lines: data, layers and space, trainings, search."""
    data, search, validation = experiment.data, experiment.search, experiment.validation
    counts = ", ".join(f"{len(getattr(splits, name)):,} {name}" for name in ("train", "validation", "test"))
    lines = [f"images: {data.name}: {counts}; {len(splits.classes)} classes, {_shape(splits)}"]
    if experiment.weights:
        then = f"trained on for {experiment.training.epochs} epochs" if experiment.trains_base else "as they are"
        lines.append(f"network: {experiment.model}, weights {experiment.weights}, {then}")
    else:
        lines.append(f"network: {experiment.model}, trained for {_of(experiment.training)}: no weights are given")
    choices: dict[tuple[int, ...], int] = {}
    for sizes in space.group_sizes.values():
        choices[tuple(sizes)] = choices.get(tuple(sizes), 0) + 1
    each = "; ".join(f"{count} layers at {listed(sizes)}" for sizes, count in choices.items())
    lines.append(f"choices: {each}: {space.size:,} configurations")
    lines.append(f"supernet: reconstruction {_of(experiment.reconstruction)}, fine-tuning {_of(experiment.finetuning)}")
    how = "all configurations" if search.strategy == "exhaustive" else f"{search.evaluations} by {search.strategy}"
    lines.append(f"search: {how}, within {' and '.join(search.limits)}")
    lines.append(
        f"at the end: the best {search.top} on their own, reconstruction {_of(validation.reconstruction)}, "
        f"fine-tuning {_of(validation.finetuning)}"
    )
    return lines


def _of(schedule: Schedule) -> str:
    rate = f"learning rate {schedule.lr:g}" if schedule.lr else "learning rate found by a range test"
    images = f" of {schedule.images:,} images" if schedule.images else ""
    epochs = f"{schedule.epochs} epoch{'s' * (schedule.epochs > 1)}"
    return f"{epochs}{images} in batches of {schedule.batch_size} ({rate}, {_AUGMENTED[schedule.augment]})"


def _shape(splits: Splits) -> str:
    return "x".join(map(str, splits.train.images.shape[1:]))


def estimate_table(seconds: Mapping[str, float]) -> ResultTable:
    """Return how long each part of a compression will take, and all of it together."""
    whole = sum(seconds.values())
    rows = [[name, _time(each), f"{100 * each / whole:.0f} %"] for name, each in seconds.items()]
    notes = ["each part was tried in small on this machine, under its present load, and scaled to the whole"]
    return ResultTable(f"Expected time: {_time(whole)}", ["part", "time", "share"], rows, notes)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def best_candidate(store: RunStore, searched: Searched) -> str:
    """Return the configuration that is most accurate on its own, on the validation split, of those within all limits.

    Raises MissingStageError if none is trained on its own.
    """
    trained = _candidates(store, searched)
    if trained.empty:
        raise MissingStageError(f"no configuration within the limits is trained in {store.storage}: run `gross run`")
    means = trained.groupby("configuration", sort=False)["val_accuracy"].mean()
    return str(means.idxmax())


def trained_candidates(store: RunStore, searched: Searched) -> list[str]:
    """Return the configurations within the limits that are trained on their own."""
    return list(dict.fromkeys(_candidates(store, searched)["configuration"]))


def _candidates(store: RunStore, searched: Searched) -> pd.DataFrame:
    """Return the rows of `validations` of the best configurations within the limits."""
    names = candidates(store, searched)
    validations = store.read_table("validations")
    return validations[validations["configuration"].isin(names)]


def compressed_table(
    store: RunStore, searched: Searched, costs: Mapping[str, Mapping[str, float]], written: str, file: str
) -> ResultTable:
    """Return the full network and each candidate: accuracy with its standard error, costs, and which was written.

    `costs` are those of each candidate in the form that is written to the file: macs, parameters and latency_ms.
    """
    trained = _candidates(store, searched)
    images = stored_data(store)
    count = None if images is None else images.test.count
    full = store.read_table("networks").iloc[0]
    whole = full_costs(store, ["macs", "parameters", "latency_ms"])
    rows = [["full network", *_accuracy([full["test_accuracy"]], count), *_costs(whole), ""]]
    order = trained.groupby("configuration")["val_accuracy"].mean().sort_values(ascending=False, kind="stable").index
    for name in order:
        group = trained[trained["configuration"] == name]
        mark = _WRITTEN if name == written else ""
        rows.append([str(name), *_accuracy(group["test_accuracy"].tolist(), count), *_costs(costs[str(name)]), mark])
    heads = ["network", "accuracy, % (test)", "standard error", "M MACs", "parameters", "ms", ""]
    notes = [f"{_WRITTEN}: {file}; costs are those of each network in the form that is written"]
    notes += [*near_candidates(store, searched), *latency_sentences(store)]
    return ResultTable("The full network and the candidates", heads, rows, notes)


def _accuracy(accuracies: Sequence[float], count: int | None) -> list[str]:
    """Return the mean accuracy in percent, and the standard error that the number of test images alone causes."""
    mean = sum(accuracies) / len(accuracies)
    error = "-" if count is None else f"{100 * math.sqrt(mean * (1 - mean) / count):.2f}"
    return [f"{100 * mean:.2f}", error]


def _costs(costs: Mapping[str, float]) -> list[str]:
    return [millions(costs["macs"]), f"{int(costs['parameters']):,}", f"{costs['latency_ms']:.3g}"]
