r"""Keep the tables of a finished run under results/, and write what README.md shows of them.

    python scripts/results.py keep RUN NAME --command "gross run ..." --machine "2 cores of ..." \
        --time "1 h 10 min" --commit 0fa06ed
    python scripts/results.py write

`keep` takes each table as one Parquet file (`configurations`: one a supernet), and the hashes of the run's images and
weights, without checkpoints: results/NAME is a run folder, which `gross report` and `gross show` take. `write` draws
the figures of each (in Chromium, by playwright), writes results/NAME/README.md, and the parts of README.md between
their marks.
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
"""The run that README.md shows whole."""
SEARCHED, DRAWN = "vgg16-short", "vgg16-short-random"
"""The runs whose searches README.md compares: by a strategy, and drawn at random."""
END = "<!-- /results -->"
WIDTH, HEIGHT, SCALE = 800, 420, 2
"""Of a figure, in pixels, and how many of the file's pixels make one."""


@click.group()
def main() -> None:
    """Keep results, and write the pages that show them."""


@main.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("name")
@click.option("--command", required=True, help="What made the run.")
@click.option("--machine", required=True, help="What it ran on.")
@click.option("--time", required=True, help="How long it took.")
@click.option("--commit", required=True, help="The commit that it ran from.")
def keep(run: Path, name: str, **about: str) -> None:
    """Put the tables of RUN into results/NAME, in place of what is there."""
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
    """Return the files that keep a table, each with its units: one of all, or of configurations one for each supernet.

    Whatever reads the evaluated configurations takes a file for one supernet's.
    """
    units = store.units(table)
    if not units or table != "configurations":
        return {"all": units} if units else {}
    supernets = evaluated_units(store).groupby(["alpha", "scaling", "seed"], sort=False)["unit"]
    return {supernet_of(*supernet).name: of_it.tolist() for supernet, of_it in supernets}


@main.command()
def write() -> None:
    """Draw the figures, and write the README of each results/NAME and the part of README.md."""
    for folder in sorted(path.parent for path in RESULTS.glob("*/about.json")):
        store = RunStore.open(folder)
        draw(charts(store), folder)
        (folder / "README.md").write_text(page(store), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_blocks(readme.read_text(encoding="utf-8")), encoding="utf-8")


def charts(store: RunStore) -> dict[str, Chart]:
    """Return the figures by the name of their file."""
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
                "The tables of that run, without its checkpoints; docs/tables.md has their columns. "
                f"`gross report results/{store.path.name}` makes the whole page of them, "
                f"`gross show results/{store.path.name} selections` prints one.",
                terminal.results(store, markdown=True),
                figures(store, ""),
                "Written by `python scripts/results.py write`.",
            ]
        )
        + "\n"
    )


def with_blocks(readme: str) -> str:
    """Return README.md with its parts written anew."""
    for name, block in ((SHOWN, shown_block), (SEARCHED, compared_block)):
        start = f"<!-- results/{name}: python scripts/results.py write -->"
        before, _, rest = readme.partition(start)
        _, found, after = rest.partition(END)
        if not found:
            raise SystemExit(f"README.md lacks the marks {start} and {END}")
        readme = f"{before}{start}\n\n{block()}\n\n{END}{after}"
    return readme


def shown_block() -> str:
    """Return what README.md shows of results/SHOWN."""
    store = RunStore.open(RESULTS / SHOWN)
    tables = [
        terminal.as_text(table, markdown=True)
        for table in (results.network_table(store), results.selection_table(store), results.sweep_table(store))
    ]
    return "\n\n".join([*tables, figures(store, f"results/{SHOWN}/"), made(store)])


def compared_block() -> str:
    """Return the uniform configurations and the best of both searches in one table, and how they were made."""
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
    """Return the rows of Table 3 by budget, the fixed configuration's first."""
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
    """Return the figures in Markdown, their summaries as text alternatives."""
    return "\n\n".join(f"![{chart.summary}]({folder}{name}.png)" for name, chart in charts(store).items())


def draw(found: Mapping[str, Chart], folder: Path) -> None:
    """Write each figure as a PNG, on white."""
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
