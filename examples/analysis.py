"""Read the tables of a run with pandas and draw three plots: python examples/analysis.py RUN [analysis.html]."""

import sys
from pathlib import Path

import pandas as pd
import plotly.express as px

run, target = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "analysis.html")
configurations = pd.read_parquet(run / "tables" / "configurations")
validations = pd.read_parquet(run / "tables" / "validations")

# One row per configuration: the mean accuracy over the supernets trained with the lowest alpha.
searched = configurations[configurations["alpha"] == configurations["alpha"].min()]
layers = [name for name in searched if name.startswith("layer ")]
space = searched.groupby(["configuration", *layers, "macs"], as_index=False)["val_accuracy"].mean()
space = space.sort_values(["macs", "val_accuracy"], ascending=[True, False])
space["front"] = space["val_accuracy"] > space["val_accuracy"].cummax().shift(fill_value=0)

by_cost = px.scatter(
    space, x="macs", y="val_accuracy", color="front", hover_name="configuration", title="All configurations"
)

by_size = space.melt(["configuration", "val_accuracy"], layers, "layer", "group-size")
by_size = by_size.sort_values("group-size", key=lambda sizes: sizes.mask(sizes == 0, sizes.max() + 1))
by_size["group-size"] = by_size["group-size"].astype(str).replace("0", "d")  # a layer that stays dense is stored as 0
by_layer = px.box(
    by_size,
    x="layer",
    y="val_accuracy",
    color="group-size",
    title="What a layer's group-size does to the accuracy",
)

own = validations.groupby(["configuration", "kind"], as_index=False)[["val_accuracy", "test_accuracy"]].mean()
both = own.merge(space[["configuration", "val_accuracy"]], on="configuration", suffixes=(" on its own", " in supernet"))
agreement = px.scatter(
    both,
    x="val_accuracy in supernet",
    y="val_accuracy on its own",
    color="kind",
    hover_name="configuration",
    title=f"In the supernet and on its own: rank correlation "
    f"{both['val_accuracy in supernet'].corr(both['val_accuracy on its own'], method='spearman'):.2f}",
)

figures = (by_cost, by_layer, agreement)
parts = [figure.to_html(full_html=False, include_plotlyjs=figure is by_cost) for figure in figures]
target.write_text("<!doctype html><meta charset=utf-8><title>Analysis</title>" + "".join(parts), encoding="utf-8")
print(space[space["front"]].to_string(index=False))
