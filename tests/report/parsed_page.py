"""The page as html.parser reads it: tables by caption, elements, the figures' JSON. It knows nothing of the report."""

from __future__ import annotations

import html
import json
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "input", "br", "hr", "img", "link", "wbr"}


@dataclass
class ParsedTable:
    heads: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    scopes: Counter[tuple[str, str | None]] = field(default_factory=Counter)


class ParsedPage(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tables: dict[str, ParsedTable] = {}
        self.scripts: list[str] = []
        self.plots: dict[str, str] = {}
        self.missing: list[str] = []
        self.texts: dict[str, str] = {}
        """What stands in all elements of a name, one after another."""
        self.strips: dict[str, list[dict[str, str]]] = {}
        """The attributes of the cells of each strip, by the name of the configuration beside it."""
        self.uniform: dict[str, str] = {}
        """The short names in the tables, which are not part of the cells' texts, by that name."""
        self._strip: list[dict[str, str]] = []
        self._short, self._name = "", ""
        self._stack: list[tuple[str, dict[str, str | None]]] = []
        self._table, self._row, self._text, self._figure = ParsedTable(), [""], "", ""
        self.feed(page)
        self.close()
        assert self._stack == [], self._stack

    @property
    def charts(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        named = dict(attrs)
        if tag in VOID:
            return
        self._stack.append((tag, named))
        if tag == "table":
            self._table = ParsedTable()
        elif tag == "tr":
            self._row = []
        elif tag in ("th", "td", "caption", "script", "p"):
            self._text = ""
            if tag == "th":
                self._table.scopes[tag, named.get("scope")] += 1
        elif tag == "span" and named.get("class") == "strip":
            assert named["role"] == "img" and named["aria-label"]
            self._strip, self._short = [], ""
        elif tag == "span" and named.get("class") == "name":
            self._name = ""
        elif tag == "i":
            self._strip.append({name: value or "" for name, value in attrs})
        elif tag == "figure":
            self._figure = named["data-chart"] or ""
        elif tag == "div" and named.get("class") == "plot":
            assert named["role"] == "img"
            self.plots[self._figure] = named["aria-label"] or ""

    def handle_endtag(self, tag: str) -> None:
        opened, named = self._stack.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"
        if tag in ("th", "td"):
            self._row.append(self._text)
        elif named.get("class") == "name":
            self.strips[self._name], self.uniform[self._name] = self._strip, self._short
        elif tag == "tr":
            if any(name == "thead" for name, _ in self._stack):
                self._table.heads = self._row
            else:
                self._table.rows.append(self._row)
        elif tag == "caption":
            self.tables[self._text] = self._table
        elif tag == "script":
            self.scripts.append(self._text)
        elif tag == "p" and self._text.startswith("Missing: "):
            self.missing.append(self._text)

    def handle_data(self, data: str) -> None:
        for name, attributes in self._stack[-1:]:
            if name == "strong":
                self._short = data
                continue
            self._text += data
            if attributes.get("class") == "name":
                self._name += data
            self.texts[name] = self.texts.get(name, "") + data


def traces(figure: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a figure's traces by name, names as people read them."""
    return {html.unescape(trace.get("name", "")): trace for trace in figure["data"]}
