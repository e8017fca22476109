"""Stage `sweep-alpha`: supernets over sampling temperatures, against the fixed configurations (section 5.2, Figure 1).

One trial of Ray Tune a supernet; the evaluation of the whole space in each runs in shards, like the search.
"""

from __future__ import annotations

from gross_ray.results.store import RunStore
from pipelines import search, supernet, validate
from pipelines.session import Session
from pipelines.tuning import Tuning
from pipelines.units import Context, Unit

STAGE = "sweep-alpha"


def plan(store: RunStore) -> list[Unit]:
    """Return one unit for each alpha, scaling and seed; the supernets of the main stages are among them if they fit."""
    options = store.experiment.sweep
    units = [
        supernet.supernet_unit(alpha, scaling, seed)
        for alpha in options.alphas
        for scaling in options.scalings
        for seed in range(options.seeds)
    ]
    return list({unit.name: unit for unit in units}.values())


def finished(store: RunStore) -> set[str]:
    """Return the supernets that are compared with the fixed configurations already."""
    return store.finished_units("alpha_sweep")


def run(session: Session) -> None:
    """Train and evaluate the supernets that are missing, and compare them; the fixed configurations come first."""
    store, units = session.store, plan(session.store)
    if not units:
        session.reporter.note(f"{STAGE}: the experiment sweeps over nothing (sweep.alphas and sweep.scalings)")
        return
    if not {unit.name for unit in units} <= supernet.finished(store, supernet.RECONSTRUCT):
        supernet.require_decompositions(store)
    validate.run_fixed(session)
    session.run(STAGE, units, work, lambda: supernet.finished(store, supernet.FINETUNE), tuning=Tuning())
    search.evaluate(session, f"{STAGE} search", units)
    compare(store)


def work(context: Context, unit: Unit) -> str:
    """Reconstruct and fine-tune one supernet, from wherever it stands."""
    if unit.name not in supernet.finished(context.store, supernet.RECONSTRUCT):
        supernet.reconstruct_work(context, unit, share=(0.0, 0.2))
    return supernet.finetune_work(context, unit, share=(0.2, 0.99))


def compare(store: RunStore) -> None:
    """Store the difference of each supernet to the fixed configurations trained on their own (validation split)."""
    compared = finished(store)
    missing = [unit for unit in plan(store) if unit.name not in compared]
    if not missing:
        return
    validations = store.read_table("validations")
    fixed = validations[validations["kind"] == "fixed"].groupby("configuration")["val_accuracy"].mean()
    for unit in missing:
        shards = [shard.name for shard in search.shards(store, [unit])]
        rows = store.read_units("configurations", shards, ["configuration", "val_accuracy"])
        ours = rows.set_index("configuration")["val_accuracy"]
        table = [
            {
                **unit.arguments,
                "configuration": configuration,
                "supernet_accuracy": float(ours[configuration]),
                "fixed_accuracy": float(accuracy),
                "difference": float(ours[configuration] - accuracy),
            }
            for configuration, accuracy in fixed.items()
        ]
        store.write_table("alpha_sweep", unit.name, table)
