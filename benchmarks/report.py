"""How smoothly the report scrolls and follows the pointer: the time between frames, in headless Chromium.

    python benchmarks/report.py [--points 252 100000] [--width 1280] [--repeats 3]

For each number of configurations the script writes a report from synthetic tables (those of the tests), opens it,
scrolls it with the wheel from top to bottom and back, and moves the pointer across the chart of all configurations.
Baseline, in the same run: the same gestures on a page of text alone. The script prints the median, the 95th percentile
and the longest time between two frames, and the ratio of the 95th percentile to that of the baseline. A display of 60
frames per second shows one frame every 16.7 ms.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "report"))
from runs import new_run, write_configurations, write_decompositions

from gross_ray.report.page import write_page

MEASURE = """() => {
  window.frames_ = [];
  let before = null;
  const step = (now) => {
    if (before !== null) window.frames_.push(now - before);
    before = now;
    window.on_ = requestAnimationFrame(step);
  };
  window.on_ = requestAnimationFrame(step);
}"""
MEASURED = "() => { cancelAnimationFrame(window.on_); return window.frames_; }"
BOX = """() => {
  const plot = document.querySelector('figure[data-chart="space"] .plot') || document.body;
  plot.scrollIntoView({block: "center"});
  const box = plot.getBoundingClientRect();
  return [box.x, Math.max(0, box.y), box.width, Math.min(box.height, innerHeight)];
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, nargs="+", default=[252, 100_000])
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        parser.error("no chromium found: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages = {"text alone": _text(Path(folder)), "text, 40 ms": _text(Path(folder), busy=40)} | {
            f"{points} points": _page(Path(folder) / str(points), points) for points in options.points
        }
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        print(f"Chromium {browser.version}, headless, {options.width} pixels wide, {options.repeats} times in turn")
        frames: dict[str, dict[str, list[float]]] = {name: {"scroll": [], "hover": []} for name in pages}
        for _ in range(options.repeats):
            for name, file in pages.items():
                for gesture, found in _gestures(browser, file, options.width).items():
                    frames[name][gesture] += found
        browser.close()
    for gesture in ("scroll", "hover"):
        least = _percentile(frames["text alone"][gesture])
        for name in pages:
            found = frames[name][gesture]
            print(
                f"{gesture:6} {name:14} median {statistics.median(found):5.1f} ms, 95 % {_percentile(found):5.1f} ms, "
                f"longest {max(found):5.0f} ms, of {len(found)} frames; ratio {_percentile(found) / least:.1f}"
            )


def _page(folder: Path, points: int) -> Path:
    """Write the report of a run with `points` configurations."""
    store = new_run(folder, ["supernet.seeds=1"])
    names = ("conv2", "conv3", "conv4") if points <= 252 else [f"features.{place}" for place in range(6)]
    sizes = {name: (1, 2, 4, 8, 16, 32, 64) if points > 252 else (1, 2, 4, 8, 16, 32) for name in names}
    if points <= 252:
        sizes["conv4"] = (1, 2, 4, 8, 16, 32, 64)
    write_configurations(store, sizes, seeds=1, limit=points)
    write_decompositions(store, sizes)
    write_page(store)
    return store.path / "report.html"


def _text(folder: Path, busy: int = 0) -> Path:
    """Write a page of text, as long as a report; each gesture keeps it busy for `busy` milliseconds."""
    file = folder / f"text-{busy}.html"
    work = f"const until = performance.now() + {busy}; while (performance.now() < until);"
    script = f"for (const one of ['scroll', 'mousemove']) addEventListener(one, () => {{ {work} }});" if busy else ""
    text = "<p>A line of text.</p>" * 250
    file.write_text(f"<!DOCTYPE html><html data-drawn><body>{text}<script>{script}</script>", encoding="utf-8")
    return file


def _gestures(browser: Browser, file: Path, width: int) -> dict[str, list[float]]:
    """Open a page, scroll and move the pointer; return the milliseconds between frames for each gesture."""
    page = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    page.wait_for_timeout(500)
    scrolled = _scrolled(page)
    hovered = _hovered(page)
    page.close()
    return {"scroll": scrolled, "hover": hovered}


def _scrolled(page: Page) -> list[float]:
    page.mouse.move(300, 400)
    page.evaluate(MEASURE)
    for down in (120, -120):
        for _ in range(45):
            page.mouse.wheel(0, down)
            page.wait_for_timeout(16)
    return list(page.evaluate(MEASURED))


def _hovered(page: Page) -> list[float]:
    left, top, width, height = page.evaluate(BOX)
    page.wait_for_timeout(300)
    page.evaluate(MEASURE)
    for step in range(90):
        share = step / 89
        page.mouse.move(left + width * (0.1 + 0.8 * share), top + height * (0.3 + 0.4 * (share * 7 % 1)))
        page.wait_for_timeout(16)
    return list(page.evaluate(MEASURED))


def _percentile(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


if __name__ == "__main__":
    main()
