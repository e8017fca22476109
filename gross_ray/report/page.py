"""The page of results: one self-contained HTML file, built from the stored tables alone."""

from __future__ import annotations

import importlib.util
import json
import re
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gross_ray.errors import GrossRayError, InvalidValueError
from gross_ray.report.searched import Searched
from gross_ray.run.store import RunStore
from gross_ray.storage import Storage

if TYPE_CHECKING:
    from markupsafe import Markup

    from gross_ray.report.sections import Section


def check_target(target: Path | None) -> None:
    """Raise InvalidValueError if `target` is in a folder that does not exist."""
    if target is not None and not target.absolute().parent.is_dir():
        raise InvalidValueError(f"--to {target}: there is no folder {target.parent}; make it, or name another file")


def write_page(store: RunStore, target: Path | None = None, searched: Searched | None = None) -> str:
    """Write the page of a run to `target`, by default into the run folder, and return its address.

    `searched` is read from the run folder if it is not passed. The file is written atomically. Raises
    InvalidValueError if the folder of `target` does not exist, StorageError if the page cannot be written, and
    GrossRayError if plotly or jinja2 is not installed.
    """
    check_target(target)
    page = html_page(store, searched)
    if target is None:
        return store.write_report(page)
    folder = Storage(target.absolute().parent)
    folder.write(target.name, page.encode())
    return str(target)


def html_page(store: RunStore, searched: Searched | None = None) -> str:
    """Return the page: it loads nothing from the network, and says which results are missing.

    Raises GrossRayError if plotly or jinja2 is not installed.
    """
    for package in ("plotly", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise GrossRayError(
                f"the HTML page needs {package}: pip install {package}; --markdown prints the tables without it"
            )
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    from gross_ray.report.page_strips import Strips
    from gross_ray.report.sections import sections

    templates = files("gross_ray.report") / "templates"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": _prose, "breakable": _breakable}
    searched = searched or Searched.of(store)
    parts = sections(store, searched)
    tables = [table for part in parts for table in part.all_tables]
    return environment.from_string((templates / "page.html").read_text(encoding="utf-8")).render(
        experiment=store.experiment,
        folder=str(store.storage),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        sections=parts,
        strips=Strips.of(store, searched, tables),
        charts=Markup(_json(parts)),
        style=Markup((templates / "page.css").read_text(encoding="utf-8")),
        script=Markup((templates / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )


def _json(parts: list[Section]) -> str:
    """Return the figures as JSON that is safe in a script element, whatever names it contains."""
    from plotly.utils import PlotlyJSONEncoder

    figures: dict[str, Any] = {
        chart.name: {
            "versions": {name: figure.to_plotly_json() for name, figure in chart.versions.items()},
            "budgets": chart.budgets,
        }
        for part in parts
        for chart in part.charts
    }
    text = json.dumps(figures, cls=PlotlyJSONEncoder, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _breakable(text: str) -> Markup:
    """Return text that may be broken after its dashes, because configurations of many layers are long."""
    from markupsafe import Markup, escape

    return Markup(str(escape(text)).replace("-", "-<wbr>"))


def _prose(text: str) -> Markup:
    """Return text in which `commands` are set as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
