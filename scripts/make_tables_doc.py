"""Write docs/tables.md from the schemas in gross_ray/run/tables.py."""

from pathlib import Path

from gross_ray.run.tables import SCHEMA_VERSION, TABLES, VERSION_KEY

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tables.md"

_QUERIES = {
    "One row a configuration, from the supernets of one alpha (the table also has the sweep's supernets):": """
import pandas as pd

from gross_ray import read_table

run = "runs/quickstart"
configurations = read_table(run, "configurations").query("alpha == 0")
layers = [name for name in configurations if name.startswith("layer ")]
key = ["configuration", *layers, "macs", "parameters"]
space = configurations.groupby(key, as_index=False)["val_accuracy"].median()
""",
    "1. The best configurations within a budget that also keep a layer's group-size small:": """
small = space.query("1 <= `layer conv4` <= 16 and macs <= 2.66e6").nlargest(5, "val_accuracy")
""",
    "2. The best configuration in each bracket of MACs:": """
brackets = pd.cut(space["macs"] / 1e6, [0, 2, 2.5, 3, 4, 6])
best = space.loc[space.groupby(brackets, observed=True)["val_accuracy"].idxmax()]
""",
    "3. How accurate each group-size of a layer is, over all choices for the other layers:": """
fares = space.groupby("layer conv4")["val_accuracy"].agg(["mean", "max", "count"])
""",
    "4. Whether supernets of different seeds rank the configurations alike, and which they disagree on most:": """
by_seed = configurations.pivot(index="configuration", columns="seed", values="val_accuracy")
agreement = by_seed.corr(method="spearman")
disputed = (by_seed.max(axis="columns") - by_seed.min(axis="columns")).nlargest(5)
""",
    "5. The accuracy of validated configurations when trained on their own, and in the supernet:": """
own = read_table(run, "validations").groupby(["configuration", "kind"], as_index=False)["val_accuracy"].mean()
joined = own.merge(space, on="configuration", suffixes=("_own", "_supernet"))
joined["gain"] = joined["val_accuracy_own"] - joined["val_accuracy_supernet"]
""",
    "6. The Pareto front of MACs and accuracy:": """
ordered = space.sort_values(["macs", "val_accuracy"], ascending=[True, False])
front = ordered[ordered["val_accuracy"] > ordered["val_accuracy"].cummax().shift(fill_value=-1)]
""",
}
"""Questions that the tables answer, each with its code, which continues the first one."""


def describe() -> str:
    """Return docs/tables.md: every table and column, and example queries."""
    lines = [
        "# Tables",
        "",
        "Made from `gross_ray/run/tables.py` by `python scripts/make_tables_doc.py`: do not edit it here.",
        "",
        "Each table is a folder of Parquet files, one for each completed unit of work:",
        '`pandas.read_parquet("RUN/tables/NAME")` reads all of them, and `gross_ray.read_table("RUN", "NAME")` does so',
        f"in the order of the units. Each file carries the schema version ({SCHEMA_VERSION}) in its metadata under",
        f"`{VERSION_KEY.decode()}`. A column's name never changes its meaning.",
    ]
    for each in TABLES.values():
        lines += ["", f"## {each.name}", "", each.meaning, ""]
        lines += ["| column | type | unit | range | meaning |", "|---|---|---|---|---|"]
        for column in each.columns:
            kind = str(column.type).replace("double", "float64") + ", may be missing" * column.nullable
            meaning = column.meaning.replace("|", "\\|")
            lines.append(f"| `{column.name}` | {kind} | {column.unit} | {column.range_text()} | {meaning} |")
    lines += [
        "",
        "## Queries",
        "",
        "`gross search RUN --budget macs=2.66M` answers the most common question; pandas answers the others.",
    ]
    for question, code in _QUERIES.items():
        lines += ["", question, "", f"```python{code}```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(describe(), encoding="utf-8")
    print(f"wrote {PAGE}")
