r"""Store the tables of a finished run under results/, and write the pages and the parts of README.md that show them.

    python scripts/results.py keep RUN NAME --command "gross run ..." --machine "2 cores of ..." \
        --time "1 h 10 min" --commit 0fa06ed
    python scripts/results.py write

`keep` stores each table as one Parquet file (`configurations`: one file for each supernet), and the hashes of the run's
images and weights, but no checkpoints. results/NAME is then a run folder, which `gross report` and `gross show` accept.
`write` draws the figures of each results/NAME (in Chromium, by playwright), and writes results/NAME/README.md and the
parts of README.md between the marks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import pyarrow.parquet as pq

from gross_ray.report import results, terminal
from gross_ray.report.charts import Chart
from gross_ray.report.searched import Searched
from gross_ray.report.space_chart import space_chart
from gross_ray.report.sweep_charts import sweep_charts
from gross_ray.run.searched import evaluated_units
from gross_ray.run.store import RunStore
from gross_ray.run.tables import TABLES
from pipelines.stages.supernets import supernet_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
SHOWN = "fashion-short"
"""The run whose results README.md shows in full."""
SEARCHED, DRAWN = "vgg16-short", "vgg16-short-random"
"""The runs whose searches README.md compares: one by a strategy, one random."""
END = "<!-- /results -->"
WIDTH, HEIGHT, SCALE = 800, 420, 2
"""Width and height of a figure in CSS pixels, and the device scale factor: the file's pixels for each of them."""


@click.group()
def main() -> None:
    """Store results, and write the pages that show them."""


@main.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("name")
@click.option("--command", required=True, help="The command that made the run.")
@click.option("--machine", required=True, help="The machine that it ran on.")
@click.option("--time", required=True, help="How long it took.")
@click.option("--commit", required=True, help="The commit of gross_ray that it used.")
def keep(run: Path, name: str, **about: str) -> None:
    """Store the tables of RUN in results/NAME, replacing the earlier content."""
    store, folder = RunStore.open(run), RESULTS / name
    if folder.exists():
        shutil.rmtree(folder)
    kept = RunStore.create(folder, store.experiment)
    for table in TABLES:
        for file, units in kept_files(store, table).items():
            files = [run / "tables" / table / f"{unit}.parquet" for unit in units]
            kept.write_arrow(table, file, pq.ParquetDataset(files, partitioning=None).read())
    for pin in ("data", "weights"):
        hashes = store.read_pin(pin, dict)
        if hashes is not None:
            kept.write_pin(pin, hashes)
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*')) / 2**20:.2f} MiB")


def kept_files(store: RunStore, table: str) -> dict[str, list[str]]:
    """Return the units of each file of a stored table: one file of all units; `configurations`: one per supernet.

    The code that reads evaluated configurations expects one supernet in each file.
    """
    units = store.units(table)
    if not units or table != "configurations":
        return {"all": units} if units else {}
    supernets = evaluated_units(store).groupby(["alpha", "scaling", "seed"], sort=False)["unit"]
    return {supernet_of(*supernet).name: of_it.tolist() for supernet, of_it in supernets}


@main.command()
def write() -> None:
    """Draw the figures, and write the README of each results/NAME and the marked parts of README.md."""
    for folder in sorted(path.parent for path in RESULTS.glob("*/about.json")):
        store = RunStore.open(folder)
        draw(charts(store), folder)
        (folder / "README.md").write_text(page(store), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_blocks(readme.read_text(encoding="utf-8")), encoding="utf-8")


def charts(store: RunStore) -> dict[str, Chart]:
    """Return the figures by file name."""
    sweep = store.read_table("alpha_sweep")
    drawn = [space_chart(store, Searched.of(store)), *(sweep_charts(store, sweep) if len(sweep) else [])]
    return {chart.name: chart for chart in drawn}


def page(store: RunStore) -> str:
    """Return the README of one results/NAME."""
    return (
        "\n\n".join(
            [
                f"# {store.path.name}",
                made(store),
                "This folder has the tables of the run, but no checkpoints; docs/tables.md describes the columns. "
                f"`gross report results/{store.path.name}` writes the whole report from them, "
                f"`gross show results/{store.path.name} selections` prints one table.",
                terminal.results(store, markdown=True),
                figures(store, ""),
                "Written by `python scripts/results.py write`.",
            ]
        )
        + "\n"
    )


def with_blocks(readme: str) -> str:
    """Return README.md with its marked parts rewritten."""
    for name, block in ((SHOWN, shown_block), (SEARCHED, compared_block)):
        start = f"<!-- results/{name}: python scripts/results.py write -->"
        before, _, rest = readme.partition(start)
        _, found, after = rest.partition(END)
        if not found:
            raise SystemExit(f"README.md lacks the marks {start} and {END}")
        readme = f"{before}{start}\n\n{block()}\n\n{END}{after}"
    return readme


def shown_block() -> str:
    """Return the part of README.md that shows results/SHOWN."""
    store = RunStore.open(RESULTS / SHOWN)
    tables = [
        terminal.as_text(table, markdown=True)
        for table in (results.network_table(store), results.selection_table(store), results.sweep_table(store))
    ]
    return "\n\n".join([*tables, figures(store, f"results/{SHOWN}/"), made(store)])


def compared_block() -> str:
    """Return one table of the uniform configurations and the best of both searches, and the commands that made them."""
    searched, drawn = RunStore.open(RESULTS / SEARCHED), RunStore.open(RESULTS / DRAWN)
    table = results.selection_table(searched)
    base = results.network_table(searched).rows[0]
    of_full = {"configuration": base[0], "M MACs": base[3], "on its own (test): mean (std, n)": base[2]}
    rows = [["full network", *(of_full.get(head, "-") for head in table.heads)]]
    by_budget = zip(groups(table), groups(results.selection_table(drawn)), strict=True)
    for (fixed, *found), (_, *at_random) in by_budget:
        rows.append(["uniform", *fixed])
        for store, some in ((searched, found), (drawn, at_random)):
            rows += [[store.experiment.search.strategy, *row] for row in some]
    title = f"The best of {searched.experiment.search.evaluations} evaluations each, by budget"
    shown = results.ResultTable(title, ["found by", *table.heads], rows, results.latency_sentences(searched))
    return "\n\n".join([terminal.as_text(shown, markdown=True), made(searched), made(drawn)])


def groups(table: results.ResultTable) -> list[list[Sequence[str]]]:
    """Return the rows of Table 3 by budget, each with the fixed configuration first."""
    found: list[list[Sequence[str]]] = []
    for row in table.rows:
        if row[0].endswith("(fixed)"):
            found.append([])
        found[-1].append(row)
    return found


def made(store: RunStore) -> str:
    """Return the command, machine, time and versions behind the results."""
    about = json.loads((store.path / "about.json").read_text(encoding="utf-8"))
    runs = store.read_table("runs")
    versions = ", ".join(f"{name} {runs[name].iloc[-1]}" for name in ("python", "torch", "torchvision", "ray"))
    day = runs["started"].iloc[0][:10]
    return f"`{about['command']}`: {about['time']} on {about['machine']}, {day}; commit {about['commit']}, {versions}."


def figures(store: RunStore, folder: str) -> str:
    """Return the figures in Markdown, with their summaries as alt texts."""
    return "\n\n".join(f"![{chart.summary}]({folder}{name}.png)" for name, chart in charts(store).items())


def draw(found: Mapping[str, Chart], folder: Path) -> None:
    """Write each figure as a PNG on a white background."""
    from playwright.sync_api import sync_playwright
    from plotly.offline import get_plotlyjs

    chromium = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        drawing = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE)
        for name, chart in found.items():
            figure = next(iter(chart.versions.values()))
            figure.data = [
                trace for trace in figure.data if trace.x is not None and any(x is not None for x in trace.x)
            ]
            figure.update_layout(
                title={"text": chart.title, "font": {"size": 15}, "x": 0.01, "xanchor": "left"},
                showlegend=True,
                legend={"orientation": "h", "y": -0.2},
                font={"family": "Liberation Sans, DejaVu Sans, sans-serif", "size": 12, "color": "#222"},
                paper_bgcolor="white",
                plot_bgcolor="white",
                margin={"l": 8, "r": 16, "t": 40, "b": 8},
            )
            figure.update_xaxes(gridcolor="#e3e3e3", linecolor="#888")
            figure.update_yaxes(gridcolor="#e3e3e3", linecolor="#888", zerolinecolor="#888")
            drawing.set_content(
                f"<body style='margin:0'><div id=chart style='width:{WIDTH}px;height:{HEIGHT}px'></div>"
                f"<script>{get_plotlyjs()}</script></body>"
            )
            drawing.evaluate(
                "([figure]) => Plotly.newPlot('chart', figure.data, figure.layout, {staticPlot: true})",
                [json.loads(figure.to_json())],
            )
            drawing.screenshot(path=folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
