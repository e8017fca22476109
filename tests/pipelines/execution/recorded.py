"""Progress that remembers what was reported."""

from __future__ import annotations

from pipelines.watching import StageProgress


class Recorded(StageProgress):
    def __init__(self) -> None:
        super().__init__("test", 0, 0)
        self.texts: dict[str, str] = {}
        self.order: list[str] = []
        self.states: dict[str, set[tuple[float, str]]] = {}
        self.notes: list[str] = []

    def unit_done(self, unit: str, text: str) -> None:
        super().unit_done(unit, text)
        self.order.append(unit)
        self.texts[unit] = text

    def under_way(self, states: dict[str, tuple[float, str]]) -> None:
        for unit, state in states.items():
            self.states.setdefault(unit, set()).add(state)

    def note(self, text: str) -> None:
        self.notes.append(text)
