"""Measured latency as tables and sentences: where, how well it is predicted, and which group-sizes do not pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gross_ray.report.results import ResultTable, where
from gross_ray.run.latencies import unit_in_force
from gross_ray.run.store import RunStore
from gross_ray.search.latency import LatencyModel, dominated
from gross_ray.search.options import RUNTIMES
from gross_ray.space import DENSE, Configuration, ordered


def latency_table(store: RunStore) -> ResultTable:
    """Return a table of the stored measurements; the one that predicts latency_ms is marked."""
    in_force = unit_in_force(store)
    rows = []
    for unit in store.units("runtime_latencies"):
        (row,) = store.read_units("runtime_latencies", [unit]).to_dict("records")
        error, noise = (f"{100 * row[name]:.1f} %" for name in ("median_error", "noise"))
        rows.append(
            [
                f"{RUNTIMES[row['runtime']]} {row['version']}",
                row["device"],
                row["host"],
                str(row["batch_size"]),
                str(row["threads"]),
                f"{row['full_ms']:.3g}",
                f"{error} ({row['num_sampled']})",
                noise,
                "yes" if unit == in_force else "",
            ]
        )
    heads = ["runtime", "device", "host", "batch", "threads", "full network, ms"]
    heads += ["median error of predictions (networks timed)", "noise of a timing", "predicts latency_ms"]
    return ResultTable("Measured latency", heads, rows)


def extremes_table(model: LatencyModel, group_sizes: Mapping[str, Sequence[int]]) -> ResultTable:
    """Return the fastest, the slowest and the full network's time; `group_sizes` are the space's."""
    by_layer = model.costs.by_layer
    picked = {
        what: Configuration(
            [pick(ordered(sizes), key=by_layer[layer].__getitem__) for layer, sizes in group_sizes.items()]
        )
        for what, pick in (("fastest", min), ("slowest", max))
    }
    rows = [[what, str(one), *_time(model, model.predict(one)), _folded(model, one)] for what, one in picked.items()]
    rows.append(["full network", "", *_time(model, model.full_ms), ""])
    title = f"Time of a batch of {model.batch_size} in {where(model)}, each layer in its faster form"
    return ResultTable(title, ["", "configuration", "ms", "of the full network", "layers run dense"], rows)


def _time(model: LatencyModel, ms: float) -> list[str]:
    return [f"{ms:.3g}", f"{100 * ms / model.full_ms:.0f} %"]


def _folded(model: LatencyModel, configuration: Configuration) -> str:
    layers = list(model.added_ms)
    dense = model.faster_forms(configuration).count(DENSE)
    return f"{dense} of {len(layers)}"


def dominated_sentences(model: LatencyModel) -> list[str]:
    """Return a sentence for each group-size that a larger one, or the dense layer, beats in a layer or more."""
    return [
        f"in {where(model)}, group-size {size} costs more than "
        f"{'the dense layer' if other == DENSE else other} in {beaten} of {layers} layers"
        for size, (other, beaten, layers) in dominated(model).items()
    ]
