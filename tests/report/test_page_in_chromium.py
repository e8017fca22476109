"""The page in headless Chromium, cut off from any network: what a reader points at is what is shown."""

from __future__ import annotations

import math
import re
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from runs import FIXED, SELECTED, finished_run, new_run, write_configurations, write_decompositions

from gross_ray.report.page import write_page
from gross_ray.run.store import RunStore

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
HOSTILE = '</script><b>bold & "quoted"</b><!--'
# A point's place on the screen, by plotly's own axes.
PLACE = """([name, x, y]) => {
  const plot = document.querySelector(`figure[data-chart="${name}"] .plot`), {xaxis, yaxis} = plot._fullLayout;
  plot.scrollIntoView({block: "center"});
  const box = plot.getBoundingClientRect();
  return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)];
}"""
STILL = "() => document.querySelectorAll('.hoverlayer .hovertext').length == 0"
INSIDE = """() => [...document.querySelectorAll(".hoverlayer .hovertext")].every((one) => {
  const label = one.getBoundingClientRect(), plot = one.closest(".plot").getBoundingClientRect();
  return label.left >= plot.left && label.right <= plot.right;
})"""
INSIDE_HEIGHT = """() => [...document.querySelectorAll(".hoverlayer .hovertext")].every((one) => {
  const label = one.getBoundingClientRect(), plot = one.closest(".plot").getBoundingClientRect();
  return label.top >= plot.top && label.bottom <= plot.bottom;
})"""
SET_BUDGETS = """async (budgets) => {
  const figure = document.querySelector("figure[data-chart=space]"), input = figure.querySelector("[data-budget]");
  const answers = [], frame = () => new Promise(requestAnimationFrame);
  for (input.value of budgets) {
    input.dispatchEvent(new Event("input"));
    await frame();
    await frame();
    const shapes = structuredClone(figure.querySelector(".plot").layout.shapes);
    answers.push([figure.querySelector("[data-best]").textContent, shapes]);
  }
  return answers;
}"""
LABELS = "() => [...document.querySelectorAll('.hoverlayer .hovertext')].map((one) => one.textContent)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    store = finished_run(tmp_path_factory.mktemp("chromium") / "run")
    write_page(store)
    return store


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """100,000 configurations of six layers with long names, one of which tries to break out."""
    store = new_run(tmp_path_factory.mktemp("chromium") / "run", ["supernet.seeds=1"])
    layers = {name: (1, 2, 4, 8, 16, 32, 64) for name in (*(f"features.{place}" for place in range(5)), HOSTILE)}
    write_configurations(store, layers, seeds=1, limit=100_000)
    write_decompositions(store, layers)
    write_page(store)
    return store


@contextmanager
def opened(browser: Browser, store: RunStore, width: int = 1280, scheme: Any = "light") -> Iterator[Page]:
    """Open the page without a network; it may ask for nothing and complain of nothing."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, requests, complaints = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    address = (store.path / "report.html").as_uri()
    page.goto(address)
    page.wait_for_selector("html[data-drawn]", state="attached")
    try:
        yield page
        assert requests == [address]
        assert complaints == []
    finally:
        context.close()


def medians(store: RunStore) -> dict[str, tuple[int, float]]:
    """MACs and median accuracy of each configuration that is searched."""
    found: dict[str, tuple[int, list[float]]] = {}
    rows = store.read_table("configurations", ["alpha", "scaling", "configuration", "macs", "val_accuracy"])
    for alpha, scaling, name, macs, accuracy in rows.itertuples(index=False):
        if (alpha, scaling) == (4.0, "normalised"):
            found.setdefault(name, (macs, []))[1].append(accuracy)
    return {name: (macs, statistics.median(all_of_it)) for name, (macs, all_of_it) in found.items()}


def alone(points: dict[str, tuple[float, float]]) -> list[str]:
    """Return some of the points by how far their nearest neighbour is, on a square, the loneliest first."""
    spans = [max(axis) - min(axis) for axis in zip(*points.values(), strict=True)]

    def nearest(name: str) -> float:
        here = points[name]
        return min(
            sum(((a - b) / span) ** 2 for a, b, span in zip(here, there, spans, strict=True))
            for other, there in points.items()
            if other != name
        )

    return sorted(list(points)[:252], key=nearest, reverse=True)


def hovered(page: Page, chart: str, x: float | str, y: float) -> str:
    """Point at a place of a figure and return the text that appears, all of it within the figure."""
    page.mouse.move(2, 2)
    page.wait_for_function(STILL)
    across, down = page.evaluate(PLACE, [chart, x, y])
    page.mouse.move(across - 1, down - 1)
    page.mouse.move(across, down)
    page.wait_for_function(f"() => ({LABELS})().length > 0")
    assert page.evaluate(INSIDE)
    return " ".join(page.evaluate(LABELS))


@pytest.mark.parametrize("width", [400, 1280])
def test_a_hover_shows_the_configuration_that_is_there(browser: Browser, store: RunStore, width: int) -> None:
    points = {name: (macs / 1e6, 100 * accuracy) for name, (macs, accuracy) in medians(store).items()}
    with opened(browser, store, width) as page:
        for name in alone(points)[:5]:
            label = hovered(page, "space", *points[name])
            sizes = zip(("conv2", "conv3", "conv4"), name.split("-"), strict=True)
            layers = ", ".join(f"{layer}:\xa0{size}" for layer, size in sizes)
            assert re.match(rf"{name}( \([^)]*\))?{points[name][1]:.2f} % in the supernet", label)
            assert layers in label
            told = page.locator("[data-pointed]").inner_text()
            assert told.startswith(name) and f"; {layers}.".replace("\xa0", " ") in told
            assert ("fixed" in label) == (name in FIXED)
            assert f"{points[name][0]:.2f} M MACs" in label.replace("\xa0", " ")
            assert f"{points[name][1]:.2f} %" in label
        chosen = SELECTED["16-16-16"][0]
        assert f"{chosen} (selected" in hovered(page, "space", *points[chosen])


def test_a_hover_on_figure_1(browser: Browser, store: RunStore) -> None:
    rows = store.read_table("alpha_sweep").to_dict("records")
    found = [r["difference"] for r in rows if (r["alpha"], r["configuration"]) == (0.0, "1-1-1")]
    height = 100 * statistics.mean(found)
    with opened(browser, store) as page:
        label = hovered(page, "figure-1-left", "1-1-1", height)
    assert "1-1-1" in label and f"{height:+.2f}".replace("-", "−") in label.replace("-", "−") and "alpha 0" in label


def test_the_budget_names_the_best_there_is(browser: Browser, store: RunStore) -> None:
    searched = medians(store)

    def best(limit: float) -> str | None:
        fitting = [name for name, (macs, _) in searched.items() if macs <= limit]
        return max(fitting, key=lambda name: (searched[name][1], -searched[name][0]), default=None)

    steps = sorted({searched[best(macs) or ""][0] for macs, _ in searched.values()})
    limits = [step + shift for step in steps for shift in (-1, 0, 1)]  # where the best changes, to the last MAC
    assert any(float(f"{step / 1e6:.6f}") * 1e6 < step for step in steps)  # among them one that rounding would lose
    with opened(browser, store) as page:
        assert f"Without a budget the best is {best(math.inf)}:" in page.locator("[data-best]").inner_text()
        answers = page.evaluate(SET_BUDGETS, [f"{limit / 1e6:.6f}" for limit in limits])
        assert len(answers) == 3 * len(steps) > 60
        for limit, (text, shapes) in zip(limits, answers, strict=True):
            name, budget = best(limit), f"{limit / 1e6:.6f}".rstrip("0").rstrip(".")
            assert text.startswith(f"Within {budget} M MACs an image")
            veil, line, *ring = shapes
            assert veil["x0"] == line["x0"] == pytest.approx(limit / 1e6)  # what is beyond the budget is greyed
            assert veil["x1"] > max(macs for macs, _ in searched.values()) / 1e6
            if name is None:
                assert "nothing fits; the least is 1.847698 M MACs an image at 1-1-1" in text
                assert ring == []
                continue
            macs, accuracy = searched[name]
            assert f"the best is {name}: {100 * accuracy:.2f} % in the supernet, {macs / 1e6:.7g} M MACs" in text
            assert (ring[0]["xanchor"], ring[0]["yanchor"]) == pytest.approx((macs / 1e6, 100 * accuracy))
        page.locator("[data-clear]").click()
        expect(page.locator("[data-best]")).to_contain_text("Without")
        assert page.locator("[data-budget]").input_value() == ""


def test_the_slider_and_another_cost(browser: Browser, store: RunStore) -> None:
    with opened(browser, store) as page:
        page.locator("[data-slide]").fill("500")
        half = float(page.locator("[data-budget]").input_value())
        all_macs = [macs for macs, _ in medians(store).values()]
        assert half == pytest.approx((min(all_macs) + max(all_macs)) / 2e6, rel=1e-3)
        slide = page.locator("[data-slide]")
        assert slide.get_attribute("aria-valuetext") == f"{half:g} M MACs an image"
        slide.fill("0")  # the least there is: something fits
        expect(page.locator("[data-best]")).to_contain_text("the best is 1-1-1:")
        slide.fill("1000")
        assert slide.get_attribute("aria-valuetext") == "no budget"
        page.locator("figure[data-chart=space] [data-choose]").select_option("thousand parameters")
        expect(page.locator("[data-best]")).to_contain_text("thousand parameters")
        assert page.locator("[data-budget]").input_value() == ""
        rows = store.read_table("configurations")
        least = rows["parameters"].min()
        name = rows.loc[rows["parameters"].idxmin(), "configuration"]
        page.locator("[data-budget]").fill(f"{least / 1e3}")
        expect(page.locator("[data-best]")).to_contain_text(f"best is {name}:")


def test_zoom_legend_and_stages(browser: Browser, store: RunStore) -> None:
    with opened(browser, store) as page:
        figure = page.locator("figure[data-chart=space]")
        span = "() => { const r = document.querySelector('figure[data-chart=space] .plot')._fullLayout.xaxis.range;"
        span += " return r[1] - r[0]; }"
        before = page.evaluate(span)
        figure.locator(".modebar-btn[data-title='Zoom in']").click()
        page.wait_for_function(f"() => ({span})() < 0.6 * {before}")
        page.locator("[data-budget]").fill("2.5")  # the filter leaves the zoom as it is
        expect(page.locator("[data-best]")).to_contain_text("Within 2.5 ")
        assert page.evaluate(span) < 0.6 * before
        button = figure.locator(".legend button", has_text="Pareto front")
        assert button.get_attribute("aria-pressed") == "true"
        button.click()
        visible = "() => document.querySelector('figure[data-chart=space] .plot')._fullData.map((t) => t.visible)"
        assert page.evaluate(visible).count(False) == 2  # its line and its points
        assert figure.locator(".legend button", has_text="Pareto front").get_attribute("aria-pressed") == "false"
        page.keyboard.press("Space")  # the button still has the focus
        expect(button).to_have_attribute("aria-pressed", "true")
        assert page.evaluate(visible).count(False) == 0
        curves = page.locator("figure[data-chart=curves]")
        curves.locator("[data-choose]").select_option("validate-finetune")
        expect(curves.locator(".legend button")).to_have_count(12)
        titles = page.evaluate("() => [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
        assert set(titles) == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 2000])
def test_nothing_is_wider_than_the_window(browser: Browser, store: RunStore, width: int, scheme: str) -> None:
    with opened(browser, store, width, scheme) as page:
        for details in page.locator("details").all():
            details.locator("summary").click()
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        overhang = """() => [...document.querySelectorAll("main *")]
          .filter((one) => !one.closest(".scroll, .plot, .unseen"))
          .filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5)
          .map((one) => one.outerHTML.slice(0, 80))"""
        assert page.evaluate(overhang) == []
        background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]


def test_the_figures_follow_a_change_of_scheme(browser: Browser, store: RunStore) -> None:
    text = "() => document.querySelector('figure[data-chart=space] .plot')._fullLayout.font.color"
    with opened(browser, store) as page:
        assert page.evaluate(text) == "#1b1f24"
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(f"() => ({text})() == '#e6e9ed'")


@pytest.mark.parametrize("width", [400, 1280])
def test_a_network_of_many_layers(browser: Browser, tmp_path: Path, width: int) -> None:
    """Of 48 layers a hover names as many as it has room for, and the line beneath the figure all of them."""
    store = new_run(tmp_path / "run", ["supernet.seeds=1"])
    layers = {f"layer{place // 6}.{place % 6}.conv2": (1, 2) for place in range(48)}
    write_configurations(store, layers, seeds=1, limit=6)
    write_decompositions(store, layers)
    write_page(store)
    points = {name: (macs / 1e6, 100 * accuracy) for name, (macs, accuracy) in medians(store).items()}
    with opened(browser, store, width) as page:
        for name in alone(points)[:3]:
            label = hovered(page, "space", *points[name])
            assert page.evaluate(INSIDE_HEIGHT)
            assert f"{points[name][1]:.2f} % in the supernet" in label and "layer0.0.conv2" in label
            told = page.locator("[data-pointed]").inner_text()
            assert told.startswith(name) and told.endswith(f"layer7.5.conv2: {name[-1]}.")
        names = page.locator("figure[data-chart=decompositions] .ytick").all_text_contents()
        assert names == list(layers) or names == list(layers)[::-1]
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_an_empty_run_opens(browser: Browser, tmp_path: Path) -> None:
    store = new_run(tmp_path / "run")
    write_page(store)
    with opened(browser, store, 400) as page:
        assert page.locator("section .missing").count() >= 7
        assert page.locator("figure").count() == 0


def test_100_000_configurations(browser: Browser, large: RunStore) -> None:
    assert (large.path / "report.html").stat().st_size < 8_000_000
    searched = medians(large)
    assert len(searched) == 100_000
    with opened(browser, large) as page:
        sample = page.evaluate("""() => { const t = document.querySelector('figure[data-chart=space] .plot').data[1];
          return t.customdata.map((about, i) => [about[4], t.x[i], t.y[i]]); }""")
        points = {name: (x, y) for name, x, y in sample}
        assert len(points) == 2000
        for name in alone(points)[:4]:
            label = hovered(page, "space", *points[name])
            assert points[name] == pytest.approx((searched[name][0] / 1e6, 100 * searched[name][1]))
            assert re.match(rf"{name}( \([^)]*\))?.* % in the supernet.*features\.0:", label)
            # As text: no bold, no script.
            assert f"{HOSTILE}: {name.split('-')[-1]}." in page.locator("[data-pointed]").inner_text()
        for limit in (2_000_000, 3_456_780, 5_000_000):
            page.locator("[data-budget]").fill(f"{limit / 1e6:g}")
            expect(page.locator("[data-best]")).to_contain_text(f"Within {limit / 1e6:g} ")
            fitting = {name: one for name, one in searched.items() if one[0] <= limit}
            highest = max(accuracy for _, accuracy in fitting.values())
            least = min(macs for macs, accuracy in fitting.values() if accuracy == highest)
            names = [name for name, one in fitting.items() if one == (least, highest)]
            assert any(f"the best is {name}: " in page.locator("[data-best]").inner_text() for name in names)
